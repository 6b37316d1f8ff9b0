"""Converts HF's config.json and tensors to kd_jax's configs and parameters, and back, by family.

A family is one file of kd_jax/models named after HF's `model_type`, with a `FAMILY`: two tables,
of config.json's keys and of the tensors' names, each of which works both ways, and a few functions
for everything else.
"""

import dataclasses
import functools
import json
import re
import typing
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from kd_jax import axes, plugins, tensors
from kd_jax.errors import UserError
from kd_jax.models import embedder
from kd_jax.models.config_json import (
    NOT_NEGATIVE,
    RATE,
    SIZE,
    Fields,
    label_keys,
    read_labels,
    renamed,
)
from kd_jax.models.heads import HeadedModel
from kd_jax.models.layers import activation
from kd_jax.models.model_config import DecoderConfig, Run, read_blocks, write_blocks
from kd_jax.precision import Policy
from kd_jax.types import Array, Model, ModelSpec, Params

# How parameters are split over the mesh (kd_jax/axes.py), first match wins. Linear kernels are
# gathered over `fsdp` along their rows; over `model` heads and FFN columns are split (Megatron's
# columns of what makes them, rows of what reads them). Tables over the vocabulary are split by ids.
# Small tables and vectors are on every device.
TABLES = r"(^|/)(tokens/embedding|head/unembed|head/rest/embedding)$"
TABLE_OF_NUMBERS = r"(^|/)head/bias$"
PARTITION = (
    (r"^objective/", PartitionSpec()),
    (TABLES, PartitionSpec(axes.VOCAB, None)),
    (TABLE_OF_NUMBERS, PartitionSpec(axes.VOCAB)),
    (r"embedding$", PartitionSpec()),
    (r"(attention/[qkv]|mlp/(up|gate))/kernel$", PartitionSpec(axes.FSDP, axes.MODEL)),
    (r"(attention/[qkv]|mlp/(up|gate))/bias$", PartitionSpec(axes.MODEL)),
    (r"(attention/o|mlp/down)/kernel$", PartitionSpec((axes.MODEL, *axes.FSDP), None)),
    (r"kernel$", PartitionSpec(axes.FSDP, None)),
    (r"(bias|scale|offset)$", PartitionSpec()),
)


# HF has no classes for models whose blocks differ. Ours are in a file that goes along with the
# weights, named by config.json's auto_map.
PYTORCH = Path(__file__).with_name("pytorch")
_UNEQUAL = ("kd_jax_decoder", "kd_jax_encoder")
_OLDER = {"clm": "KDJaxForCausalLM", "none": "KDJaxModel"}  # of all decoders, in older exports
# How HF's names of classes end, by head.
_SUFFIXES = {
    "mlm": "ForMaskedLM",
    "clm": "ForCausalLM",
    "classification": "ForSequenceClassification",
    "span": "ForQuestionAnswering",
    "embedding": "",
    "none": "",
}

# Keys of a config.json that are not true of a model written from it.
_NOT_KEPT = (
    "_name_or_path",
    "torch_dtype",
    "transformers_version",
    "auto_map",
    "base_model_type",
    "blocks",
)

# BERT's names of sizes, which `architecture` may have in every family.
SIZES = {
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_width",
    "max_position_embeddings": "max_positions",
}
_KINDS = {int: SIZE, float: NOT_NEGATIVE}  # of a config's fields


class Rule(NamedTuple):
    """A rule: the name of one HF tensor, and the parameters in it, joined along their last axis.

    `hf` lacks the base model's prefix ("bert."); a path of `ours` is like
    "backbone/blocks/0/attention/q/kernel". With `transpose` HF's layout is (out, in). A `tied`
    tensor is a second name of parameters: files may hold it, but need not. A `base` tensor is one
    of HF's base model. If two other rules name one parameter, the first that a file has is read,
    and both are written.
    """

    hf: str
    ours: tuple[str, ...]
    transpose: bool = False
    tied: bool = False
    base: bool = False


