"""Models made smaller: blocks replaced by compact ones, heads and FFN columns pruned away.

Pure functions from a model to a model whose shapes really are smaller.

A unit is a key/value head with the heads that share it (one head where none are shared), or a
column of the FFN (with its gate, where there is one): what can be taken away and leaves a block of
the same kind. Its importance is the L1 norm of the weights that go with it (Li et al. 2017,
"Pruning Filters for Efficient ConvNets", arXiv:1608.08710, for filters); biases are not counted.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kd_jax.errors import UserError
from kd_jax.models import family as families
from kd_jax.models.blueprint import count
from kd_jax.models.family import Family
from kd_jax.models.heads import HEADS
from kd_jax.models.model_config import BlockShape, ModelConfig
from kd_jax.precision import Policy
from kd_jax.types import Array, Batch, Model, ModelOutput, Params

# What a new random block adds to the residual stream, as a part of what the family's own
# initialisation would: the model starts as if the block were left out, yet its weights have
# gradients.
SMALL = 0.01


def size(family: Family, config: Any, head: str) -> int:
    """Counts the parameters of a model; nothing is allocated."""
    return count(families.abstract(family, config, head, Policy()).params)


def replace(
    model: Model,
    family: Family,
    config: ModelConfig,
    layers: Sequence[int],
    shape: BlockShape,
    init: str,
    key: Array,
) -> tuple[Model, ModelConfig]:
    """Puts blocks of `shape` at `layers` (from 0): (model, its config); the rest is untouched.

    Args:
        model: may be abstract (jax.ShapeDtypeStruct), so is the result then; may be traced.
        family: the model's.
        config: the model's.
        layers: which blocks.
        shape: what they become.
        init: `random`: drawn as the family draws, but the projections that write into the residual
            stream `SMALL` times that; a slim block that ends in a norm keeps the norms of the block
            that was there, so that the next one reads features of the sizes it knows.
            `pruned`: the norms and the most important heads and FFN columns of the block that was
            there. That is for full blocks: what a bottleneck adds to the stream includes its own
            inner stream, which no part of another block does.
        key: of random blocks; a value depends on it and on the parameter's path alone.

    Raises UserError on an unknown layer or init, and where `shape` cannot be cut out of a block.
    """
    given = [config.shape(layer) for layer in range(config.num_layers)]
    unknown = sorted(set(layers) - set(range(config.num_layers)))
    if unknown:
        raise UserError(f"no block {unknown[0]}: the model has blocks 0 to {config.num_layers - 1}")
    if init not in ("random", "pruned"):
        raise UserError(f"a compact block's init is {init!r}; have: random, pruned")
    if init == "pruned":
        for layer in layers:
            _check_inside(shape, given[layer], layer)
    changed = with_blocks(config, [shape if i in layers else own for i, own in enumerate(given)])
    whole = families.abstract(family, changed, _head(model), changed.policy)

    def start(params: Params, key: Array) -> Params:
        blocks = dict(params["backbone"]["blocks"])
        for layer in layers:
            if init == "pruned":
                blocks[layer] = _cut(blocks[layer], given[layer], shape)
            else:
                new = {layer: whole.params["backbone"]["blocks"][layer]}
                drawn = families.draw(family, changed, {"backbone": {"blocks": new}}, key)
                blocks[layer] = _quiet(drawn["backbone"]["blocks"][layer])
                if shape.kind == given[layer].kind == "full" and config.post_norm:
                    norms = ("attention_norm", "mlp_norm")
                    blocks[layer] |= {
                        name: params["backbone"]["blocks"][layer][name] for name in norms
                    }
        return params | {"backbone": params["backbone"] | {"blocks": blocks}}

    return _changed(model, whole, start, key), changed


def prune(
    model: Model, family: Family, config: ModelConfig, target: float, ranking: str
) -> tuple[Model, ModelConfig]:
    """Takes the least important heads and FFN columns away: (model, its config).

    Args:
        model: may be abstract, so is the result then; with `global`, what would go from each layer
            is not known then, and it is as if every layer lost the same share.
        family: the model's.
        config: the model's.
        target: the share of all parameters that goes, at least, and hardly more.
        ranking: `global`: all heads and columns of all layers are ranked together by the mean |w|
            of their weights. That is the L1 norm that is lost for each parameter that is saved, so
            a head compares with a column although it has many times the weights. `layer`: heads
            and columns are ranked among those of their layer, and every layer loses the same
            share of them, so that layers that were alike stay so.

    One head (GQA: with those that share its keys) and one column of every layer stay. Raises
    UserError where that leaves more than `target` wants, and on an unknown ranking.
    """
    if ranking not in ("global", "layer"):
        raise UserError(f"ranking={ranking!r}: have global, layer")
    shapes = [config.shape(layer) for layer in range(config.num_layers)]
    blocks = [model.params["backbone"]["blocks"][layer] for layer in range(config.num_layers)]
    units = [score_units(_inner(block), own) for block, own in zip(blocks, shapes, strict=True)]
    total = count(model.params)
    spare = sum(each.cost * each.spare for pair in units for each in pair)
    if not 0 < target < 1 or math.ceil(target * total) > spare:
        raise UserError(
            f"pruning away {target} of all parameters: want a share above 0, and at most "
            f"{math.floor(1e4 * spare / total) / 1e4} of this model, where one head and one FFN "
            f"column of every layer stay"
        )
    evenly = ranking == "layer" or _abstract(model)
    gone = (take_evenly if evenly else take_least)(units, math.ceil(target * total))
    kept = []
    for layer, (shape, lost) in enumerate(zip(shapes, gone, strict=True)):
        heads, columns = (
            np.setdiff1d(np.arange(each.spare + 1), out)
            for each, out in zip(units[layer], lost, strict=True)
        )
        shared = shape.num_heads // shape.num_kv_heads
        every = (heads[:, None] * shared + np.arange(shared)).ravel()
        kept.append((shape, every, heads, columns))
        counts = dict(num_heads=len(every), num_kv_heads=len(heads), ffn_width=len(columns))
        shapes[layer] = dataclasses.replace(shape, **counts)

    def cut(params: Params) -> Params:
        blocks = params["backbone"]["blocks"]
        blocks = {layer: _take(blocks[layer], *each) for layer, each in enumerate(kept)}
        return params | {"backbone": params["backbone"] | {"blocks": blocks}}

    changed = with_blocks(config, shapes)
    whole = families.abstract(family, changed, _head(model), changed.policy)
    return _changed(model, whole, cut), changed


def with_blocks(config: ModelConfig, blocks: Sequence[BlockShape]) -> ModelConfig:
    """Makes the config of a model with these blocks; none are listed if all are the family's
    own."""
    own = all(block == config.own_shape for block in blocks)
    return dataclasses.replace(config, blocks=() if own else tuple(blocks))


class BlockStates(nnx.Module):
    """A model without its head and, in a decoder, the last norm, though it has the parameters of a
    `heads.HeadedModel`."""

    def __init__(self, backbone: nnx.Module, head: nnx.Module):
        self.backbone = backbone
        self.head = head

    def __call__(
        self, batch: Batch, seed: Array | None = None, replaced_L: Array | None = None
    ) -> ModelOutput:
        """`hidden` are the embedding output and each block's output, none normalised; there are no
        logits."""
        hidden, attention = self.backbone.states(batch, seed, replaced_L)
        return ModelOutput(hidden[-1], None, None, hidden, attention)


def block_states(model: Model) -> Model:
    """Makes a model that returns its blocks' states, of the same parameters, arrays or abstract."""

    def make(params):
        whole = nnx.merge(model.graphdef, params)
        graphdef, state = nnx.split(BlockStates(whole.backbone, whole.head))
        return Model(nnx.to_pure_dict(state), graphdef)

    return model.replace(graphdef=jax.eval_shape(make, model.params).graphdef)


