"""Loads and saves Hugging Face checkpoints, and checks that no tensor is missing or left over."""

import functools
import itertools
import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kd_jax import tensors
from kd_jax.errors import UserError
from kd_jax.models import embedder, weight_files
from kd_jax.models import family as families
from kd_jax.models.config_json import Fields, order_in_file, read_labels
from kd_jax.models.family import Family, Rule
from kd_jax.models.weight_files import Stored, list_names
from kd_jax.precision import Policy
from kd_jax.types import Array, Params

log = logging.getLogger(__name__)

ENSEMBLE_CODE = "modeling_kd_jax_ensemble"  # a file in families.PYTORCH
Gather = Callable[[Any], np.ndarray]  # makes a whole array of a parameter


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


def open(folder: Path, family: Family, config: Any, head: str, key: Array | None = None) -> Params:
    """Opens a folder's weights as parameters: float32 lazy tensors (kd_jax/tensors.py) with the
    shapes of `family.abstract`. Only names and shapes are read.

    Every tensor is used or is on the family's list of unused tensors; anything missing, left over
    or of a wrong shape raises UserError, and so does reading what is not finite or differs from
    what it is tied to. One exception: a checkpoint of the base model only, or with another head of
    the family, gets a random head, drawn from `key` and logged, with the tensors that the base
    model, or another head, has of it (BERT's pooler). Without a key this is an error, too. The
    columns of a classifier are put in the order of the config's labels.
    """
    shapes = families.abstract(family, config, head, Policy()).params
    stored = weight_files.read(Path(folder)).items()
    found = {_plain(name, family): tensor for name, tensor in stored}
    if head == "embedding":
        found |= embedder.stored(folder, config)
    rules = rules_of(family, config, head)
    flat_shapes = {path: leaf.shape for path, leaf in families.flatten(shapes).items()}
    flat: dict[str, tensors.LazyTensor] = {}
    of_head = [rule for rule in rules if rule.ours[0].startswith("head/") and not rule.base]
    of_head = [rule for rule in of_head if not re.search(family.common, rule.hf)]
    own = found
    named = families.head_of(family, json.loads(config.hf_json)) or head
    if of_head and named != head:  # tensors of that head may have the names of this one's
        theirs = {rule.hf for rule in rules_of(family, config, named)}
        foreign = theirs & {rule.hf for rule in of_head}
        own = {name: tensor for name, tensor in found.items() if name not in foreign}
    for rule in rules:
        if rule.hf in own:
            tensor = own[rule.hf]
            if rule.ours[0].startswith("head/classifier/"):
                tensor = _in_order(rule, tensor, config, folder)
            _place(rule, tensor, flat_shapes, flat, folder)

    known = {rule.hf for rule in rules}
    if key is not None and of_head and not any(rule.hf in own for rule in of_head):
        fresh = families.flatten(families.draw(family, config, {"head": shapes["head"]}, key))
        drawn = {path: np.asarray(value) for path, value in fresh.items() if path not in flat}
        parts = ", ".join(sorted({path.rpartition("/")[0] for path in drawn}))
        log.warning("%s has no %s head: random values in %s", folder, head, parts)
        flat |= {path: tensors.of_array(value, np.float32) for path, value in drawn.items()}
        of_head = []
    # Other heads' tensors are left over only where this one's are there, and belong there.
    if not of_head or head == "embedding":
        for other in family.architectures:
            known |= {rule.hf for rule in rules_of(family, config, other)}
    extra = [name for name in sorted(found.keys() - known) if not _ignored(name, family)]
    missing = [rule for rule in rules if not rule.tied and not flat.keys() >= set(rule.ours)]
    if missing or extra:
        lists = list_names("-", [rule.hf for rule in missing]) + list_names("+", extra)
        raise UserError(
            f"{folder}: weights are not those of a {family.name} with head {head!r} "
            f"(- missing, + left over): {', '.join(lists)}; check config.json and the head"
        )
    return families.unflatten(flat, shapes)


def load(folder: Path, family: Family, config: Any, head: str, key: Array | None = None) -> Params:
    """Reads a folder's weights whole, as float32 NumPy arrays; otherwise as `open`."""
    return jax.tree.map(np.asarray, open(folder, family, config, head, key))


def save(
    folder: Path | None,
    params: Params,
    family: Family,
    config: Any,
    head: str,
    gather: Gather = np.asarray,
) -> None:
    """Writes config.json and model.safetensors, in HF's names and layouts, to `folder`, tensor by
    tensor; large models in several files.

    A model whose blocks differ, for which HF has no class, comes with a PyTorch class.

    Args:
        folder: the folder; None in processes that only take part in `gather`.
        params: parameters, arrays of any kind.
        family, config, head: of the model.
        gather: makes a whole array of a parameter, which may be split over processes; called in
            the same order in all of them.
    """
    _write(folder, *_to_hf(params, family, config, head, gather))
    if head == "embedding" and folder is not None:
        embedder.write(folder, config)


