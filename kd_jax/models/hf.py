"""Loads and saves Hugging Face checkpoints, and checks that no tensor is missing or left over."""

import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from kd_jax.errors import UserError
from kd_jax.models import family as families
from kd_jax.models.config_json import Fields, order_in_file, read_labels
from kd_jax.models.family import Family, Rule
from kd_jax.precision import Policy
from kd_jax.types import Array, Params

log = logging.getLogger(__name__)

ENSEMBLE_CODE = "modeling_kd_jax_ensemble"  # a file in families.PYTORCH
# In the order of preference; an index names the files of a checkpoint in several.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read_config(folder: Path) -> dict:
    """Reads config.json of a checkpoint folder. Raises UserError if it is missing or not JSON."""
    path = Path(folder) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json; give the folder of an HF checkpoint") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; download it again")
    return found


def load(folder: Path, family: Family, config: Any, head: str, key: Array | None = None) -> Params:
    """Reads a folder's weights as parameters: float32 NumPy arrays with the shapes of
    `family.abstract`.

    Every tensor is used or is on the family's list of unused tensors; anything missing, left over,
    of a wrong shape or not finite raises UserError. One exception: a checkpoint of the base model
    only, or with another head of the family, gets a random head, drawn from `key` and logged, with
    the tensors that the base model has of it (BERT's pooler). Without a key this is an error, too.
    The columns of a classifier are put in the order of the config's labels.
    """
    shapes = families.abstract(family, config, head, Policy()).params
    read = _read(Path(folder), family)
    tensors = {_plain(name, family): value for name, value in read.items()}
    rules = rules_of(family, config, head)
    flat_shapes = {path: leaf.shape for path, leaf in families.flatten(shapes).items()}
    flat: dict[str, np.ndarray] = {}
    for rule in rules:
        if rule.hf in tensors:
            _check_classes(rule, tensors[rule.hf], config, folder)
            _place(rule, tensors[rule.hf], flat_shapes, flat, folder)

    if "head/classifier/kernel" in flat:
        in_file = read_labels(Fields(json.loads(config.hf_json)))
        order = order_in_file(config.labels, in_file)
        for path in ("head/classifier/kernel", "head/classifier/bias"):
            flat[path] = flat[path][..., order]
    of_head = [rule for rule in rules if rule.ours[0].startswith("head/") and not rule.base]
    known = {rule.hf for rule in rules}
    if key is not None and of_head and not any(rule.hf in tensors for rule in of_head):
        fresh = families.flatten(families.draw(family, config, {"head": shapes["head"]}, key))
        drawn = {path: np.asarray(value) for path, value in fresh.items() if path not in flat}
        parts = ", ".join(sorted({path.rpartition("/")[0] for path in drawn}))
        log.warning("%s has no %s head: random values in %s", folder, head, parts)
        flat |= drawn
        of_head = []
    if not of_head:  # other heads' tensors are left over only where this one's are there
        for other in family.architectures:
            known |= {rule.hf for rule in rules_of(family, config, other)}
    extra = [name for name in sorted(tensors.keys() - known) if not _ignored(name, family)]
    missing = [rule for rule in rules if not rule.tied and not flat.keys() >= set(rule.ours)]
    if missing or extra:
        lists = _list("-", [rule.hf for rule in missing]) + _list("+", extra)
        raise UserError(
            f"{folder}: weights are not those of a {family.name} with head {head!r} "
            f"(- missing, + left over): {', '.join(lists)}; check config.json and the head"
        )
    return families.unflatten(flat, shapes)


def save(folder: Path, params: Params, family: Family, config: Any, head: str) -> None:
    """Writes config.json and model.safetensors, in HF's names and layouts, to `folder`.

    A model whose blocks differ, for which HF has no class, comes with a PyTorch class.
    """
    _write(Path(folder), *_to_hf(params, family, config, head))


def save_ensemble(
    folder: Path,
    members: Sequence[Params],
    weights: Sequence[float],
    space: str,
    family: Family,
    config: Any,
) -> None:
    """Writes an ensemble as one model to `folder`: all members' tensors, and a PyTorch class that
    averages the members.

    Args:
        members: parameters of decoders of one shape, with their language-modeling heads.
        weights: weights of the members in the mean.
        space: space of the mean, logits | probabilities.
        family, config: family and config of every member.
    """
    tensors: dict[str, np.ndarray] = {}
    for number, params in enumerate(members):
        own, member = _to_hf(params, family, config, "clm")
        tensors |= {f"members.{number}.{name}": tensor for name, tensor in own.items()}
    kept = ("bos_token_id", "eos_token_id", "pad_token_id")
    page = {name: member[name] for name in kept if name in member} | {
        "model_type": "kd_jax_ensemble",
        "architectures": ["KDJaxEnsembleForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{ENSEMBLE_CODE}.KDJaxEnsembleConfig",
            "AutoModelForCausalLM": f"{ENSEMBLE_CODE}.KDJaxEnsembleForCausalLM",
        },
        "member": member,
        "weights": [float(weight) for weight in weights],
        "space": space,
    }
    _write(Path(folder), tensors, page)