def _changed(model: Model, whole: Model, change: Callable[..., Params], *inputs: Any) -> Model:
    """`whole`, which is abstract, with what `change` makes of the model's parameters; abstract
    still where they are."""
    if _abstract(model):
        return whole.replace(params=jax.eval_shape(change, model.params, *inputs))
    return whole.replace(params=change(model.params, *inputs))


def _check_inside(shape: BlockShape, given: BlockShape, layer: int) -> None:
    """Refuses a shape that cannot be cut out of another."""
    if shape.kind != "full" or given.kind != "full":
        raise UserError(
            f"block {layer}: only a slim block can start as a part of a full one (init pruned), "
            f"here a {shape.kind} block would of a {given.kind} one; let it start at random"
        )
    if shape.head_width != given.head_width:
        raise UserError(
            f"block {layer}: its heads are {given.head_width} wide, those of the compact block "
            f"{shape.head_width}; with init pruned heads keep their width"
        )
    shared = [each.num_heads // each.num_kv_heads for each in (shape, given)]
    pairs = {
        "key/value heads": (shape.num_kv_heads, given.num_kv_heads),
        "heads to a key/value head": tuple(shared),
        "FFN columns": (shape.ffn_width, given.ffn_width),
    }
    for what, (wanted, have) in pairs.items():
        if wanted > have:
            raise UserError(
                f"block {layer} has {have} {what}, the compact block would have {wanted}; "
                f"with init pruned it takes some of them"
            )


def _cut(block: Params, given: BlockShape, shape: BlockShape) -> Params:
    """The most important heads and columns of a block, in their order. Can be traced.

    Of the heads that share keys the best go with them; a key/value head is as important as it is
    with those.
    """
    shared = shape.num_heads // shape.num_kv_heads
    scores_GR, scores_G = head_norms(block["attention"], given)
    best_GR = _best(scores_GR, shared)
    scores_G = scores_G + jnp.take_along_axis(scores_GR, best_GR, axis=1).sum(1)
    groups = _best(scores_G, shape.num_kv_heads)
    heads = groups[:, None] * scores_GR.shape[1] + best_GR[groups]
    columns = _best(column_norms(block["mlp"]), shape.ffn_width)
    return _take(block, given, heads.ravel(), groups, columns)


def _best(scores: Array, count: int) -> Array:
    """The numbers of the highest scores along the last axis, in ascending order."""
    return jnp.sort(jnp.argsort(scores, axis=-1, descending=True)[..., :count], axis=-1)


def _take(block: Params, shape: BlockShape, heads: Any, groups: Any, columns: Any) -> Params:
    """A block with these heads, key/value heads and columns of it alone."""
    inner = _inner(block)
    attention, mlp = dict(inner["attention"]), dict(inner["mlp"])
    for name in "qkv":
        numbers = heads if name == "q" else groups
        attention[name] = {
            kind: _heads_of(value, shape.head_width, numbers)
            for kind, value in attention[name].items()
        }
    rows = attention["o"]["kernel"]
    attention["o"] = attention["o"] | {"kernel": _heads_of(rows.T, shape.head_width, heads).T}
    for name in mlp.keys() - {"down"}:
        mlp[name] = {kind: value[..., columns] for kind, value in mlp[name].items()}
    mlp["down"] = mlp["down"] | {"kernel": mlp["down"]["kernel"][columns]}
    inner = inner | {"attention": attention, "mlp": mlp}
    return block | {"inner": inner} if "inner" in block else inner


def _heads_of(value: Any, width: int, numbers: Any) -> Any:
    """The columns of these heads, of (..., heads x width)."""
    of_heads = value.reshape(*value.shape[:-1], -1, width)[..., numbers, :]
    return of_heads.reshape(*value.shape[:-1], -1)


def _quiet(block: Params) -> Params:
    """The block with what it adds to the residual stream made `SMALL`."""

    def scaled(linear: Params) -> Params:
        return linear | {"kernel": SMALL * linear["kernel"]}

    if "inner" in block:
        return block | {"up": scaled(block["up"])}
    attention = block["attention"] | {"o": scaled(block["attention"]["o"])}
    return block | {
        "attention": attention,
        "mlp": block["mlp"] | {"down": scaled(block["mlp"]["down"])},
    }


def _inner(block: Params) -> Params:
    """A block of the family's own kind: itself, or the one in a bottleneck."""
    return block.get("inner", block)


def _abstract(model: Model) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model.params))


