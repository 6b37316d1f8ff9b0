"""Makes models smaller: replaces blocks by compact ones, and prunes heads and FFN columns.

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

# What a new random block adds to the residual stream, as a part of what the family's own would: the
# model starts as if the block were left out, yet its weights have gradients.
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
    """Replaces the blocks at `layers` (from 0) by blocks of `shape`: returns (model, its config).

    Args:
        model: the model; if abstract (jax.ShapeDtypeStruct), so is the result; may be traced.
        family: the model's family.
        config: the model's config.
        layers: the blocks to replace.
        shape: the shape of the new blocks.
        init: `random`: drawn as in the family, but projections that write into the residual stream
            are `SMALL` times that; a slim block that ends in a norm keeps the old block's norms, so
            that the next block reads features of the usual scale.
            `pruned`: the norms and the most important heads and FFN columns of the old block. Only
            for full blocks: the output of a bottleneck includes its inner residual stream, for
            which no old block has weights.
        key: random key of new blocks; a value depends only on it and on the parameter's path.

    Raises UserError for an unknown layer or init, and if `shape` cannot be cut out of a block.
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
    """Removes the least important heads and FFN columns: returns (model, its config).

    Args:
        model: the model; if abstract, so is the result, and with `global`, where the loss of each
            layer is then unknown, every layer loses the same share.
        family: the model's family.
        config: the model's config.
        target: the minimal share of all parameters to remove; hardly more is removed.
        ranking: `global`: heads and columns of all layers are ranked together by the mean |w| of
            their weights, the L1 norm lost for each parameter saved, so that heads and columns are
            comparable although a head has many times the weights. `layer`: heads and columns are
            ranked within their layer, and every layer loses the same share of them, so that equal
            layers stay equal.

    Every layer keeps at least one head (GQA: one group) and one column. Raises UserError if the
    target cannot be reached so, and for an unknown ranking.
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
    """Makes the config of a model with these blocks; the list is empty if all have the family's
    normal shape."""
    own = all(block == config.own_shape for block in blocks)
    return dataclasses.replace(config, blocks=() if own else tuple(blocks))


class BlockStates(nnx.Module):
    """A model that stops after its blocks, without the decoder's last norm and the head; it has the
    parameters of a `heads.HeadedModel`."""

    def __init__(self, backbone: nnx.Module, head: nnx.Module):
        self.backbone = backbone
        self.head = head

    def __call__(
        self, batch: Batch, seed: Array | None = None, replaced_L: Array | None = None
    ) -> ModelOutput:
        """Runs the blocks: `hidden` has the embedding output and each block's output, without a
        last norm; there are no logits."""
        hidden, attention = self.backbone.states(batch, seed, replaced_L)
        return ModelOutput(hidden[-1], None, None, hidden, attention)


def block_states(model: Model) -> Model:
    """Makes a model that returns its blocks' outputs, with the same parameters (or abstract)."""

    def make(params):
        whole = nnx.merge(model.graphdef, params)
        graphdef, state = nnx.split(BlockStates(whole.backbone, whole.head))
        return Model(nnx.to_pure_dict(state), graphdef)

    return model.replace(graphdef=jax.eval_shape(make, model.params).graphdef)


def _changed(model: Model, whole: Model, change: Callable[..., Params], *inputs: Any) -> Model:
    """Fills the abstract model `whole` with `change` of the model's parameters; the result stays
    abstract if they are."""
    if _abstract(model):
        return whole.replace(params=jax.eval_shape(change, model.params, *inputs))
    return whole.replace(params=change(model.params, *inputs))


