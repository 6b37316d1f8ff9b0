"""Defines the term `attention`: the student's attention imitates the teacher's, layer by layer.

Scores: Jiao et al., "TinyBERT", arXiv:1909.10351, eq. 7, on the scores before the softmax.
Probabilities: Wang et al., "MiniLM", arXiv:2002.10957, section 3.1, for any layers.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kd_jax.errors import UserError
from kd_jax.objectives import layer_map as maps
from kd_jax.objectives import pairwise
from kd_jax.types import Array, Heads, ModelSpec, Params


@dataclasses.dataclass(frozen=True)
class Attention(pairwise.Pairwise):
    """The distance of attention, a mean over layer pairs, heads and queries (tokens, not padding).

    scores_mse: mean over the keys of (s - t)^2, s and t the scores q k as the softmax gets them.
    kl: KL(t || s) of the attention probabilities over the keys, nats; without dropout.
    """

    kind: str
    layers: str | maps.Pairs
    heads: str
    causal: bool

    name = "attention"

    def init(self, key: Array, student: ModelSpec, teacher: ModelSpec) -> Params:
        """Returns {}, no parameters; UserError if layers or heads cannot be compared."""
        for whose, spec in (("student", student), ("teacher", teacher)):
            if spec.biased:
                raise UserError(
                    f"objective attention: the {whose} adds biases to its scores (MPNet), of which "
                    f"the products of queries and keys know nothing: take relation or hidden"
                )
        return super().init(key, student, teacher)

    def _check(self, student: int, teacher: int) -> None:
        if self.heads == "each" and student != teacher:
            raise UserError(
                f"objective attention: the student has {student} heads and the teacher {teacher}: "
                f"make them the same, or compare their means with heads='mean'"
            )

    def _compare(self, student: Heads, teacher: Heads, visible_B1TS: Array) -> Array:
        both = [pairwise.scores(x.q_BTHK, x.k_BTGK) for x in (student, teacher)]
        if self.kind == "kl":
            logs = (self._log_probs(x, visible_B1TS) for x in both)
            return pairwise.kl(*logs, visible_B1TS)
        if self.heads == "mean":
            both = [jnp.mean(x, axis=1, keepdims=True) for x in both]
        return pairwise.mse(*both, visible_B1TS)

    def _log_probs(self, scores_BHTS: Array, visible_B1TS: Array) -> Array:
        logs_BHTS = pairwise.log_probs(scores_BHTS, visible_B1TS)
        if self.heads == "each":
            return logs_BHTS
        mixed_B1TS = jax.nn.logsumexp(logs_BHTS, axis=1, keepdims=True)
        return mixed_B1TS - jnp.log(logs_BHTS.shape[1])


def make(
    kind: str = "scores_mse",
    layers: str | maps.Pairs = "uniform",
    heads: str = "each",
    causal: bool = False,
) -> Attention:
    """Makes the term.

    `kind`: scores_mse | kl; `layers`: uniform | last | pairs (student, teacher), from 1; `heads`:
    each (head i with head i, as many in both) | mean (the means over the heads of each model, of
    scores or probabilities, whose numbers may differ); `causal`: as the models are.
    """
    for name, value, have in (
        ("kind", kind, ("kl", "scores_mse")),
        ("heads", heads, ("each", "mean")),
    ):
        if value not in have:
            raise UserError(f"objective attention: {name}={value!r}: have {', '.join(have)}")
    return Attention(kind, maps.read("attention", layers), heads, causal)
