"""What a family file defines, and how models are made from it.

A family is one file of kd_jax/models named after HF's `model_type`, with a `FAMILY`: how to read
and write its config.json, which backbone it runs on, and the table of its tensors' names.
"""

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from kd_jax import plugins
from kd_jax.errors import UserError
from kd_jax.models import shapes
from kd_jax.models.decoder_config import DecoderConfig
from kd_jax.models.heads import HeadedModel
from kd_jax.models.labels import label_keys
from kd_jax.models.layers import activation
from kd_jax.models.shapes import BlockShape
from kd_jax.precision import Policy
from kd_jax.ranges import Real, Whole
from kd_jax.types import Array, Model, ModelSpec, Params

# How parameters are split over the mesh axis `fsdp`, first match wins. Embeddings are split on
# their width, since vocabularies are rarely divisible; vectors are small and replicated.
PARTITION = (
    (r"(embedding|unembed)$", PartitionSpec(None, "fsdp")),
    (r"kernel$", PartitionSpec("fsdp", None)),
    (r"(bias|scale)$", PartitionSpec()),
)


# The model_type of decoders whose blocks differ. HF has no class for them: ours are in a file that
# goes along with the weights.
UNEQUAL = "kd_jax_decoder"
MODELING_FILE = Path(__file__).with_name("pytorch") / "modeling_kd_jax.py"
_CLASSES = {"clm": "KDJaxForCausalLM", "none": "KDJaxModel"}
_AUTO_MAP = {
    auto: f"{MODELING_FILE.stem}.{name}"
    for auto, name in {
        "AutoConfig": "KDJaxConfig",
        "AutoModel": _CLASSES["none"],
        "AutoModelForCausalLM": _CLASSES["clm"],
    }.items()
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


SIZE = Whole(least=1)
RATE = Real(least=0, below=1)  # of dropout
NOT_NEGATIVE = Real(least=0)


class Rule(NamedTuple):
    """One HF tensor and the parameters it holds, joined along their last axis.

    `hf` lacks the base model's prefix ("bert."); a path of `ours` is like
    "backbone/blocks/0/attention/q/kernel". With `transpose` HF's layout is (out, in). A `tied`
    tensor is another name of parameters that have one already: some files hold it, none need to.
    A tensor of a head is `base` where HF has it in the base model (BERT's pooler).
    Two rules may name one parameter without that: the first that a file has is read, both are
    written.
    """

    hf: str
    ours: tuple[str, ...]
    transpose: bool = False
    tied: bool = False
    base: bool = False


def linear(hf: str, *ours: str, bias: bool = True) -> list[Rule]:
    """Lists the tensors of a torch Linear: weight (out, in) and, mostly, a bias."""
    rules = [Rule(f"{hf}.weight", tuple(f"{path}/kernel" for path in ours), transpose=True)]
    return rules + ([Rule(f"{hf}.bias", tuple(f"{path}/bias" for path in ours))] if bias else [])


def conv1d(hf: str, *ours: str) -> list[Rule]:
    """Lists the tensors of GPT-2's Conv1D: weight (in, out) and bias."""
    return [rule._replace(transpose=False) for rule in linear(hf, *ours)]


def norm(hf: str, ours: str, bias: bool = True) -> list[Rule]:
    """Lists the tensors of a layer norm: weight and bias; an RMS norm has no bias."""
    rules = [Rule(f"{hf}.weight", (f"{ours}/scale",))]
    return rules + ([Rule(f"{hf}.bias", (f"{ours}/bias",))] if bias else [])


def embedding(hf: str, ours: str) -> list[Rule]:
    """Lists the tensor of an embedding table."""
    return [Rule(f"{hf}.weight", (f"{ours}/embedding",))]


def block_rules(
    shape: BlockShape, hf: str, ours: str, own: Callable[[str, str], list[Rule]]
) -> list[Rule]:
    """Lists the tensors of a decoder's block: `own(hf, ours)` are those of a block of the family's
    own kind; a bottleneck, which HF does not have, has one at `hf`.inner between two torch
    Linears."""
    if shape.kind != "bottleneck":
        return own(hf, ours)
    inner = own(f"{hf}.inner", f"{ours}/inner")
    return [*linear(f"{hf}.down", f"{ours}/down"), *inner, *linear(f"{hf}.up", f"{ours}/up")]


@dataclasses.dataclass(frozen=True)
class Family:
    """One HF model_type."""

    name: str  # HF's model_type
    prefix: str  # of the base model's tensors in a checkpoint with a head
    architectures: dict[str, str]  # head -> HF class; its keys are the heads there are
    backbone: Callable[[Any], nnx.Module]  # config -> module
    from_hf: Callable[["Fields"], Any]  # config.json -> config
    to_hf: Callable[[Any], dict]  # config -> the keys of config.json that from_hf reads
    rules: Callable[[Any, str], list[Rule]]  # (config, head) -> every tensor
    ignore: tuple[str, ...] = ()  # regexes of HF tensors that no model here uses
    # (path, drawn value, config) -> value: HF's initialisation besides N(0, initializer_range)
    adjust: Callable[[str, Array, Any], Array] = lambda path, value, config: value


class Fields:
    """A config.json being read: typed values, HF's defaults, refusals that name the key."""

    def __init__(self, hf_json: dict, where: str = "config.json"):
        self.json = hf_json
        self.where = where  # for messages

    def part(self, key: str | None) -> "Fields":
        """Opens the object at `key`; an empty one where it is missing, null or no key is given."""
        found = self.get(key, dict | None, None) if key else None
        return Fields(found or {}, f"{self.where}: {key}" if found else self.where)

    def rename(self, **names: str) -> None:
        """Renames keys, old=new, as HF does; raises UserError where both are there and differ."""
        for key, own in names.items():
            if key in self.json and self.json.get(own, self.json[key]) != self.json[key]:
                raise UserError(f"config.json: {key} and {own} are one, and differ; keep {own}")
        self.json = {names.get(key, key): value for key, value in self.json.items()}

    def get(self, key: str, kind: Any, default: Any) -> Any:
        """Reads the value of `key`, which must be a `kind`: a type, a union of types, or the range
        that it lies in; null where that is the default."""
        value = self.json.get(key, default)
        if kind in (float, float | None):
            kind = Real()
        if isinstance(kind, Real):
            kind = dataclasses.replace(kind, default=default)
            value = kind.check(value, f"{self.where}: {key}")
            return value if value is None or isinstance(kind, Whole) else float(value)
        if isinstance(value, kind) and (kind in (bool, bool | None) or not isinstance(value, bool)):
            return value
        name = getattr(kind, "__name__", str(kind))
        raise UserError(f"{self.where}: {key} should be {name}, not {value!r}")

    def only(self, key: str, *supported: Any) -> None:
        """Refuses a key that changes the model in a way that kd_jax does not have.

        The first of `supported` is the default of a missing key.
        """
        value = self.json.get(key, supported[0])
        if value not in supported:
            have = ", ".join(map(repr, supported))
            raise UserError(f"{self.where}: {key}={value!r} is not supported; have: {have}")


def read(hf_json: dict, where: str = "config.json") -> tuple[Family, Any]:
    """Reads a config.json, which messages call `where`: (family, config). Raises UserError on an
    unknown model_type or value."""
    try:
        return _read(hf_json)
    except UserError as error:
        reason = str(error)
        own = "config.json" in reason
        raise UserError(
            reason.replace("config.json", where, 1) if own else f"{where}: {reason}"
        ) from None


def _read(hf_json: dict) -> tuple[Family, Any]:
    unequal = hf_json.get("model_type") == UNEQUAL
    key = "base_model_type" if unequal else "model_type"
    name, have = hf_json.get(key), plugins.names("models", "FAMILY")
    if name not in have:
        raise UserError(f"config.json: unknown {key} {name!r}; have: {', '.join(have)}")
    family = plugins.load("models", name, "FAMILY").FAMILY
    fields = Fields(hf_json)
    fields.only("quantization_config", None)
    fields.only("pruned_heads", None, {})
    config = family.from_hf(fields)
    if unequal and not isinstance(config, DecoderConfig):
        raise UserError(f"config.json: {name} has no blocks of its own shapes, as {UNEQUAL} has")
    activation(config.activation)
    if config.width % config.num_heads:
        raise UserError(
            f"config.json: {config.num_heads} attention heads do not divide the width "
            f"{config.width}"
        )
    if isinstance(config, DecoderConfig):
        config.check_own()
    if unequal:
        config = dataclasses.replace(config, blocks=shapes.read(hf_json.get("blocks")))
    return family, dataclasses.replace(config, hf_json=json.dumps(fields.json))


def write(family: Family, config: Any, head: str) -> dict:
    """Makes the config.json of a float32 model; keys of the original that are not read are kept.

    A decoder with blocks of their own shapes is a `kd_jax_decoder`, which lists them.
    """
    kept = json.loads(config.hf_json)
    for key in _NOT_KEPT:
        kept.pop(key, None)
    if head in ("classification", "span"):
        kept = label_keys(kept, config.labels if head == "classification" else None)
    kept |= family.to_hf(config)
    kept |= {
        "architectures": [family.architectures[head]],
        "model_type": family.name,
        "dtype": "float32",
    }
    if getattr(config, "blocks", ()):
        blocks = shapes.write(config.blocks)
        kept |= {"model_type": UNEQUAL, "base_model_type": family.name, "blocks": blocks}
        kept |= {"architectures": [_CLASSES[head]], "auto_map": _AUTO_MAP}
    return kept


def equal(family: Family, config: Any) -> Any:
    """The config without `blocks` where all are alike and the family's own config.json can say so:
    a Llama with fewer heads can be one of HF's, a GPT-2's heads have to fill the width."""
    blocks = getattr(config, "blocks", ())
    if len(set(blocks)) != 1 or blocks[0].kind != "full":
        return config
    sizes = ("num_heads", "num_kv_heads", "head_width", "ffn_width")
    alike = dataclasses.replace(
        config, blocks=(), **{name: getattr(blocks[0], name) for name in sizes}
    )
    try:
        _, back = read(write(family, alike, "none"))
    except UserError:
        return config
    return alike if back.own_shape == blocks[0] else config


def head_of(family: Family, hf_json: dict) -> str | None:
    """Finds the head that `architectures` of config.json names; None where no class is known."""
    named = hf_json.get("architectures") or []
    heads = [*family.architectures.items(), *_CLASSES.items()]
    return next((head for head, name in heads if name in named), None)


def check_head(family: Family, head: str) -> None:
    """Raises UserError on a head that the family does not have."""
    if head not in family.architectures:
        have = ", ".join(family.architectures)
        raise UserError(f"{family.name} has no head {head!r}; have: {have}")


def abstract(family: Family, config: Any, head: str, policy: Policy) -> Model:
    """Makes a model with jax.ShapeDtypeStructs for parameters. UserError on an unknown head."""
    check_head(family, head)
    config = dataclasses.replace(config, policy=policy)

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
    """Draws parameters of these shapes: matrices N(0, initializer_range), biases 0, scales 1.

    A parameter's value depends on `key` and its path alone, not on what else the model has.
    """

    values: dict[str, Array] = {}
    alike: dict[tuple[int, ...], list[str]] = {}
    for path, leaf in flatten(shapes).items():
        if path.endswith("bias"):
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
            values[path] = family.adjust(path, value, config)
    return unflatten(values, shapes)


def flatten(params: Params) -> dict[str, Any]:
    """Lists the leaves by path: {"backbone/tokens/embedding": ..., ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any], like: Params) -> Params:
    """Fills the tree `like` with the leaves of `flat`, which may have more."""
    leaves = [flat[path] for path in flatten(like)]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), leaves)


def spec(config: Any) -> ModelSpec:
    """Sums up the model for objectives: width, layers, heads, causal or not."""
    causal, num_heads = isinstance(config, DecoderConfig), config.num_heads
    if causal:
        heads = {config.shape(layer).num_heads for layer in range(config.num_layers)}
        num_heads = heads.pop() if len(heads) == 1 else 0
    return ModelSpec(config.width, config.num_layers, num_heads, causal)
