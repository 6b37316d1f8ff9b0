"""Reads and writes the files by which sentence-transformers describes an embedder: what follows the
base model, and how its texts are read.

modules.json lists the modules in their order: the transformer, whose files are HF's, the pooling,
dense layers, and the normalization; all but the first may have a folder. A folder without it is a
base model's alone, to which mean pooling and normalization are added.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_jax.errors import UserError
from kd_jax.models import weight_files
from kd_jax.models.config_json import SIZE, Fields
from kd_jax.models.model_config import Dense, Texts
from kd_jax.models.weight_files import Stored
from kd_jax.ranges import Choice, Whole, settings

MODULES = "modules.json"
TENSORS = "dense."  # how the names of dense layers' tensors begin in kd_jax/models/hf.py
IDENTITY = "torch.nn.modules.linear.Identity"
# Our names of activations -> PyTorch's.
_TYPES = {
    "linear": IDENTITY,
    "tanh": "torch.nn.modules.activation.Tanh",
    "relu": "torch.nn.modules.activation.ReLU",
    "gelu": "torch.nn.modules.activation.GELU",
    "silu": "torch.nn.modules.activation.SiLU",
}
# What config.MODEL.embedding may say in place of a folder.
SETTINGS = dict(
    pooling=Choice("mean", "cls", "last", "max"),
    dense=Whole(least=0, default=0),  # width of a layer behind the pooling; 0: none
    activation=Choice(*_TYPES),  # of that layer
    normalize=True,
    dimensions=Whole(least=0, default=0),  # 0: all
)
# Our name of a pooling -> its name in sentence-transformers, and its key in versions below 6.
_POOLINGS = {
    "cls": ("cls", "pooling_mode_cls_token"),
    "max": ("max", "pooling_mode_max_tokens"),
    "mean": ("mean", "pooling_mode_mean_tokens"),
    "last": ("lasttoken", "pooling_mode_lasttoken"),
}
_KEYS = {key: name for name, key in _POOLINGS.values()} | {
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
_VECTORS = ("pooling", "dense", "normalize", "dimensions")  # of a config: what makes vectors


def describes(folder: Path) -> bool:
    """Tells whether a folder is an embedder's: whether its modules.json has a pooling."""
    return any(kind == "Pooling" for kind, _ in _modules(Path(folder)))


def vectors(config: Any) -> tuple:
    """Lists the settings of a config on which its vectors depend."""
    return tuple(getattr(config, name) for name in _VECTORS)


def whole_width(config: Any) -> int:
    """Returns the dimensions of a config's vectors before they are cut."""
    return config.dense[-1].width if config.dense else config.width


def configured(
    config: Any, folder: Path | None, like: Any, section: Mapping | None, key: str
) -> Any:
    """Adds the settings of an embedding head to a model's config.

    Args:
        config: the model's config.
        folder: of the model's checkpoint, which has the settings; None for a model without one.
        like: config of the model whose settings one without a checkpoint has, if any.
        section: what replaces these: keys of `SETTINGS`.
        key: the section's place in the config, for messages.

    Raises UserError for modules, poolings and settings that are not implemented.
    """
    if folder is not None:
        config = read(config, folder)
    elif like is not None:
        own = {name: getattr(like, name) for name in (*_VECTORS, "texts")}
        config = dataclasses.replace(config, **own)
    found = settings(section, SETTINGS, key)
    given = {name: found[name] for name in section or ()}
    activation = given.pop("activation", "linear")
    if "dense" in given:
        given["dense"] = (Dense(given["dense"], activation),) if given["dense"] else ()
    elif activation != "linear":
        raise UserError(f"config.{key}.activation is that of config.{key}.dense; set that as well")
    config = dataclasses.replace(config, **given)
    if config.dimensions > (most := whole_width(config)):
        raise UserError(f"config.{key}.dimensions={config.dimensions}: vectors have {most} only")
    return config