def classes(stem: str, *heads: str) -> dict[str, str]:
    """Makes the names of HF's classes for these heads of a family, and for its base model."""
    return {head: stem + _SUFFIXES[head] for head in heads} | {"none": f"{stem}Model"}


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """The description of one HF model_type.

    `keys` maps a key of config.json to (the fields of our config that it sets, HF's default), or to
    (fields, default, the `kind` of `Fields.get`) if the field's type does not determine it.

    `base` and `head` map modules of HF's base model and of its heads to ours; HF may keep several
    of ours in one ("attention/q,k,v"); "#" stands for a number. A row covers all parameters of a
    module, or a single tensor by its full name ("head/bias").
    """

    name: str  # HF's model_type
    prefix: str  # of the base model's tensors in a checkpoint with a head
    architectures: dict[str, str]  # head -> HF class; every family has an embedding head
    backbone: type[nnx.Module]  # made from a config, of the type that its constructor names
    keys: dict[str, tuple]
    base: dict[str, str]
    head: dict[str, str]
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)  # of keys -> HF's own name
    only: dict[str, tuple] = dataclasses.field(default_factory=dict)  # key -> values supported
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields that no key sets
    # What no table says. Reads more fields, given those of `keys`; writes the keys that it read:
    read: Callable[[Fields, dict], dict] = lambda fields, values: {}
    write: Callable[[Any], dict] = lambda config: {}
    rules: Callable[[Any, str], list[Rule]] = lambda config, head: []  # (config, head) -> tensors
    conv1d: str = "(?!)"  # regex of the modules of `base` whose kernels are (in, out) in HF too
    ignore: tuple[str, ...] = ()  # regexes of HF tensors that no model here uses
    common: str = "(?!)"  # regex of the tensors that several of HF's heads have
    # (path, drawn value, config) -> value: where HF's start is not N(0, initializer_range)
    adjust: Callable[[str, Array, Any], Array] = lambda path, value, config: value

    def __post_init__(self):
        # HF has no class of its own for it: the vectors are made behind the base model.
        every = self.architectures | {"embedding": self.architectures["none"]}
        object.__setattr__(self, "architectures", every)

    @property
    def config(self) -> type:
        """Returns the type of the backbone's config."""
        return typing.get_type_hints(self.backbone.__init__)["config"]


def to_hf(family: Family, config: Any) -> dict:
    """Writes the keys of config.json that the family reads."""
    keys = {key: getattr(config, row[0].split()[0]) for key, row in family.keys.items()}
    return keys | family.write(config)


def read(
    hf_json: dict, where: str = "config.json", changes: Mapping = MappingProxyType({})
) -> tuple[Family, Any]:
    """Reads a config.json: (family, config).

    `changes` replace its keys, and may use BERT's names of `SIZES` for every family. Messages call
    the file `where`. Raises UserError for an unknown model_type or value.
    """
    try:
        return _read(hf_json, changes)
    except UserError as error:
        reason = str(error)
        own = "config.json" in reason
        raise UserError(
            reason.replace("config.json", where, 1) if own else f"{where}: {reason}"
        ) from None


def _read(hf_json: dict, changes: Mapping) -> tuple[Family, Any]:
    both = {**hf_json, **changes}
    kind = both.get("model_type")
    unequal = kind in _UNEQUAL
    key = "base_model_type" if unequal else "model_type"
    name, have = both.get(key), plugins.names("models", "FAMILY")
    if name not in have:
        raise UserError(f"config.json: unknown {key} {name!r}; have: {', '.join(have)}")
    family = plugins.load("models", name, "FAMILY").FAMILY
    sizes = {
        size: key
        for key, row in family.keys.items()
        for size in SIZES
        if SIZES[size] in row[0].split()
    }
    fields = Fields(renamed(hf_json, family.aliases) | renamed(changes, sizes))
    config = _config(family, fields)
    if unequal and kind != config.unequal:
        raise UserError(f"config.json: {name} has no blocks of its own shapes, as {kind} has")
    activation(config.activation)
    config.check_own()
    if unequal:
        config = dataclasses.replace(config, blocks=read_blocks(both.get("blocks")))
    return family, dataclasses.replace(config, hf_json=json.dumps(fields.json))


