"""Chooses the positions that a term over logits sees, by a model's entropy there.

"SE-KD", arXiv:2602.01395: the tokens of which the student is least sure. Chosen is a share of each
row of a batch, so the choice depends on that row alone, not on the micro-batches and devices that
the others are on; and each chosen position has the mean weight of its row, so a denominator is a
function of the data alone.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kd_jax import axes
from kd_jax.objectives.divergence import Columns, Softmax
from kd_jax.objectives.logits import Head, Source, in_chunks
from kd_jax.precision import Policy
from kd_jax.types import Array

BY = ("student_entropy", "teacher_entropy")


@dataclasses.dataclass(frozen=True)
class Selection:
    """The positions of the highest entropy, `share` of those in a row that have a weight, rounded
    up; of equal ones the first."""

    by: str  # one of BY
    share: float

    def denominator(self, weights_BP: Array) -> Array:
        """Computes the sum of the chosen positions' weights, a scalar."""
        count_B1, mean_B1 = self._chosen(weights_BP)
        return jnp.sum(count_B1 * mean_B1)

    def weights(self, weights_BP: Array, entropy_BP: Array) -> Array:
        """Computes the weight of each position, (B, P): 0 where it is not chosen."""
        count_B1, mean_B1 = self._chosen(weights_BP)
        order_BP = jnp.argsort(jnp.where(weights_BP > 0, -entropy_BP, jnp.inf), axis=1)
        rank_BP = jnp.argsort(order_BP, axis=1)
        return jnp.where(rank_BP < count_B1, mean_B1, 0.0)

    def _chosen(self, weights_BP: Array) -> tuple[Array, Array]:
        """Counts the chosen positions of each row, and computes their weight."""
        seen_B1 = jnp.sum(weights_BP > 0, axis=1, keepdims=True).astype(jnp.float32)
        mean_B1 = jnp.sum(weights_BP, axis=1, keepdims=True) / jnp.maximum(seen_B1, 1.0)
        # 0.2 of 5 is 1, rounded or not.
        return jnp.ceil((1 - 1e-5) * self.share * seen_B1), mean_B1


def entropy(source: Source, policy: Policy, size: int) -> Array:
    """Computes the entropy of each row's distribution in nats, (N,), in chunks of `size` rows,
    without a gradient. The unembedding may be this device's part, as in objectives/vocab.py."""
    head = isinstance(source, Head)
    columns = source.columns(policy) if head else Columns(None, policy.on_cpu)
    split = axes.FSDP if head and source.part else ()
    source = jax.lax.stop_gradient(source)

    def of_chunk(rows):
        rows = jax.tree.map(lambda x: axes.gathered(x, split), rows)
        logits_CV = columns.below(source.logits(rows, policy), source.num_classes)
        most_C1 = columns.reduced({"most": logits_CV}, jax.lax.max)["most"]
        model = Softmax("own", logits_CV, most_C1, frozenset(), columns)
        sums = columns.reduced(model.normalizer(1.0) | model.surprise(), jax.lax.add)
        return axes.own(model.entropy(sums)[:, 0], split)

    num_rows = len(jax.tree.leaves(source.rows)[0])
    return jax.lax.map(of_chunk, in_chunks(source.rows, size)).reshape(-1)[:num_rows]
