"""Writes models as Hugging Face checkpoints, and checks that the files hold the same model.

A checkpoint is written under another name, loaded again, compared, and only then renamed: it is
complete and checked, or missing, and an export that was killed is simply repeated.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
from etils import epath
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from kd_jax import hub, storage
from kd_jax.data import tokenizers
from kd_jax.errors import UserError
from kd_jax.models import embedder, family, hf
from kd_jax.models.blueprint import Blueprint, count
from kd_jax.precision import Policy
from kd_jax.recipes import export_check, onnx
from kd_jax.report import card, quantities, runs
from kd_jax.run import provenance, workdir
from kd_jax.run.run import Run, build
from kd_jax.run.stage import Stage, restore_best
from kd_jax.teachers.ensemble import average
from kd_jax.train import sharding
from kd_jax.types import Batch, Params

log = logging.getLogger(__name__)

GENERATION = "generation_config.json"  # how a model generates: temperature, tokens that end texts
SAMPLE = "The 1,234 boys' caf\u00e9s  aren\u2019t  OPEN;\n\tsee \u4e2d\u6587 \U0001f600!"
Write = Callable[[Path | None], dict[str, float]]  # see `publish`
MARK = "export.json"  # in every folder that this module wrote: what was exported and checked


def export_run(
    run: Run,
    stage: Stage,
    params: Params,
    results: dict,
    out: epath.Path | None = None,
    with_onnx: bool = False,
) -> dict[str, Any]:
    """Exports the model of a run's stage to `out`, by default to RUN/export/STAGE. All processes
    call this together, the first one writes; {} in the others."""
    blueprint = run.models[stage.model]
    how = _size(blueprint, params), writer(blueprint, params)
    return _export(run, stage.name, stage.model, *how, results, out, stage.made, with_onnx)


def export_ensemble(
    run: Run, members: Sequence[Params], weights: Sequence[float], results: dict
) -> dict[str, Any]:
    """Exports the members of an ensemble, on the host, to RUN/export/member_N, from 1, and all of
    them as one model to RUN/export/ensemble. Returns what `publish` does, of the latter, and
    "members": the paths of the former."""
    blueprint, space = run.models["student"], run.config.ensemble.space
    paths = []
    for number, params in enumerate(members, 1):
        how = _size(blueprint, params), writer(blueprint, params)
        paths.append(_export(run, f"member_{number}", "student", *how, results)["path"])

    def mean(batch: Batch) -> np.ndarray:
        logits = [export_check.logits_of(blueprint, params, batch) for params in members]
        return average(logits, list(weights), space, np)

    def write(folder: Path) -> dict[str, float]:
        hf.save_ensemble(folder, members, weights, space, blueprint.family, blueprint.config)
        batch = export_check.example_of(blueprint)
        return export_check.check_in_pytorch(folder, "clm", batch, mean)

    size = f"{len(members)} models, {quantities.count(sum(map(count, members)))} parameters"
    done = _export(run, "ensemble", "student", size, write, results)
    return done | {"members": paths}


def export_stage(
    workdir: str, stage: str | None, out: str, with_onnx: bool = False
) -> dict[str, Any]:
    """Exports the best checkpoint of a stage of a finished run, by default the one that the run is
    about, also as ONNX files if asked to; see `publish`."""
    check_place(epath.Path(out))
    made = runs.read(workdir)
    config = ConfigDict(made.config)
    config.mesh.fsdp = config.accumulate = 1  # whatever devices it was trained on
    run = build(config, made.workdir, devices=jax.local_devices()[:1])
    chosen = run.stage(stage) if stage else run.principal
    if chosen is None:  # a teacher that was only evaluated has no checkpoint
        raise made.no_stage(stage, [each.name for each in run.stages if each.name in made.stages])
    if with_onnx:
        onnx.check_possible(run.models[chosen.model], run.tokenizers[chosen.model])
    params = restore_best(run, chosen)
    return export_run(run, chosen, params, made.results, epath.Path(out), with_onnx)


def export_checkpoint(
    model: str, revision: str | None, out: str, with_onnx: bool = False
) -> dict[str, Any]:
    """Exports an HF checkpoint as kd_jax reads it, also as ONNX files if asked; see `publish`."""
    check_place(epath.Path(out))
    source = hub.resolve(model, revision, "--model")
    hf_json = hf.read_config(source.path)
    kind, config = family.read(hf_json, f"config.json of {model}")
    head = family.head_of(kind, hf_json)
    if embedder.describes(source.path):
        head, config = "embedding", embedder.read(config, source.path)
    if head is None:
        classes, have = hf_json.get("architectures") or [], ", ".join(kind.architectures.values())
        raise UserError(f"{model}: config.json has architectures={classes}; have: {have}")
    blueprint = Blueprint(model, kind, config, head, Policy(), source.path, source.commit)
    has_tokenizer = tokenizers.has_tokenizer(source.path)
    tokenizer = tokenizers.load_tokenizer(source.path) if has_tokenizer else None
    if with_onnx:
        onnx.check_possible(blueprint, tokenizer)
    params = hf.open(source.path, kind, config, head)
    stated = card.inherited(source.path)
    page = card.of_model(head, _size(blueprint, params), model, source.commit, stated)
    identity = {"model": card.public_name(model), "weights": _digest(params)}
    known = provenance.read(source.path)
    origins = [source.path] if head == "clm" else []
    write, head = writer(blueprint, params), head if with_onnx else None
    return publish(write, tokenizer, out, page, identity, known, origins, head)


def writer(blueprint: Blueprint, params: Params) -> Write:
    """Makes the function that writes one model, and checks it."""

    def write(folder: Path | None) -> dict[str, float]:
        gather = sharding.take_part if folder is None else sharding.whole
        about = blueprint.family, blueprint.config, blueprint.head
        hf.save(folder, params, *about, gather)
        return export_check.check(folder, blueprint, params)

    return write


def publish(
    write: Write,
    tokenizer: PreTrainedTokenizerBase | None,
    out: epath.PathLike,
    page: card.Page,
    source: dict[str, Any],
    trained_on: provenance.Provenance | None = None,
    origins: Iterable[Path | None] = (),
    onnx_head: str | None = None,
) -> dict[str, Any]:
    """Writes config.json, model.safetensors, tokenizer files and README.md to `out`, whole and
    checked or not at all.

    Args:
        write: makes the files of the model in an empty folder, and gives the largest difference of
            a logit by loader; with None, helps the first process to do so.
        tokenizer: the model's, None where there is none.
        out: the folder, local or gs://; replaced where it holds an export of the same `source`.
        page: makes the text of README.md.
        source: what is exported, as JSON values.
        trained_on: goes into kd_jax.json, where it is known.
        origins: folders of checkpoints that generate: the first generation_config.json there is in
            them is kept.
        onnx_head: the head of a model that is also written as ONNX files (recipes/onnx.py).

    Returns:
        {"path", "checked_with": ["kd_jax", "pytorch"], "max_logit_difference": {name: float}}:
        the largest difference of a logit between the model in memory and the files, loaded again
        by kd_jax and, where torch is installed, by PyTorch; and "onnx", what `onnx.add` measures.

    Raises UserError where `out` holds anything else, RuntimeError where the check fails.
    """
    if jax.process_index() > 0:
        return write(None)
    out = epath.Path(out)
    check_place(out, source)
    with _folder_next_to(out) as folder:
        settings = [each / GENERATION for each in origins if each is not None]
        for kept in [path for path in settings if path.exists()][:1]:
            shutil.copyfile(kept, folder / GENERATION)
        differences = write(folder)
        reader = None if tokenizer is None else _write_tokenizer(folder, tokenizer)
        code = family.code_of(hf.read_config(folder))
        graphs = onnx.add(folder, onnx_head, tokenizer) if onnx_head else None
        text = page(code.name if code else "", reader, graphs)
        (folder / "README.md").write_text(text, encoding="utf-8")
        if trained_on is not None:
            storage.write_json(folder / provenance.FILE, trained_on)
        report = {"checked_with": list(differences), "max_logit_difference": differences}
        storage.write_json(folder / MARK, {"source": source, **report})
        if graphs:
            storage.write_json(folder / onnx.FILE, graphs)
        _put(folder, out)
    return {"path": str(out), **report} | ({"onnx": graphs} if graphs else {})


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Writes the tokenizer into its model's folder, and checks that it is the same when loaded from
    there; returns the class of transformers that loads it.

    sentence-transformers fills the rows of a batch up: where the tokenizer of an embedder has no
    token for that, it is the one that ends texts.
    """
    if embedder.describes(folder) and tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    tokenizers.save_tokenizer(tokenizer, folder)
    again = tokenizers.load_tokenizer(folder)
    if again(SAMPLE)["input_ids"] != tokenizer(SAMPLE)["input_ids"]:
        raise RuntimeError(f"{folder}: loaded again, the tokenizer reads {SAMPLE!r} otherwise")
    reader = tokenizers.reader_of(folder)
    if reader != "AutoTokenizer":
        log.warning(
            "%s: AutoTokenizer tokenizes texts differently for this model; load it with %s, as "
            "kd_jax does and the card says",
            folder,
            reader,
        )
    return reader