def _config(family: Family, fields: Fields) -> Any:
    """Makes the config of a family's model from the keys of config.json."""
    supported = {"quantization_config": (None,), "pruned_heads": (None, {})} | family.only
    if issubclass(family.config, DecoderConfig):  # embedders made of decoders may see all tokens
        supported = {"is_causal": (True, None)} | supported
    for key, values in supported.items():
        fields.only(key, *values)
    values, hints = dict(family.fixed), typing.get_type_hints(family.config)
    for key, (names, default, *given) in family.keys.items():
        own = names.split()
        usual = RATE if own[0].endswith("dropout") else _KINDS.get(hints[own[0]], hints[own[0]])
        value = fields.get(key, *given or [usual], default)
        values |= dict.fromkeys(own, value)
    if "labels" in hints:
        values["labels"] = read_labels(fields)
    return family.config(**values | family.read(fields, values))


def write(family: Family, config: Any, head: str) -> dict:
    """Makes the config.json of a float32 model; the original's unread keys are kept.

    A model whose blocks differ gets a model_type of kd_jax, with a list of the blocks.
    """
    kept = json.loads(config.hf_json)
    for key in _NOT_KEPT:
        kept.pop(key, None)
    if head in ("classification", "span"):
        kept = label_keys(kept, config.labels if head == "classification" else None)
    kept |= to_hf(family, config)
    kept |= {
        "architectures": [family.architectures[head]],
        "model_type": family.name,
        "dtype": "float32",
    }
    if config.blocks:
        blocks = write_blocks(config.blocks)
        kept |= {"model_type": config.unequal, "base_model_type": family.name, "blocks": blocks}
        own = {head: f"KDJax{name}" for head, name in family.architectures.items()}
        auto = {f"AutoModel{_SUFFIXES[head]}": name for head, name in own.items()}
        auto["AutoConfig"] = own["none"].removesuffix("Model") + "Config"
        auto = {kind: f"modeling_kd_jax.{name}" for kind, name in auto.items()}
        kept |= {"architectures": [own[head]], "auto_map": auto}
    return kept


def code_of(hf_json: dict) -> Path | None:
    """Finds kd_jax's modeling file to which a config.json refers; None if HF has a class."""
    if "auto_map" not in hf_json:
        return None
    return PYTORCH / f"{hf_json['auto_map']['AutoConfig'].partition('.')[0]}.py"


def equal(family: Family, config: Any) -> Any:
    """Removes `blocks` from a config if all are equal and HF's config.json can describe them: HF's
    Llama may have fewer heads, but a GPT-2's heads must fill the width."""
    blocks = config.blocks
    if len(set(blocks)) != 1 or blocks[0].kind != "full":
        return config
    sizes = vars(config).keys() & {"num_heads", "num_kv_heads", "head_width", "ffn_width"}
    alike = dataclasses.replace(
        config, blocks=(), **{name: getattr(blocks[0], name) for name in sizes}
    )
    try:
        _, back = read(write(family, alike, "none"))
    except UserError:
        return config
    return alike if back.own_shape == blocks[0] else config


def head_of(family: Family, hf_json: dict) -> str | None:
    """Finds the head that `architectures` in config.json names; None if no class is known."""
    named = hf_json.get("architectures") or []
    named = {*named, *(name.removeprefix("KDJax") for name in named)}
    heads = [*family.architectures.items(), *_OLDER.items()]
    return next((head for head, name in heads if name in named), None)


def check_head(family: Family, head: str) -> None:
    """Raises UserError for a head that the family does not have."""
    if head not in family.architectures:
        have = ", ".join(family.architectures)
        raise UserError(f"{family.name} has no head {head!r}; have: {have}")


def abstract(family: Family, config: Any, head: str, policy: Policy) -> Model:
    """Makes a model with jax.ShapeDtypeStructs as parameters. UserError for an unknown head."""
    check_head(family, head)
    model = _abstract(family, dataclasses.replace(config, policy=policy), head)
    return jax.tree.map(lambda shape: shape, model)  # dicts of the caller's own


