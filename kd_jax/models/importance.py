"""Ranks heads and FFN columns by the L1 norm of their weights.

A unit is the smallest thing that can be removed and leaves a block of the same kind: a key/value
head with the heads that share it, or a column of the FFN with its gate. Its importance is the L1
norm of its weights (Li et al. 2017, "Pruning Filters for Efficient ConvNets", arXiv:1608.08710, for
filters); biases are not counted.
"""

import dataclasses

import jax
import numpy as np

from kd_jax.models.shapes import BlockShape
from kd_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Units:
    """The importance scores of one layer's heads, or of its columns."""

    scores: np.ndarray  # of each: mean |w| of its weights
    cost: int  # parameters of each, biases too

    @property
    def spare(self) -> int:
        """Counts the units that can be removed: all but one."""
        return len(self.scores) - 1


def of_heads(attention: Params, shape: BlockShape) -> tuple[Array, Array]:
    """Computes the L1 norm of each head's weights, (num_kv_heads, heads that share one), and of
    each key/value head's weights, (num_kv_heads,)."""
    G, K = shape.num_kv_heads, shape.head_width
    into = {name: abs(attention[name]["kernel"]).sum(0).reshape(G, -1) for name in "qkv"}
    out = abs(attention["o"]["kernel"]).sum(1).reshape(G, -1)
    heads = (into["q"] + out).reshape(G, -1, K).sum(-1)
    return heads, (into["k"] + into["v"]).sum(-1)


def of_columns(mlp: Params) -> Array:
    """Computes the L1 norm of the weights of each FFN column, (ffn_width,)."""
    into = sum(abs(mlp[name]["kernel"]).sum(0) for name in mlp if name != "down")
    return into + abs(mlp["down"]["kernel"]).sum(1)


def units(block: Params, shape: BlockShape) -> tuple[Units, Units]:
    """Scores heads and columns of a full block; all scores are equal if it is abstract."""
    attention, mlp = {name: block["attention"][name] for name in "qkvo"}, block["mlp"]
    parts = ((attention, "o", shape.num_kv_heads), (mlp, "down", shape.ffn_width))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(block)):
        norms = [np.zeros(count) for *_, count in parts]
    else:
        heads, shared = of_heads(attention, shape)
        norms = [shared + heads.sum(-1), of_columns(mlp)]
    found = []
    for (part, out, count), norm in zip(parts, norms, strict=True):
        weights = sum(linear["kernel"].size for linear in part.values()) // count
        # The bias of what reads the units is not theirs.
        biases = [part[name]["bias"].size for name in part if name != out and "bias" in part[name]]
        found.append(Units(np.asarray(norm, np.float64) / weights, weights + sum(biases) // count))
    return found[0], found[1]


def least(layers: list[tuple[Units, Units]], need: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Chooses the units to remove from each layer by ranking all units of the model together: those
    with the lowest scores, until they have `need` parameters; units not needed for that stay."""
    flat = [each for pair in layers for each in pair]
    owner = np.repeat(np.arange(len(flat)), [len(each.scores) for each in flat])
    scores = np.concatenate([each.scores for each in flat])
    cost = np.array([each.cost for each in flat])[owner]
    stays = np.concatenate([np.arange(x.spare + 1) == np.argmax(x.scores) for x in flat])
    order = np.argsort(scores, kind="stable")
    order = order[~stays[order]]
    order = order[: np.searchsorted(np.cumsum(cost[order]), need) + 1]
    gone = np.zeros(len(scores), bool)
    gone[order] = True
    # The last to go may be a whole head: what is too much then comes back, most important first.
    too_much = cost[gone].sum() - need
    for unit in order[::-1]:
        if cost[unit] <= too_much:
            gone[unit] = False
            too_much -= cost[unit]
    found = [np.flatnonzero(gone[owner == i]) for i in range(len(flat))]
    return list(zip(found[::2], found[1::2], strict=True))


def evenly(layers: list[tuple[Units, Units]], need: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Chooses the units to remove from each layer so that all layers lose the same share of heads,
    and the same share of columns, until these have `need` parameters."""
    heads, columns = zip(*layers, strict=True)

    def lost(kind: tuple[Units, ...], share: float) -> list[int]:
        return [min(int(share * len(each.scores)), each.spare) for each in kind]

    def saved(kind: tuple[Units, ...], share: float) -> int:
        return sum(x.cost * n for x, n in zip(kind, lost(kind, share), strict=True))

    of_heads = need / sum(each.cost * each.spare for pair in layers for each in pair)
    while need - saved(heads, of_heads) > saved(columns, 1.0):
        of_heads += 1 / max(len(each.scores) for each in heads)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        enough = saved(heads, of_heads) + saved(columns, middle) >= need
        low, high = (low, middle) if enough else (middle, high)
    counts = zip(lost(heads, of_heads), lost(columns, high), strict=True)
    return [
        tuple(np.argsort(x.scores, kind="stable")[:n] for x, n in zip(pair, numbers, strict=True))
        for pair, numbers in zip(layers, counts, strict=True)
    ]
