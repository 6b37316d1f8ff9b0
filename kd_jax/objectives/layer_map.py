"""Layer maps: which of the teacher's layers each of the student's learns from.

Layers count from 1, so that layer i ends in hidden state i; 0 is the embedding output. A map is

    uniform   student layer i with teacher layer round(i Lt / Ls): every (Lt / Ls)-th where that is
              whole, the last with the last (TinyBERT's g(m), Jiao et al., arXiv:1909.10351)
    last      the last layer of each, and nothing else
    pairs     ((student, teacher), ...) as given
"""

import operator

from kd_jax.errors import UserError
from kd_jax.types import ModelOutput, ModelSpec

Pairs = tuple[tuple[int, int], ...]


def read(
    objective: str, layers: str | Pairs, maps: tuple[str, ...] = ("uniform", "last")
) -> str | Pairs:
    """Reads the setting `layers` of a term. Raises UserError where it is no layer map."""
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


def spec_of(output: ModelOutput) -> ModelSpec:
    """Reads the width and the number of layers from hidden states."""
    return ModelSpec(output.hidden[0].shape[-1], len(output.hidden) - 1)


def pairs(
    objective: str, layers: str | Pairs, student: ModelSpec, teacher: ModelSpec, first: int = 1
) -> Pairs:
    """Lists the (student, teacher) layers of a map; `first` is the number of the first layer.
    Raises UserError for layers that there are not."""
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