def _check_inside(shape: BlockShape, given: BlockShape, layer: int) -> None:
    """Raises UserError if a block of `shape` cannot be cut out of a block of shape `given`."""
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
    """Cuts a smaller block out of a block: its most important heads and columns, in their order.

    A key/value head keeps the best of the heads that share it, and is as important as it is
    together with these. Can be traced.
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
    """Finds the indices of the highest scores along the last axis, in ascending order."""
    return jnp.sort(jnp.argsort(scores, axis=-1, descending=True)[..., :count], axis=-1)


def _take(block: Params, shape: BlockShape, heads: Any, groups: Any, columns: Any) -> Params:
    """Selects heads, key/value heads and columns of a block."""
    inner = _inner(block)
    attention, mlp = dict(inner["attention"]), dict(inner["mlp"])

    def cut(part: Params, numbers: Any) -> Params:
        return {kind: _heads_of(x, shape.head_width, numbers) for kind, x in part.items()}

    for name, numbers in (("q", heads), ("k", groups), ("v", groups)):
        attention[name] = cut(attention[name], numbers)
        norm = attention.get(f"{name}_norm", {})
        if any(x.size != shape.head_width for x in norm.values()):  # of all heads at once
            attention[f"{name}_norm"] = cut(norm, numbers)
    rows = attention["o"]["kernel"]
    attention["o"] = attention["o"] | {"kernel": _heads_of(rows.T, shape.head_width, heads).T}
    for name in mlp.keys() - {"down"}:
        mlp[name] = {kind: value[..., columns] for kind, value in mlp[name].items()}
    mlp["down"] = mlp["down"] | {"kernel": mlp["down"]["kernel"][columns]}
    inner = inner | {"attention": attention, "mlp": mlp}
    return block | {"inner": inner} if "inner" in block else inner


def _heads_of(value: Any, width: int, numbers: Any) -> Any:
    """Selects the columns of heads from an array (..., heads x width)."""
    of_heads = value.reshape(*value.shape[:-1], -1, width)[..., numbers, :]
    return of_heads.reshape(*value.shape[:-1], -1)


def _quiet(block: Params) -> Params:
    """Scales a block's outputs into the residual stream by `SMALL`."""

    def scaled(linear: Params) -> Params:
        return linear | {"kernel": SMALL * linear["kernel"]}

    if "inner" in block:
        return block | {"up": scaled(block["up"])}
    quiet = dict(block)
    for part, out in (("attention", "o"), ("mlp", "down")):
        if norm := block.get(f"{part}_out_norm"):  # it would undo a factor before it
            less = {"scale": 0.0, "offset": 1.0 - SMALL}
            quiet[f"{part}_out_norm"] = {kind: SMALL * x - less[kind] for kind, x in norm.items()}
        else:
            quiet[part] = block[part] | {out: scaled(block[part][out])}
    return quiet


def _inner(block: Params) -> Params:
    """Returns the inner block of a bottleneck; any other block itself."""
    return block.get("inner", block)


def _abstract(model: Model) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model.params))


def _head(model: Model) -> str:
    kind = type(nnx.merge(model.graphdef, model.params).head)
    return next(name for name, each in HEADS.items() if each is kind)


@dataclasses.dataclass(frozen=True)
class Units:
    """The importance scores of one layer's heads, or of its columns."""

    scores: np.ndarray  # of each: mean |w| of its weights
    cost: int  # parameters of each, biases too

    @property
    def spare(self) -> int:
        """Counts the units that can be removed: all but one."""
        return len(self.scores) - 1


def head_norms(attention: Params, shape: BlockShape) -> tuple[Array, Array]:
    """Computes the L1 norm of each head's weights, (num_kv_heads, heads that share one), and of
    each key/value head's weights, (num_kv_heads,)."""
    G, K = shape.num_kv_heads, shape.head_width
    into = {name: abs(attention[name]["kernel"]).sum(0).reshape(G, -1) for name in "qkv"}
    out = abs(attention["o"]["kernel"]).sum(1).reshape(G, -1)
    heads = (into["q"] + out).reshape(G, -1, K).sum(-1)
    return heads, (into["k"] + into["v"]).sum(-1)


def column_norms(mlp: Params) -> Array:
    """Computes the L1 norm of the weights of each FFN column, (ffn_width,)."""
    into = sum(abs(mlp[name]["kernel"]).sum(0) for name in mlp if name != "down")
    return into + abs(mlp["down"]["kernel"]).sum(1)


def score_units(block: Params, shape: BlockShape) -> tuple[Units, Units]:
    """Scores heads and columns of a full block; all scores are equal if it is abstract."""
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


def take_evenly(
    layers: list[tuple[Units, Units]], need: int
) -> list[tuple[np.ndarray, np.ndarray]]:
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