def save_ensemble(
    folder: Path | None,
    members: Sequence[Params],
    weights: Sequence[float],
    space: str,
    family: Family,
    config: Any,
    gather: Gather = np.asarray,
) -> None:
    """Writes an ensemble as one model to `folder`: all members' tensors, and a PyTorch class that
    averages the members.

    Args:
        members: parameters of decoders of one shape, with their language-modeling heads.
        weights: weights of the members in the mean.
        space: space of the mean, logits | probabilities.
        family, config: family and config of every member.
        folder, gather: see `save`.
    """
    made: dict[str, Callable[[], np.ndarray]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for number, params in enumerate(members):
        own_shapes, own, member = _to_hf(params, family, config, "clm", gather)
        shapes |= {f"members.{number}.{name}": shape for name, shape in own_shapes.items()}
        made |= {f"members.{number}.{name}": make for name, make in own.items()}
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
    _write(folder, shapes, made, page)


def _to_hf(
    params: Params, family: Family, config: Any, head: str, gather: Gather
) -> tuple[dict[str, tuple[int, ...]], dict[str, Callable[[], np.ndarray]], dict]:
    """Finds the shapes of all tensors in HF's names and layouts, functions that make them, and the
    matching config.json."""
    config, flat = families.equal(family, config), families.flatten(params)
    prefix = "" if head in ("none", "embedding") else family.prefix
    shapes, made = {}, {}

    def tensor(rule: Rule) -> np.ndarray:
        parts = [gather(flat[path]) for path in rule.ours]
        whole = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        return whole.T if rule.transpose else whole

    for rule in rules_of(family, config, head):
        if rule.tied:
            continue
        name = prefix + rule.hf if rule.base else rule.hf
        leaves = [flat[path] for path in rule.ours]
        shape = *leaves[0].shape[:-1], sum(leaf.shape[-1] for leaf in leaves)
        shapes[name] = shape[::-1] if rule.transpose else shape
        made[name] = functools.partial(tensor, rule)
    return shapes, made, families.write(family, config, head)


def _write(
    folder: Path | None,
    shapes: dict[str, tuple[int, ...]],
    made: dict[str, Callable[[], np.ndarray]],
    page: dict,
) -> None:
    """Writes a checkpoint's files, with kd_jax's code if `page`, the config.json, refers to it."""
    if folder is None:
        for make in made.values():
            make()
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(page, indent=2, sort_keys=True) + "\n")
    if code := families.code_of(page):
        shutil.copy(code, folder)
    for file, names in itertools.groupby(shapes, key=_file):
        names = {name.removeprefix(f"{embedder.TENSORS}{file}."): name for name in names}
        place = embedder.dense_folder(folder, int(file)) if file else folder
        place.mkdir(exist_ok=True)
        arrays = (made[name]() for name in names.values())
        weight_files.write(place, {own: shapes[name] for own, name in names.items()}, arrays)


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
    places["head/dense/#"] = (f"{embedder.TENSORS}#.linear", 0, False)
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
    # Files of layers behind the base model come last, one after the other.
    return sorted(every, key=lambda rule: (rule.tied, _file(rule.hf)))


def _file(hf: str) -> str:
    """Tells which file a tensor is in: "" for the model's, or the number of a dense layer."""
    return hf.split(".")[1] if hf.startswith(embedder.TENSORS) else ""


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


def _in_order(rule: Rule, tensor: Stored, config: Any, folder: Path) -> Stored:
    """Puts the classes of a checkpoint's classifier in the order of the config's labels. Raises
    UserError if it has a different number of them."""
    if len(tensor.array) != len(config.labels):
        raise UserError(
            f"{folder}: {rule.hf} is for {len(tensor.array)} classes, but {len(config.labels)} are "
            f"wanted ({', '.join(config.labels)}); take a checkpoint that was fine-tuned on them, "
            f"or one without a classifier"
        )
    order = order_in_file(config.labels, read_labels(Fields(json.loads(config.hf_json))))
    return tensor._replace(array=tensor.array[np.asarray(order)])


def _place(rule: Rule, tensor: Stored, shapes: dict, flat: dict, folder: Path) -> None:
    """Splits one HF tensor into the parameters it holds."""
    value = tensor.array.T if rule.transpose else tensor.array
    widths = [shapes[path][-1] for path in rule.ours]
    want = (*shapes[rule.ours[0]][:-1], sum(widths))
    if value.shape != want:
        want = want[::-1] if rule.transpose else want
        raise UserError(
            f"{folder}: {rule.hf} has shape {tensor.array.shape}, but config.json asks for {want}; "
            f"config.json and the weights do not belong together"
        )
    parts = np.split(value, np.cumsum(widths)[:-1], axis=-1)
    for path, part in zip(rule.ours, parts, strict=True):
        check = functools.partial(_check_finite, tensor.where)
        lazy = tensors.of_array(part, np.float32).checked(check)
        if path not in flat:
            flat[path] = lazy
        elif rule.tied:
            check = functools.partial(_check_tied, lazy, f"{folder}: {rule.hf}")
            flat[path] = flat[path].checked(check)


def _check_finite(where: str, part: np.ndarray, index: tensors.Index) -> None:
    if part.dtype.kind in "iub":
        return
    with np.errstate(over="ignore"):
        own = part.astype(np.float32) if part.dtype.itemsize > 4 else part
        finite = np.isfinite(own)
    if not finite.all():
        raise UserError(
            f"{where} holds {finite.size - finite.sum()} values that are not finite float32 "
            f"numbers; the weights are damaged, or their training diverged"
        )


def _check_tied(
    other: tensors.LazyTensor, what: str, part: np.ndarray, index: tensors.Index
) -> None:
    if not np.array_equal(other.read(index), part):
        raise UserError(
            f"{what} differs from the weights that config.json ties it to; set "
            f"tie_word_embeddings to false there"
        )
