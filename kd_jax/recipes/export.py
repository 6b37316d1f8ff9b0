"""Writes models as Hugging Face checkpoints, and checks that the files hold the same model.

A checkpoint is written under another name, loaded again, compared, and only then renamed: it is
complete and checked, or missing, and an export that was killed is simply repeated.
"""

from __future__ import annotations

import contextlib
import functools
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
from kd_jax.models import family, hf
from kd_jax.models.blueprint import Blueprint, count
from kd_jax.precision import Policy
from kd_jax.recipes import export_check
from kd_jax.report import card, quantities, runs
from kd_jax.run import provenance, workdir
from kd_jax.run.run import Run, build
from kd_jax.run.stage import Stage, restore_best
from kd_jax.teachers.several import average
from kd_jax.types import Batch, Params

log = logging.getLogger(__name__)

Page = Callable[[str | None], str]
GENERATION = "generation_config.json"
SAMPLE = "The 1,234 boys' caf\u00e9s  aren\u2019t  OPEN;\n\tsee \u4e2d\u6587 \U0001f600!"
MARK = "export.json"  # in every folder that this module wrote: what was exported and checked


def export_run(run: Run, stage: Stage, params: Params, results: dict) -> dict[str, Any]:
    """Exports the model of a run's stage to RUN/export/STAGE; see `export_model`."""
    out = run.folder / "export" / stage.name
    return _export(run, stage.name, stage.model, params, results, out, stage.made)


def export_ensemble(
    run: Run, members: Sequence[Params], weights: Sequence[float], results: dict
) -> dict[str, Any]:
    """Exports the members of an ensemble (on the host) to RUN/export/member_N, from 1, and all of
    them as one model to RUN/export/ensemble. Returns `export_model`'s result for the ensemble, and
    "members", the paths of the members."""
    blueprint, space = run.models["student"], run.config.ensemble.space
    folder, paths = run.folder / "export", []
    for number, params in enumerate(members, 1):
        name = f"member_{number}"
        paths.append(_export(run, name, "student", params, results, folder / name)["path"])

    def mean(batch: Batch) -> np.ndarray:
        logits = [export_check.logits_of(blueprint, params, batch) for params in members]
        return average(logits, list(weights), space, np)

    def write(folder: Path) -> dict[str, float]:
        hf.save_ensemble(folder, members, weights, space, blueprint.family, blueprint.config)
        batch = export_check.example_of(blueprint)
        return export_check.check_in_pytorch(folder, "clm", batch, mean)

    size = f"{len(members)} models, {quantities.count(sum(map(count, members)))} parameters"
    about = _about(run, "ensemble", "student", size, f"{hf.ENSEMBLE_CODE}.py", results)
    done = publish(write, run.tokenizers["student"], folder / "ensemble", *about)
    return done | {"members": paths}


def export_stage(workdir: str, stage: str | None, out: str) -> dict[str, Any]:
    """Exports the best checkpoint of a stage of a finished run, by default the student's; see
    `export_model`."""
    check_place(epath.Path(out))
    made = runs.read(workdir)
    config = ConfigDict(made.config)
    config.mesh.fsdp = config.accumulate = 1  # whatever devices it was trained on
    run = build(config, made.workdir, devices=jax.local_devices()[:1])
    chosen = run.stage(stage) if stage else run.principal
    if chosen is None:  # a teacher that was only evaluated has no checkpoint
        raise made.no_stage(stage, [each.name for each in run.stages if each.name in made.stages])
    params = restore_best(run, chosen)
    about = chosen.name, chosen.model, params, made.results, epath.Path(out), chosen.made
    return _export(run, *about)


def export_checkpoint(model: str, revision: str | None, out: str) -> dict[str, Any]:
    """Loads an HF checkpoint and exports it again; see `export_model`."""
    check_place(epath.Path(out))
    source = hub.resolve(model, revision, "--model")
    hf_json = hf.read_config(source.path)
    kind, config = family.read(hf_json, f"config.json of {model}")
    head = family.head_of(kind, hf_json)
    if head is None:
        classes, have = hf_json.get("architectures") or [], ", ".join(kind.architectures.values())
        raise UserError(f"{model}: config.json has architectures={classes}; have: {have}")
    params = hf.load(source.path, kind, config, head)
    blueprint = Blueprint(model, kind, config, head, Policy(), source.path, source.commit)
    has_tokenizer = tokenizers.has_tokenizer(source.path)
    tokenizer = tokenizers.load_tokenizer(source.path) if has_tokenizer else None
    stated = card.inherited(source.path)
    size, code = _size(blueprint, params), _own_code(blueprint)
    page = functools.partial(card.of_model, head, size, model, source.commit, stated, code)
    identity = {"model": card.public_name(model), "weights": _digest(params)}
    known = provenance.read(source.path)
    return export_model(blueprint, params, tokenizer, out, page, identity, known, source.path)