def read(config: Any, folder: Path) -> Any:
    """Adds the settings of a folder to its model's config. Raises UserError as `configured`."""
    folder, found = Path(folder), {}
    modules = _modules(folder)
    kinds = [kind for kind, _ in modules]
    wanted = ["Transformer", "Pooling", *["Dense"] * kinds.count("Dense"), "Normalize"]
    if modules and kinds != wanted[: len(kinds)] or len(kinds) == 1:
        raise UserError(
            f"{folder / MODULES}: has {', '.join(kinds)}; an embedder here has Transformer, "
            f"Pooling, any Dense, and Normalize or not, in this order"
        )
    if modules:
        if modules[0][1] != folder:
            raise UserError(
                f"{folder / MODULES}: the transformer is in {modules[0][1].name}; it should be in "
                f"the folder itself"
            )
        found["pooling"] = _pooling(
            _fields(modules[1][1] / "config.json", needed=True), config.width
        )
        found["normalize"] = kinds[-1] == "Normalize"
        dense, width = [], config.width
        for kind, place in modules[2:]:
            fields = _fields(place / "config.json", needed=kind == "Dense")
            if kind == "Normalize":
                _only_vectors(fields)
            else:
                dense.append(_dense(fields, width))
                width = dense[-1].width
        found["dense"] = tuple(dense)
    about = _fields(folder / "config_sentence_transformers.json")
    about.only("model_type", "SentenceTransformer", None)
    if modules:
        found["dimensions"] = about.get("truncate_dim", SIZE, None) or 0
    return dataclasses.replace(config, **found, texts=_texts(about, folder))


def stored(folder: Path, config: Any) -> dict[str, Stored]:
    """Maps the tensors of a folder's dense layers, "dense.0.linear.weight" ...; none if the folder
    does not describe the config's layers."""
    if not config.dense or read(config, folder).dense != config.dense:
        return {}
    places = [place for kind, place in _modules(Path(folder)) if kind == "Dense"]
    return {
        f"{TENSORS}{i}.{name}": tensor
        for i, place in enumerate(places)
        for name, tensor in weight_files.read(place).items()
    }


def write(folder: Path, config: Any) -> None:
    """Writes all files but the tensors to a model's folder, as every version of the library reads
    them."""
    folder = Path(folder)
    kinds = ["Transformer", "Pooling", *["Dense"] * len(config.dense)]
    kinds += ["Normalize"] if config.normalize else []
    places = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    _write(
        folder / MODULES,
        [
            {
                "idx": i,
                "name": str(i),
                "path": place,
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, (kind, place) in enumerate(zip(kinds, places, strict=True))
        ],
    )
    chosen = _POOLINGS[config.pooling][1]
    modes = {key: key == chosen for key in _KEYS}
    width = config.width
    _write(
        folder / places[1] / "config.json",
        {"word_embedding_dimension": width} | modes | {"include_prompt": True},
    )
    for i, each in enumerate(config.dense):
        _write(
            dense_folder(folder, i) / "config.json",
            {
                "in_features": width,
                "out_features": each.width,
                "bias": each.bias,
                "activation_function": _TYPES[each.activation],
            },
        )
        width = each.width
    texts = config.texts
    about = {
        "model_type": "SentenceTransformer",
        "prompts": dict(texts.prompts),
        "default_prompt_name": texts.default_prompt,
        "similarity_fn_name": texts.similarity,
    }
    about |= {"truncate_dim": config.dimensions} if config.dimensions else {}
    _write(folder / "config_sentence_transformers.json", about)
    most = min(texts.max_tokens or config.max_tokens, config.max_tokens)
    reading = {"max_seq_length": most, "do_lower_case": False}
    _write(folder / "sentence_bert_config.json", reading)


def dense_folder(folder: Path, number: int) -> Path:
    """Returns the folder that `write` gives to a dense layer, counted from 0."""
    return folder / f"{2 + number}_Dense"


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """Lists the modules of a folder: (class, folder); [] without modules.json."""
    path = folder / MODULES
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        each = [(str(one["type"]), folder / one["path"]) for one in found]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no list of modules ({error}); download it again") from None
    for kind, place in each:
        if not kind.startswith("sentence_transformers."):
            raise UserError(f"{path}: {kind} is code of the model's own, which is never run")
        if not place.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path}: {place} is not in the model's folder")
    return [(kind.rpartition(".")[2], place) for kind, place in each]