def check_place(out: epath.Path, source: dict[str, Any] | None = None) -> None:
    """Raises UserError if `out` holds anything but an export (of the same source, if given)."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MARK).exists():
        raise UserError(f"{out} exists and is no export of kd_jax; give another --out")
    try:
        there = storage.read_json(out / MARK)["source"]
    except (UserError, KeyError, TypeError):
        raise UserError(
            f"{out / MARK} is damaged, or not of kd_jax; remove {out} to export anew, or give "
            f"another --out"
        ) from None
    if source not in (None, there):
        raise UserError(f"{out} holds another export ({there}, not {source}); give another --out")


@contextlib.contextmanager
def _folder_next_to(out: epath.Path) -> Iterator[Path]:
    """Makes an empty local folder next to `out`; removes it at the end if it is still there."""
    if "://" in os.fspath(out):
        folder = Path(tempfile.mkdtemp())
    else:
        folder = _sibling(out, "partial")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        yield folder
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put(folder: Path, out: epath.Path) -> None:
    """Moves a finished folder to its final place."""
    if "://" in os.fspath(out):  # no rename there: the mark comes last
        files = (path for path in folder.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path.name == MARK):
            place = out / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            epath.Path(path).copy(place, overwrite=True)
        return
    old = _sibling(out, "old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    folder.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _sibling(out: epath.Path, ending: str) -> Path:
    absolute = Path(out).absolute()
    return absolute.with_name(f".{absolute.name}.{ending}")


def _export(
    run: Run,
    name: str,
    model: str,
    size: str,
    write: Write,
    results: dict,
    out: epath.Path | None = None,
    made: str = "",
    with_onnx: bool = False,
) -> dict[str, Any]:
    """Exports a model of a run to `out`, by default to RUN/export/NAME.

    `name`: what was trained; `size`: in words; `made`: see `Stage.made`.
    """
    blueprint, config = run.models[model], workdir.resolved(run.config)
    tokenizer, out = run.tokenizers[model], out or run.folder / "export" / name
    stated = card.inherited(blueprint.folder, *(m.folder for m in run.models.values()))
    trained_on = provenance.of_run(config, results, tokenizer)
    rows = provenance.sentence(trained_on["task"])
    page = card.of_stage(name, run.head, size, results, config, stated, rows, made)
    source = {"config_hash": results["config_hash"], "stage": name}
    origins = [blueprint.folder, run.models["teacher"].folder] if blueprint.head == "clm" else []
    head = blueprint.head if with_onnx else None
    return publish(write, tokenizer, out, page, source, trained_on, origins, head)


def _digest(params: Params) -> str:
    """Computes a digest of the weights, of twelve hex digits."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()[:12]


def _size(blueprint: Blueprint, params: Params) -> str:
    name, spec = blueprint.family.architectures[blueprint.head], blueprint.spec
    layers = f"{spec.num_layers} layer{'s' if spec.num_layers > 1 else ''}"
    return (
        f"{name} with {layers} of width {spec.width}, {quantities.count(count(params))} parameters"
    )
