"""Maps student layers to the teacher layers they learn from; base of the terms that compare layers.

Layers count from 1, so that layer i ends in hidden state i; 0 is the embedding output. A map is

    uniform   student layer i with teacher layer round(i Lt / Ls): every (Lt / Ls)-th if that is a
              whole number, the last with the last (TinyBERT's g(m), Jiao et al., arXiv:1909.10351)
    last      only the last layer of each
    pairs     ((student, teacher), ...) in the config
"""

import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from kd_jax.errors import UserError
from kd_jax.types import Array, Batch, ModelOutput, ModelSpec, Params

Pairs = tuple[tuple[int, int], ...]


def read(
    objective: str, layers: str | Pairs, maps: tuple[str, ...] = ("uniform", "last")
) -> str | Pairs:
    """Reads the setting `layers` of a term. Raises UserError if it is not a layer map."""
    if isinstance(layers, str) and layers in maps:
        return layers
    try:
        found = tuple((operator.index(s), operator.index(t)) for s, t in layers)
    except (TypeError, ValueError):
        raise UserError(
            f"objective {objective}: layers={layers!r}: have {', '.join(maps)}, or pairs "
            "(student, teacher)"
        ) from None
    if not found:
        raise UserError(f"objective {objective}: layers is empty: give at least one pair")
    return found


def pairs(
    objective: str, layers: str | Pairs, student: ModelSpec, teacher: ModelSpec, first: int = 1
) -> Pairs:
    """Lists the (student, teacher) layers of a map; `first` is the number of the first layer.
    Raises UserError for layers that do not exist."""
    if layers == "last":
        return ((student.num_layers, teacher.num_layers),)
    if layers == "uniform":
        ratio = teacher.num_layers / student.num_layers
        return tuple((i, max(first, round(i * ratio))) for i in range(1, student.num_layers + 1))
    for s, t in layers:
        if not (first <= s <= student.num_layers and first <= t <= teacher.num_layers):
            raise UserError(
                f"objective {objective}: layers: there is no pair ({s}, {t}): the student has "
                f"layers {first} to {student.num_layers}, the teacher {first} to "
                f"{teacher.num_layers}"
            )
    return layers


class LayerTerm:
    """Base of the terms that compare layers: the mean of `_distance` over the layer pairs, summed
    over tokens or rows by weight. Subclasses are frozen dataclasses with the setting `layers`."""

    needs_teacher = True
    name: str
    layers: str | Pairs
    first = 1  # number of the first layer that there is

    def pairs(self, student: ModelSpec, teacher: ModelSpec) -> Pairs:
        """Lists the (student, teacher) layers to compare; UserError if a layer does not exist."""
        return pairs(self.name, self.layers, student, teacher, self.first)

    def init(self, key: Array, student: ModelSpec, teacher: ModelSpec) -> Params:
        """Draws the term's own parameters, {} for most terms; raises UserError if the models cannot
        be compared."""
        self.pairs(student, teacher)
        return {}

    def weights(self, batch: Batch) -> Array:
        """Returns the weights of tokens, (B, T), or of rows, (B,)."""
        return batch.mask_BT

    def total(
        self, params: Params, student: ModelOutput, teacher: ModelOutput, batch: Batch
    ) -> Array:
        """Computes the weighted sum over this batch, a float32 scalar."""
        ours, theirs = self._states(student), self._states(teacher)
        compared = self.pairs(*(ModelSpec(0, len(states) - 1) for states in (ours, theirs)))
        each = (
            self._distance(self._projected(params, number, ours[s]), theirs[t], batch)
            for number, (s, t) in enumerate(compared)
        )
        return jnp.sum(sum(each) * self.weights(batch)) / len(compared)

    def _states(self, output: ModelOutput) -> Sequence[Any]:
        """Returns the states to compare, indexed by layer; 0 is the embedding output."""
        return output.hidden

    def _projected(self, params: Params, number: int, states: Any) -> Any:
        """Maps the student's states of pair `number` to the teacher's width."""
        return states

    def _distance(self, student: Any, teacher: Any, batch: Batch) -> Array:
        """Computes the distance of one pair of layers for each token or row."""
        raise NotImplementedError
