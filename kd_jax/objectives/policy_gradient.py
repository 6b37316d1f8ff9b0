"""Defines the term `policy_gradient`: reverse KL on the student's own words, by its score function.

The student is rewarded, token by token, by how much more probable the teacher finds what it wrote:
the on-policy distillation of reinforcement-learning libraries, for comparison with divergences over
the whole vocabulary, which have the same mean and no noise of sampling.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kd_jax.objectives.divergence import Divergence


@dataclasses.dataclass(frozen=True)
class PolicyGradient(Divergence):
    """Policy gradient of reverse KL, w (log p_old(y) - log q(y)): y is the label, which the student
    wrote with probability p_old, q = softmax(teacher), and w = p(y) / p_old(y) is the importance
    ratio of p = softmax(student). Its mean over y is the reverse KL, and -(log p_old - log q) is
    the advantage. Without `Batch.written`, p_old is p, taken as constant.

    Schulman et al., "Proximal Policy Optimization Algorithms", arXiv:1707.06347, eq. 6, with this
    advantage. Its gradient is written out.
    """

    of_written = True
    has_temperature = False

    def sums(self, rows, temperature):
        return {**rows.student.normalizer(1.0), **rows.teacher.normalizer(1.0)}

    def value(self, rows, sums, temperature):
        labels_C1 = rows.labels_C[:, None]
        own_C1, theirs_C1 = (
            model.at(labels_C1) - model.log_normalizer(1.0, sums)
            for model in (rows.student, rows.teacher)
        )
        if rows.written_C is None:
            old_C1 = jax.lax.stop_gradient(own_C1)
        else:
            old_C1 = rows.written_C[:, None]
        return jnp.exp(own_C1 - old_C1) * (old_C1 - theirs_C1)

    def grad(self, rows, sums, temperature):
        chosen_CV = rows.is_label().astype(rows.student.logits_CV.dtype)
        return self.value(rows, sums, 1.0) * (chosen_CV - rows.student.probs(1.0, sums))


make = PolicyGradient
