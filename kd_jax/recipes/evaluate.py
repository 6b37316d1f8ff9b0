"""Held-out figures of a checkpoint, or of a stage of a run: loss, perplexity, accuracy.

Beside a teacher also the divergence from it and how often both choose the same token. The eval
step, the masks and the sums are those of training, so a run's stage evaluated on the run's own
split gives what its results.json says.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from kd_jax import plugins
from kd_jax.errors import UserError
from kd_jax.evals import runs
from kd_jax.models import family
from kd_jax.objectives import combine
from kd_jax.precision import policy_for
from kd_jax.recipes import blueprint, export, pretrain, workdir
from kd_jax.recipes.blueprint import Blueprint
from kd_jax.recipes.setup import Setup
from kd_jax.tasks import text
from kd_jax.train import sharding
from kd_jax.train.evaluate import evaluate
from kd_jax.train.step import Plan
from kd_jax.types import Model, Params

Figures = dict[str, Any]  # see `evaluate_checkpoint`
ROWS = 32  # of a batch, where neither the user nor a run says otherwise
TOKENS = 512  # of a row, likewise, and where the model has positions for them


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be given or left (None) to the run, or else to a default."""

    teacher: str | None = None  # folder or hub id
    seq_len: int | None = None
    batch_size: int | None = None  # global
    precision: str | None = None  # fp32 | bf16


def evaluate_checkpoint(
    model: str, revision: str | None, task: str, data: str, options: Options
) -> Figures:
    """Figures of an HF checkpoint, read with its own tokenizer, on text.

    Args:
        model: folder, or hub id of `revision`.
        task: mlm | clm, a module of kd_jax.tasks.
        data: file, folder or glob.
        options: defaults are no teacher, rows of 512 tokens (or as many as the model takes),
            batches of 32 rows, fp32.

    Returns:
        {"model", "commit", "teacher", "task", "data", "split", "seq_len", "batch_size",
        "precision", "loss" (nats a token), "perplexity", "accuracy", "kl" and "agreement" (beside
        a teacher), "parameters", "size_mb", "seconds"}.

    Raises UserError where the model has no such head or no tokenizer, or the teacher another one.
    """
    make_task = plugins.load("tasks", task, "make").make
    head = make_task({"name": task}, None, None).head
    precision = options.precision or "fp32"
    mesh = sharding.make_mesh()
    policy = policy_for(precision, jax.default_backend())
    student = blueprint.describe(_section(model, revision), "model", head, policy)
    tokenizer = text.load_tokenizer(student.folder)
    teacher = None
    if options.teacher:
        teacher = blueprint.describe(_section(options.teacher), "teacher", head, policy)
        _check_tokenizer(teacher, tokenizer)
    shortest = min(each.config.max_tokens for each in (student, teacher) if each is not None)
    seq_len = options.seq_len or min(TOKENS, shortest)
    if seq_len > shortest:
        raise UserError(f"--seq_len={seq_len}: there are positions for {shortest} tokens")
    batch_size = options.batch_size or -(-ROWS // mesh.size) * mesh.size
    _check_rows(batch_size, mesh)
    held_out = make_task(
        {"name": task, "seq_len": seq_len}, {"test": {"path": data}}, tokenizer
    )
    return _measure(
        (student, student.load(None)),
        None if teacher is None else (teacher, teacher.load(None)),
        held_out,
        "test",
        dict(task=task, seq_len=seq_len, batch_size=batch_size, precision=precision),
        mesh,
    )


def evaluate_stage(
    folder: str, stage: str, data: str | None, split: str | None, options: Options
) -> Figures:
    """Figures of the best checkpoint of a stage of a finished run; see `evaluate_checkpoint`.

    Args:
        folder: the run directory.
        stage: teacher | baseline | student.
        data: file, folder or glob; the run's own `split` where it is None.
        split: validation | test; by default the one that the run reports.
        options: defaults are the run's own settings, and its teacher.
    """
    run = runs.read(folder)
    if stage not in run.stages:
        raise UserError(f"{folder} has no stage {stage!r}; have: {', '.join(run.stages)}")
    config = _for_this_machine(run.config, options)
    if data is not None:
        config.data = ConfigDict({"test": {"path": data}})
        split = "test"
    setup = Setup(config, run.workdir)
    wanted = {each.name: each for each in setup.stages}
    student = setup.teacher if stage == "teacher" else setup.student
    teacher = None
    if options.teacher:
        described = blueprint.describe(_section(options.teacher), "teacher", setup.head, setup.policy)
        _check_tokenizer(described, setup.tokenizer)
        teacher = described, described.load(None)
    elif stage != "teacher" and "teacher" in wanted:
        teacher = setup.teacher, export.restore_best(setup, wanted["teacher"])
    elif stage != "teacher":
        teacher = setup.teacher, pretrain.given_teacher(setup)
    found = _measure(
        (student, export.restore_best(setup, wanted[stage])),
        teacher,
        setup.task,
        split or run.results["split"],
        dict(
            task=config.task.name,
            seq_len=setup.task.seq_len,
            batch_size=config.eval.batch_size,
            precision=config.precision,
        ),
        setup.mesh,
        config.vocab_chunk,
    )
    return found | {"model": str(run.workdir), "stage": stage}


def _section(model: str, revision: str | None = None) -> ConfigDict:
    return ConfigDict({"model": model, "revision": revision or "", "architecture": {}})


def _for_this_machine(config: dict, options: Options) -> ConfigDict:
    """The run's config, with what training alone needs set so that any devices will do."""
    config = ConfigDict(config)
    config.mesh.fsdp = config.accumulate = 1
    config.eval.batch_size = options.batch_size or config.eval.batch_size
    config.task.seq_len = options.seq_len or config.task.seq_len
    config.precision = options.precision or config.precision
    config.batch_size = config.eval.batch_size
    for changes in config.stages.values():
        changes.batch_size = config.batch_size
    return config


def _check_tokenizer(teacher: Blueprint, tokenizer) -> None:
    if text.load_tokenizer(teacher.folder).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--teacher={teacher.name} has another tokenizer than the model: the same ids would "
            f"mean other words, and nothing can be compared"
        )