def _to_hf(
    params: Params, family: Family, config: Any, head: str
) -> tuple[dict[str, np.ndarray], dict]:
    """Makes all tensors in HF's names and layouts, and the matching config.json."""
    config = families.equal(family, config)
    flat = jax.tree.map(np.asarray, families.flatten(params))
    prefix = family.prefix if head != "none" else ""
    tensors = {}
    for rule in rules_of(family, config, head):
        if rule.tied:
            continue
        tensor = np.concatenate([flat[path] for path in rule.ours], axis=-1)
        name = prefix + rule.hf if rule.base else rule.hf
        # safetensors writes the buffer as it lies, whatever the strides say
        tensors[name] = np.ascontiguousarray(tensor.T if rule.transpose else tensor)
    return tensors, families.write(family, config, head)


def _write(folder: Path, tensors: dict[str, np.ndarray], page: dict) -> None:
    """Writes a checkpoint's files, with kd_jax's code if `page`, the config.json, refers to it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(page, indent=2, sort_keys=True) + "\n")
    if code := families.code_of(page):
        shutil.copy(code, folder)
    weights = folder / "model.safetensors"
    safetensors.numpy.save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors gives it to its owner alone


def rules_of(family: Family, config: Any, head: str) -> list[Rule]:
    """Lists every tensor of a model in HF's files, and the parameters that it holds."""
    tables = [(family.base, True), (family.head, False)]
    places = {
        module: (hf, place, base)
        for table, base in tables
        for hf, ours in table.items()
        for place, module in enumerate(_modules(ours))
    }
    blocks = next(hf for hf, ours in family.base.items() if "blocks/#" in ours).partition("#")[0]
    for name in ("down", "up"):  # of a bottleneck, which HF does not have
        places.setdefault(f"backbone/blocks/#/{name}", (f"{blocks}#.{name}", 0, True))
    paths = families.flatten(families.abstract(family, config, head, Policy()).params)
    held: dict[Rule, dict[int, str]] = {}
    for path in sorted(paths, key=lambda path: path.endswith("bias")):  # weights go first
        if found := _named(path, places, family.conv1d, config.inner):
            rule, place = found
            held.setdefault(rule, {})[place] = path
    every = list(family.rules(config, head))
    every += [
        rule._replace(ours=tuple(ours[i] for i in sorted(ours))) for rule, ours in held.items()
    ]
    if head in ("mlm", "clm") and config.tie_embeddings:
        unembed, *_ = places["head/unembed"]
        every.append(Rule(unembed, ("backbone/tokens/embedding",), tied=True))
    unnamed = paths.keys() - {path for rule in every for path in rule.ours}
    if unnamed:
        raise ValueError(f"{family.name} names no HF tensor for {sorted(unnamed)}")
    return sorted(every, key=lambda rule: rule.tied)


def _modules(ours: str) -> list[str]:
    """Lists the modules that a row of a family's table names."""
    folder, slash, names = ours.rpartition("/")
    return [folder + slash + name for name in names.split(",")]


def _named(path: str, places: dict, conv1d: str, inner: str) -> tuple[Rule, int] | None:
    """Finds the HF tensor of a parameter, and the parameter's index among those in the tensor."""
    inside = re.match(r"backbone/blocks/\d+/inner/", path)  # the block inside a bottleneck
    own = path.replace("/inner/", "/", 1) if inside else path
    numbers = re.findall(r"\d+", own)
    own = re.sub(r"\d+", "#", own)
    module, _, leaf = own.rpartition("/")
    if own in places:
        hf, place, base = places[own]
    elif module in places:
        hf, place, base = places[module]
        hf += ".bias" if leaf == "bias" else ".weight"
    else:
        return None
    transpose = leaf == "kernel" and not re.search(conv1d, hf)
    hf = hf.replace("#", f"#{inner}", 1) if inside else hf
    for number in numbers:
        hf = hf.replace("#", number, 1)
    return Rule(hf, (), transpose, base=base), place


def _plain(name: str, family: Family) -> str:
    """Removes the base model's prefix from a tensor's name, and modernizes names of layer norms."""
    name = name.removeprefix(family.prefix)
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))