def export_model(
    blueprint: Blueprint,
    params: Params,
    tokenizer: PreTrainedTokenizerBase | None,
    out: epath.PathLike,
    page: Page,
    source: dict[str, Any],
    trained_on: provenance.Provenance | None = None,
    *origins: Path | None,
) -> dict[str, Any]:
    """Writes config.json, model.safetensors, tokenizer files and README.md to `out`.

    Args:
        blueprint: the model's family, config and head.
        params: its parameters.
        tokenizer: its tokenizer, or None.
        out: the folder, local or gs://; replaced if it holds an export of the same `source`.
        page: makes the text of README.md, given the tokenizer's class (`tokenizers.reader_of`).
        source: identity of the exported model, as JSON values.
        trained_on: recorded in kd_jax.json, if known.
        origins: folders of the checkpoints it was made from; the first generation_config.json in
            them is copied, for a causal language model.

    Returns:
        {"path", "checked_with": ["kd_jax", "pytorch"], "max_logit_difference": {name: float}}:
        the largest difference of a logit between `params` and the files, loaded again by kd_jax
        and, where torch is installed, by PyTorch.

    Raises UserError if `out` holds anything else, RuntimeError if the check fails.
    """
    params = jax.device_get(params)

    def write(folder: Path) -> dict[str, float]:
        hf.save(folder, params, blueprint.family, blueprint.config, blueprint.head)
        return export_check.check(folder, blueprint, params)

    origins = origins if blueprint.head == "clm" else ()
    return publish(write, tokenizer, out, page, source, trained_on, *origins)


def publish(
    write: Callable[[Path], dict[str, float]],
    tokenizer: PreTrainedTokenizerBase | None,
    out: epath.PathLike,
    page: Page,
    source: dict[str, Any],
    trained_on: provenance.Provenance | None,
    *origins: Path | None,
) -> dict[str, Any]:
    """Writes a checkpoint to `out`, complete and checked or not at all; see `export_model`.

    `write` makes the model's files in an empty folder, and returns the largest difference of a
    logit by loader.
    """
    out = epath.Path(out)
    check_place(out, source)
    with _folder_next_to(out) as folder:
        _keep_generation(folder, origins)
        differences = write(folder)
        reader = None if tokenizer is None else _write_tokenizer(folder, tokenizer)
        (folder / "README.md").write_text(page(reader), encoding="utf-8")
        if trained_on is not None:
            storage.write_json(folder / provenance.FILE, trained_on)
        report = {"checked_with": list(differences), "max_logit_difference": differences}
        storage.write_json(folder / MARK, {"source": source, **report})
        _put(folder, out)
    return {"path": str(out), **report}


def _keep_generation(folder: Path, origins: Iterable[Path | None]) -> None:
    """Copies a checkpoint's settings for generation (temperature, end-of-text tokens)."""
    for origin in origins:
        if origin is not None and (origin / GENERATION).exists():
            shutil.copyfile(origin / GENERATION, folder / GENERATION)
            return


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Writes the tokenizer into its model's folder, and checks that it is the same when loaded from
    there; returns the class of transformers that loads it."""
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
        out.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MARK):
            epath.Path(path).copy(out / path.name, overwrite=True)
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
    run: Run, name: str, model: str, params: Params, results: dict, out: epath.Path, made: str = ""
) -> dict[str, Any]:
    """Exports a model of a run under the name of its stage; `made`: see `Stage.made`."""
    blueprint = run.models[model]
    size, code = _size(blueprint, params), _own_code(blueprint)
    about = _about(run, name, model, size, code, results, made)
    return export_model(blueprint, params, run.tokenizers[model], out, *about)


def _about(
    run: Run, name: str, model: str, size: str, code: str, results: dict, made: str = ""
) -> tuple:
    """Gathers tokenizer, card and records of a run's model: the last arguments of `publish`."""
    blueprint, config = run.models[model], workdir.resolved(run.config)
    stated = card.inherited(blueprint.folder, *(m.folder for m in run.models.values()))
    trained_on = provenance.of_run(config, results, run.tokenizers[model])
    rows = provenance.sentence(trained_on["task"])
    page = functools.partial(
        card.of_stage, name, run.head, size, results, config, stated, rows, made, code
    )
    source = {"config_hash": results["config_hash"], "stage": name}
    return page, source, trained_on, blueprint.folder, run.models["teacher"].folder


def _digest(params: Params) -> str:
    """Computes a digest of the weights, of twelve hex digits."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()[:12]


def _own_code(blueprint: Blueprint) -> str:
    """Names kd_jax's modeling file for a model that has no class in HF; "" for others."""
    config = family.equal(blueprint.family, blueprint.config)
    code = family.code_of(family.write(blueprint.family, config, blueprint.head))
    return code.name if code else ""


def _size(blueprint: Blueprint, params: Params) -> str:
    name, spec = blueprint.family.architectures[blueprint.head], blueprint.spec
    layers = f"{spec.num_layers} layer{'s' if spec.num_layers > 1 else ''}"
    return (
        f"{name} with {layers} of width {spec.width}, {quantities.count(count(params))} parameters"
    )