def _fields(path: Path, needed: bool = False) -> Fields:
    """Opens a JSON file; an empty one if it is missing, and not needed."""
    if not path.exists():
        if needed:
            raise UserError(f"{path}: missing, though {MODULES} names it; download it again")
        return Fields({}, str(path))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; download it again")
    return Fields(found, str(path))


def _pooling(fields: Fields, width: int) -> str:
    """Reads the pooling of hidden states of this width."""
    fields.only("include_prompt", True)
    for key in ("word_embedding_dimension", "embedding_dimension"):
        _same(fields, key, fields.get(key, SIZE, width), width)
    older = [name for key, name in _KEYS.items() if fields.get(key, bool, False)]
    named = fields.get("pooling_mode", str | list, older or "mean")
    named = [named] if isinstance(named, str) else named
    ours = {theirs: own for own, (theirs, _) in _POOLINGS.items()}
    if len(named) != 1 or named[0] not in ours:
        raise UserError(
            f"{fields.where}: pooling {' and '.join(map(str, named))} is not supported; have: one "
            f"of {', '.join(ours)}"
        )
    return ours[named[0]]


def _dense(fields: Fields, width: int) -> Dense:
    """Reads a dense layer behind vectors of this width."""
    _only_vectors(fields)
    fields.only("use_residual", False)
    _same(fields, "in_features", fields.get("in_features", SIZE, width), width)
    kinds = {kind: ours for ours, kind in _TYPES.items()}
    fields.only("activation_function", *kinds)
    kind = fields.get("activation_function", str, _TYPES["tanh"])
    return Dense(fields.get("out_features", SIZE, 0), kinds[kind], fields.get("bias", bool, True))


def _only_vectors(fields: Fields) -> None:
    """Raises UserError if a module reads or makes anything but the vectors."""
    for key in ("module_input_name", "module_output_name"):
        fields.only(key, "sentence_embedding", None)


def _same(fields: Fields, key: str, found: int, width: int) -> None:
    if found != width:
        raise UserError(
            f"{fields.where}: {key}={found}, but what comes before is {width} wide; the files do "
            f"not belong together"
        )


def _texts(about: Fields, folder: Path) -> Texts:
    """Reads how texts are read: `about` is config_sentence_transformers.json."""
    prompts = about.get("prompts", dict | None, None) or {}
    default = about.get("default_prompt_name", str | None, None)
    if wrong := [name for name, text in prompts.items() if not isinstance(text, str | None)]:
        raise UserError(f"{about.where}: prompts: {wrong[0]} should be a text")
    if default is not None and default not in prompts:
        raise UserError(f"{about.where}: default_prompt_name={default!r} is none of its prompts")
    similarity = about.get("similarity_fn_name", str | None, None)
    about.only("similarity_fn_name", None, *_SIMILARITIES)
    names = sorted(folder.glob("sentence_*_config.json"))
    reading = _fields(names[0] if names else folder / "sentence_bert_config.json")
    reading.only("transformer_task", "feature-extraction")
    lower = _fields(folder / "tokenizer_config.json").get("do_lower_case", bool, False)
    if reading.get("do_lower_case", bool, False) and not lower:
        raise UserError(
            f"{reading.where}: do_lower_case, but the tokenizer does not; set it to false, or give "
            f"the tokenizer a normalizer that does"
        )
    most = reading.get("max_seq_length", SIZE, None)
    pairs = tuple((name, text or "") for name, text in sorted(prompts.items()))
    return Texts(pairs, default, similarity or "cosine", most)


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
