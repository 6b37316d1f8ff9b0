"""Defines the term `akl`: adaptive KL divergence, forward KL where the student misses the teacher's
likely ids, reverse KL where it misses the others.

Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language
Models", arXiv:2404.02657, section 4.3, with their head of half of the teacher's mass.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kd_jax.objectives.symmetric_kl import BothKLs
from kd_jax.ranges import Real


@dataclasses.dataclass(frozen=True)
class AdaptiveKL(BothKLs):
    """Adaptive KL, T^2 [w KL(q || p) + (1 - w) KL(p || q)]: w is the head's share of the distance
    sum_v |p - q|, and a constant in the gradient.

    The head are the teacher's likeliest ids that have at most the mass `head` together, and the
    first of them in any case (`Softmax.likeliest`: exact, in chunks and parts of the ids; ids of
    equal probability stay together, where sorting would part them). It takes 30 more passes over
    a chunk's logits of the teacher.
    """

    head: float = 0.5

    def forward_share(self, rows, sums, temperature):
        p_CV, q_CV = (model.probs(temperature, sums) for model in (rows.student, rows.teacher))
        gap_CV = jnp.abs(jax.lax.stop_gradient(p_CV) - q_CV)
        head_CV = rows.teacher.likeliest(self.head, temperature, sums)
        whole_C1 = rows.total(gap_CV)
        head_C1 = rows.total(jnp.where(head_CV, gap_CV, 0.0))
        return jnp.where(whole_C1 > 0, head_C1 / jnp.where(whole_C1 > 0, whole_C1, 1.0), 0.5)


def make(head: float = 0.5, t_squared: bool = True) -> AdaptiveKL:
    """Makes the term: `head` is the teacher's mass (mu) that the head has."""
    Real(least=0, most=1).check(head, "objective akl: head")
    return AdaptiveKL(t_squared, head=head)