@functools.lru_cache(64)  # a model of many layers takes a fifth of a second
def _abstract(family: Family, config: Any, head: str) -> Model:
    def make() -> Model:
        module = HeadedModel(family.backbone(config), config, head)
        graphdef, state = nnx.split(module)
        return Model(params=nnx.to_pure_dict(state), graphdef=graphdef)

    return jax.eval_shape(make)


def build(family: Family, config: Any, head: str, policy: Policy, key: Array) -> Model:
    """Makes a model with random parameters, drawn as HF does. Can be jitted (over `key`)."""
    model = abstract(family, config, head, policy)
    return model.replace(params=draw(family, config, model.params, key))


def draw(family: Family, config: Any, shapes: Params, key: Array) -> Params:
    """Draws parameters of these shapes: matrices N(0, initializer_range), biases and offsets of
    scales 0, scales 1; the embedding of the padding token is 0.

    A parameter's value depends on `key` and its path alone, not on what else the model has.
    """

    values: dict[str, Array] = {}
    alike: dict[tuple[int, ...], list[str]] = {}
    for path, leaf in flatten(shapes).items():
        if path.endswith(("bias", "offset")):
            values[path] = jnp.zeros(leaf.shape)
        elif path.endswith("scale"):
            values[path] = jnp.ones(leaf.shape)
        else:
            alike.setdefault(leaf.shape, []).append(path)
    # All matrices of one shape in one call, with the values of single calls: a program with a call
    # for each takes long to compile.
    for shape, group in alike.items():
        hashes = jnp.array([zlib.crc32(path.encode()) for path in group], jnp.uint32)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, hashes)
        normal = jax.vmap(functools.partial(jax.random.normal, shape=shape))(keys)
        for path, value in zip(group, config.initializer_range * normal, strict=True):
            if path == "backbone/tokens/embedding" and config.pad_id is not None:
                value = value.at[config.pad_id].set(0.0)
            values[path] = family.adjust(path, value, config)
    return unflatten(values, shapes)


def flatten(params: Params) -> dict[str, Any]:
    """Maps the paths of a tree to its leaves: {"backbone/tokens/embedding": ..., ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any], like: Params) -> Params:
    """Makes a tree shaped like `like` from the leaves of `flat`, which may have more."""
    leaves = [flat[path] for path in flatten(like)]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), leaves)


def with_rows(params: Params, rows: int) -> Params:
    """Pads tables over the vocabulary with rows of zeros, or cuts them."""

    def changed(path: str, leaf: Any) -> Any:
        is_table = re.search(TABLES, path) or re.search(TABLE_OF_NUMBERS, path)
        return tensors.with_rows(leaf, rows) if is_table else leaf

    return unflatten({path: changed(path, leaf) for path, leaf in flatten(params).items()}, params)


def stack_blocks(params: Params, runs: Sequence[Run]) -> Params:
    """Stacks the parameters of equal blocks in runs of repeated patterns, layers on the first axis;
    a run of one layer stays as it is. Without `runs` nothing changes."""
    if not runs:
        return params
    blocks, found = params["backbone"]["blocks"], {}
    for run in runs:
        for number in range(run.period):
            own = [blocks[layer] for layer in run.layers(number)]
            joined = jax.tree.map(lambda *parts: tensors.stacked(parts), *own)
            found[len(found)] = own[0] if run.count == 1 else joined
    return params | {"backbone": params["backbone"] | {"blocks": found}}


def spec(config: Any) -> ModelSpec:
    """Summarizes a model for objectives."""
    heads = {config.shape(layer).num_heads for layer in range(config.num_layers)}
    num_heads, causal = heads.pop() if len(heads) == 1 else 0, isinstance(config, DecoderConfig)
    vector_width = config.dimensions or embedder.whole_width(config)
    return ModelSpec(
        config.width, config.num_layers, num_heads, causal, config.biased, vector_width
    )