def _check_rows(batch_size: int, mesh: Mesh) -> None:
    if batch_size < 1 or batch_size % mesh.size:
        raise UserError(
            f"--batch_size={batch_size} cannot be divided among {mesh.size} devices; make it a "
            f"multiple of {mesh.size}"
        )


def _measure(
    student: tuple[Blueprint, Params],
    teacher: tuple[Blueprint, Params] | None,
    task: Any,
    split: str,
    settings: dict[str, Any],
    mesh: Mesh,
    chunk: int = 0,
) -> Figures:
    began = time.perf_counter()
    described, params = student
    policy = described.policy
    everywhere = NamedSharding(mesh, P())
    frozen = None
    if teacher is not None:
        kept = blueprint.stored(teacher[1], policy)
        frozen = Model(jax.device_put(kept, everywhere), teacher[0].abstract().graphdef)
    model = Model(jax.device_put(params, everywhere), described.abstract().graphdef)
    objective = combine.held_out(policy, None if frozen is None else policy, chunk)
    stream = task.held_out(split, settings["batch_size"])
    found = evaluate(model, stream, frozen, Plan(objective, mesh, family.PARTITION))
    return {
        "model": described.name,
        "commit": described.commit,
        "teacher": None if teacher is None else teacher[0].name,
        "data": task.prepare()[split],
        "split": split,
        **settings,
        "loss": found.pop("loss"),
        "perplexity": math.exp(min(found["loss"], 700.0)),
        **found,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "size_mb": round(sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6, 2),
        "machine": workdir.machine(),
        "seconds": round(time.perf_counter() - began, 1),
    }
