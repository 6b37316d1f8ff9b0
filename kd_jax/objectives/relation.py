"""Defines the term `relation`: relations between tokens by queries, keys and values imitate the
teacher's.

Wang et al., "MiniLM", arXiv:2002.10957, sections 3.1 and 3.2: relations qk (the attention itself)
and vv of the last layers. Wang et al., "MiniLMv2", arXiv:2012.15828, section 3.1: qq, kk and vv
over relation heads of any number, with a teacher layer of choice: the last, or one in the upper
middle of a large teacher (the 21st of 24). Both papers average over a row's tokens first; here, as
in all terms, every token of the batch counts alike.
"""

import dataclasses

import jax.numpy as jnp

from kd_jax.errors import UserError
from kd_jax.objectives import layer_map as maps
from kd_jax.objectives import pairwise
from kd_jax.ranges import Whole
from kd_jax.types import Array, Heads


@dataclasses.dataclass(frozen=True)
class Relation(pairwise.Pairwise):
    """The divergence of relations KL(r_t || r_s), nats: a mean over layer pairs, heads and tokens,
    summed over the relations; r_mn = softmax(m n / sqrt(Kr)) without padding, heads of width Kr.

    With relation heads, a model's heads are joined and cut again into that many, so that models
    with different widths and numbers of heads can be compared.
    """

    relations: tuple[tuple[str, str], ...]
    relation_heads: int
    layers: str | maps.Pairs
    causal: bool

    name = "relation"

    def _check(self, student: int, teacher: int) -> None:
        if not self.relation_heads and student != teacher:
            raise UserError(
                f"objective relation: the student has {student} heads and the teacher {teacher}: "
                f"set relation_heads to a number that divides both widths"
            )

    def _compare(self, student: Heads, teacher: Heads, visible_B1TS: Array) -> Array:
        ours, theirs = self._cut(student, "student"), self._cut(teacher, "teacher")
        rows_BT = jnp.float32(0.0)
        for m, n in self.relations:
            scores = (pairwise.scores(x[m], x[n]) for x in (ours, theirs))
            logs = (pairwise.log_probs(x, visible_B1TS) for x in scores)
            rows_BT += pairwise.kl(*logs, visible_B1TS)
        return rows_BT

    def _cut(self, heads: Heads, whose: str) -> dict[str, Array]:
        """Cuts q, k and v into relation heads (B, T, Hr, Kr), divided by Kr^(1/4), so that scores
        are divided by its root."""
        B, T, num_heads, head_width = heads.q_BTHK.shape
        width, count = num_heads * head_width, self.relation_heads or num_heads
        if width % count:
            raise UserError(
                f"objective relation: relation_heads={count} does not divide the {width} units of "
                f"the {whose}'s heads"
            )
        # The scale of the scores is in q: K^(-1/2), which is taken out again. Whatever else a model
        # has there (GPT-2's division by the layer) is its own and stays.
        found = {
            "q": heads.q_BTHK.astype(jnp.float32) * head_width**0.5,
            "k": heads.k_BTGK.astype(jnp.float32),
            "v": heads.v_BTGK.astype(jnp.float32),
        }
        size = (width // count) ** -0.25
        return {name: x.reshape(B, T, count, -1) * size for name, x in found.items()}


def make(
    relations: tuple[str, ...] = ("qq", "kk", "vv"),
    relation_heads: int = 0,
    layers: str | maps.Pairs = "last",
    causal: bool = False,
) -> Relation:
    """Makes the term.

    `relations`: pairs of q, k, v, such as ("qk", "vv") for MiniLM; `relation_heads`: 0 takes the
    models' heads, equally many in both; `layers`: last | uniform | pairs (student, teacher), from
    1; `causal`: whether the models are.
    """
    try:
        found = tuple((m, n) for m, n in relations)
    except (TypeError, ValueError):
        found = ()
    if not found or any(x not in ("q", "k", "v") for pair in found for x in pair):
        raise UserError(
            f"objective relation: relations={relations!r}: give pairs of q, k, v, such as "
            "('qq', 'kk', 'vv')"
        )
    Whole(least=0).check(relation_heads, "objective relation: relation_heads")
    return Relation(found, relation_heads, maps.read("relation", layers), causal)
