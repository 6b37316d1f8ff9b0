"""Held-out figures of a checkpoint, or of a stage of a run: loss, perplexity, accuracy.

Beside a teacher also the divergence from it, and how often both choose the same token. The eval
step, the masks and the sums are those of training, so that a run's stage evaluated on the run's own
split gives what its results.json says.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from kd_jax import plugins
from kd_jax.errors import UserError
from kd_jax.evals import runs
from kd_jax.run import measure, provenance, subject
from kd_jax.run.run import build
from kd_jax.run.subject import Report, Subject
from kd_jax.train import sharding
from kd_jax.train.passes import evaluate

ROWS = 32  # of a batch, where neither the user nor a run says otherwise
TOKENS = 512  # of a row, likewise, unless the model takes fewer


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be left (None) to the run, or else to a default."""

    teacher: str | None = None  # folder or hub id
    text: str | None = None  # column of the text, or of the messages of chats
    separator: str | None = None  # eos | bos, clm: as in the model's training
    seq_len: int | None = None  # tokens
    batch_size: int | None = None  # rows over all devices
    precision: str | None = None  # fp32 | bf16


def evaluate_checkpoint(
    model: str, revision: str | None, task: str, data: str, options: Options
) -> Report:
    """Figures of an HF checkpoint on text, read with the checkpoint's own tokenizer.

    Args:
        model: folder, or hub id of `revision`.
        task: mlm | clm, a module of kd_jax.tasks.
        data: file, folder or glob.
        options: defaults are no teacher, rows of text as in the model's training where its folder
            says how (run/provenance.py), else of 512 tokens (or as many as the models take);
            batches of 32 rows, fp32.

    Returns:
        {"model", "commit", "teacher", "task", "data", "split", "seq_len", "separator" (clm),
        "batch_size", "precision", "loss" (nats a token), "perplexity", "accuracy", beside a
        teacher "kl" (teacher || model at T = 1, nats a token) and "agreement", "parameters",
        "size_mb", "machine", "seconds"}.

    Raises UserError for what is wrong with any of these, and where the model has no such head or
    no tokenizer, or the teacher has another one.
    """
    make_task = plugins.load("tasks", task, "make").make
    head = make_task({"name": task}, None, None).head
    rows = subject.rows(options.batch_size, ROWS)
    own = subject.of_checkpoint(model, revision, head, options.precision)
    teacher = _teacher(options.teacher, own)
    most = min(each.described.config.max_tokens for each in (own, teacher) if each is not None)
    given = {"seq_len": options.seq_len, "separator": options.separator}
    source = _source(task, data, options, given)
    config = provenance.task_of(own.described.folder, task, given, own.tokenizer)
    if config.setdefault("seq_len", min(TOKENS, most)) > most:
        raise UserError(
            f"--seq_len={config['seq_len']}: the models have positions for {most} tokens"
        )
    texts = make_task(config, {"test": source}, own.tokenizer)
    stated = own.stated | {"task": task, "data": texts.prepare()["test"]}
    return stated | _measure(own, teacher, texts, "test", rows, sharding.make_mesh())


def evaluate_stage(
    folder: str,
    stage: str,
    task: str | None,
    data: str | None,
    split: str | None,
    options: Options,
) -> Report:
    """Figures of the best checkpoint of a finished run's stage; see `evaluate_checkpoint`.

    Args:
        folder: the run directory.
        stage: one that the run trained.
        task: None, or the run's.
        data: file, folder or glob; None for the run's own.
        split: of the run's own data, validation | test; None for the one that it reports.
        options: defaults are the run's settings and its teacher.
    """
    made = runs.read(folder)
    trained = [name for name in made.stages if name in made.config["stages"]]
    if stage not in trained:  # what was only judged has no checkpoint
        raise made.no_stage(stage, trained)
    config, manifest = for_these_devices(made.config, options), made.results["data"]
    if task not in (None, config.task.name):
        raise UserError(f"{folder} is a run of task {config.task.name!r}, not {task!r}")
    split = "test" if data else split or made.results["split"]
    if data:
        config.data = ConfigDict({"test": _source(config.task.name, data, options, config.task)})
    elif split not in manifest:
        raise UserError(f"{folder} has no split {split!r}; have: {', '.join(manifest)}")
    run = build(config, made.workdir)
    own = subject.of_run(run, stage)
    teacher = _teacher(options.teacher, own)
    if teacher is None and run.stage(stage).model not in run.teachers:
        taught = [each.name for each in run.stages if each.model == "teacher"]
        teacher = subject.of_run(run, *(taught or ["teacher"]))
    stated = own.stated | {"task": config.task.name}
    stated["data"] = run.task.prepare()["test"] if data else manifest[split]
    rows = config.eval.batch_size
    return stated | _measure(own, teacher, run.task, split, rows, run.mesh, run.chunk)


def _source(task: str, data: str, options: Options, settings: Any) -> dict[str, str]:
    """The text at a path. A column that is named is a setting of the source, or of chats."""
    if options.text and task == "chat":
        settings["column"] = options.text
    elif options.text:
        return {"path": data, "text": options.text}
    return {"path": data}


def for_these_devices(config: dict, options: Options) -> ConfigDict:
    """The run's config, in which what concerns training alone fits any number of devices."""
    config = ConfigDict(config)
    config.precision = options.precision or config.precision
    config.task.seq_len = options.seq_len or config.task.seq_len
    config.eval.batch_size = options.batch_size or config.eval.batch_size
    config.mesh.fsdp = config.accumulate = 1
    config.batch_size = subject.rows(config.eval.batch_size, ROWS)
    for changes in config.stages.values():
        changes.batch_size = config.batch_size
    return config


def _teacher(model: str | None, own: Subject) -> Subject | None:
    """The checkpoint of --teacher, if there is one."""
    if model is None:
        return None
    precision = own.stated["precision"]
    found = subject.of_checkpoint(model, None, own.described.head, precision, "--teacher")
    if found.tokenizer.get_vocab() != own.tokenizer.get_vocab():
        raise UserError(
            f"--teacher={model} has another tokenizer than the model: the same ids would mean "
            f"other words; choose a teacher of the same vocabulary"
        )
    return found


def _measure(
    student: Subject,
    teacher: Subject | None,
    task: Any,
    split: str,
    batch_size: int,
    mesh: Mesh,
    chunk: int = 0,
) -> Report:
    frozen = None if teacher is None else teacher.frozen(mesh)
    how = measure.program(student.described.policy, frozen is not None, mesh, chunk)
    figures = evaluate(student.model(mesh), task.held_out(split, batch_size), frozen, how)
    return {
        "commit": student.described.commit,
        "teacher": None if teacher is None else teacher.described.name,
        "split": split,
        "seq_len": task.seq_len,
        **({"separator": task.separator} if hasattr(task, "separator") else {}),
        "batch_size": batch_size,
        **measure.with_perplexity(figures),
        **student.report(),
    }