def _ignored(name: str, family: Family) -> bool:
    """Tells whether a tensor of this (plain) name is on the family's list of unused ones."""
    return any(re.search(pattern, name) for pattern in family.ignore)


def _check_classes(rule: Rule, tensor, config: Any, folder: Path) -> None:
    """Raises UserError if a checkpoint's classifier has a different number of classes."""
    if not rule.ours[0].startswith("head/classifier/") or len(tensor) == len(config.labels):
        return
    raise UserError(
        f"{folder}: {rule.hf} is for {len(tensor)} classes, but {len(config.labels)} are wanted "
        f"({', '.join(config.labels)}); take a checkpoint that was fine-tuned on them, or one "
        f"without a classifier"
    )


def _place(rule: Rule, tensor, shapes: dict, flat: dict, folder: Path) -> None:
    """Splits one HF tensor into the parameters it holds."""
    value = tensor.T if rule.transpose else tensor
    widths = [shapes[path][-1] for path in rule.ours]
    want = (*shapes[rule.ours[0]][:-1], sum(widths))
    if value.shape != want:
        want = want[::-1] if rule.transpose else want
        raise UserError(
            f"{folder}: {rule.hf} has shape {tensor.shape}, but config.json asks for {want}; "
            f"config.json and the weights do not belong together"
        )
    parts = np.split(value, np.cumsum(widths)[:-1], axis=-1)
    for path, part in zip(rule.ours, parts, strict=True):
        if path not in flat:
            flat[path] = part.astype(np.float32)
        elif rule.tied and not np.array_equal(flat[path], part.astype(np.float32)):
            raise UserError(
                f"{folder}: {rule.hf} differs from the weights that config.json ties it to; "
                f"set tie_word_embeddings to false there"
            )


def _list(sign: str, names: list[str]) -> list[str]:
    """Returns the first few names, each with a sign in front."""
    more = [f"{sign} {len(names) - 6} more"] if len(names) > 6 else []
    return [f"{sign} {name}" for name in names[:6]] + more


def _read(folder: Path, family: Family) -> dict[str, np.ndarray]:
    """Reads all tensors of a checkpoint folder, by the names in its files.

    Raises UserError for values that are not finite, except in unused tensors.
    """
    name = next((name for name in WEIGHTS if (folder / name).exists()), None)
    if name is None:
        have = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise UserError(f"{folder}: no weights; want {' or '.join(WEIGHTS)}, have {have}")
    if not name.endswith(".index.json"):
        return _read_file(folder / name, family)
    shard_of = _read_index(folder / name)
    tensors = {}
    for shard in sorted(set(shard_of.values())):
        tensors |= _read_file(folder / shard, family)
    absent = sorted(shard_of.keys() - tensors.keys())
    if absent:
        raise UserError(f"{folder / name}: its files lack {', '.join(_list('-', absent))}")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """Reads which file holds each tensor from an index file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if all(isinstance(file, str) for file in found.values()):
            return found
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(
        f"{path}: its weight_map should give the file of each tensor by name; download it again"
    )


def _read_file(path: Path, family: Family) -> dict[str, np.ndarray]:
    if not path.exists():
        raise UserError(f"{path}: missing, though the index names it; download it again")
    tensors = _read_torch(path) if path.suffix == ".bin" else _read_safetensors(path)
    for name, tensor in tensors.items():
        if tensor.dtype.kind in "iub" or _ignored(_plain(name, family), family):
            continue
        with np.errstate(over="ignore"):
            finite = np.isfinite(tensor.astype(np.float32, copy=False))
        if not finite.all():
            raise UserError(
                f"{path}: {name} holds {finite.size - finite.sum()} values that are not finite "
                f"float32 numbers; the weights are damaged, or their training diverged"
            )
    return tensors


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path}: truncated or not safetensors ({error}); download it again"
        ) from None


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ModuleNotFoundError:
        raise UserError(
            f"{path}: reading it needs torch; pip install torch, or convert it to safetensors"
        ) from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: truncated, or more than weights ({reason})") from None
    if not isinstance(found, dict) or not found:
        what = f"a {type(found).__name__}" if found or not isinstance(found, dict) else "nothing"
        raise UserError(f"{path}: holds {what}, no tensors by name; save model.state_dict() there")
    others = [str(name) for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise UserError(
            f"{path}: holds more than tensors ({', '.join(others[:6])}); save model.state_dict() "
            f"alone there"
        )
    return {str(name): tensor.float().numpy() for name, tensor in found.items()}