def _head(model: Model) -> str:
    kind = type(nnx.merge(model.graphdef, model.params).head)
    return next(name for name, each in HEADS.items() if each is kind)


@dataclasses.dataclass(frozen=True)
class Units:
    """Scores of the heads of one layer, or of its columns."""

    scores: np.ndarray  # of each: mean |w| of its weights
    cost: int  # parameters of each, biases too

    @property
    def spare(self) -> int:
        """The number of units that can be taken away: one stays."""
        return len(self.scores) - 1


def head_norms(attention: Params, shape: BlockShape) -> tuple[Array, Array]:
    """Computes the L1 norm of the weights that go with each head, (num_kv_heads, heads that share
    one), and of those that go with each key/value head, (num_kv_heads,)."""
    G, K = shape.num_kv_heads, shape.head_width
    into = {name: abs(attention[name]["kernel"]).sum(0).reshape(G, -1) for name in "qkv"}
    out = abs(attention["o"]["kernel"]).sum(1).reshape(G, -1)
    heads = (into["q"] + out).reshape(G, -1, K).sum(-1)
    return heads, (into["k"] + into["v"]).sum(-1)


def column_norms(mlp: Params) -> Array:
    """Computes the L1 norm of the weights that go with each column of the FFN, (ffn_width,)."""
    into = sum(abs(mlp[name]["kernel"]).sum(0) for name in mlp if name != "down")
    return into + abs(mlp["down"]["kernel"]).sum(1)


def score_units(block: Params, shape: BlockShape) -> tuple[Units, Units]:
    """Scores heads and columns of a block of the family's own kind; all alike if it is abstract."""
    attention, mlp = {name: block["attention"][name] for name in "qkvo"}, block["mlp"]
    parts = ((attention, "o", shape.num_kv_heads), (mlp, "down", shape.ffn_width))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(block)):
        norms = [np.zeros(number) for *_, number in parts]
    else:
        heads, shared = head_norms(attention, shape)
        norms = [shared + heads.sum(-1), column_norms(mlp)]
    found = []
    for (part, out, number), norm in zip(parts, norms, strict=True):
        weights = sum(linear["kernel"].size for linear in part.values()) // number
        # The bias of what reads the units is not theirs.
        biases = [part[name]["bias"].size for name in part if name != out and "bias" in part[name]]
        found.append(Units(np.asarray(norm, np.float64) / weights, weights + sum(biases) // number))
    return found[0], found[1]


def take_least(layers: list[tuple[Units, Units]], need: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Chooses the units to take from each layer, all of the model ranked together: those of the
    lowest scores, of `need` parameters at least, but for what `need` can do without."""
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


def take_evenly(
    layers: list[tuple[Units, Units]], need: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Chooses the units to take from each layer so that all lose the same share of heads, and the
    same share of its columns, of which as many go as `need` parameters still want."""
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
