"""Figures of a classifier, regression or answer extractor on a task: of a checkpoint, of a stage of
a run, or of a file of predictions that any system may have written.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from kd_jax import plugins
from kd_jax.data.buckets import BucketStream, lengths_of
from kd_jax.errors import UserError
from kd_jax.evals import pictures, runs, table
from kd_jax.models import family
from kd_jax.run import measure, provenance, subject
from kd_jax.run.answers import Answers
from kd_jax.run.models import check_types, check_vocabulary, class_order
from kd_jax.run.run import build
from kd_jax.run.subject import Report
from kd_jax.teachers.several import in_order
from kd_jax.train import sharding
from kd_jax.train.passes import predict
from kd_jax.types import Model

TASKS = ("glue/NAME", "squad", "agnews", "phrasebank/LEVEL", "text")
ROWS = 64  # of a batch, where nobody says otherwise


def task_config(name: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """config.task of a task as command lines call it; `columns` are settings of "text"."""
    kind, _, part = name.partition("/")
    parts = {"glue": "task", "phrasebank": "level"}
    if kind in parts and part:
        return {"name": kind, parts[kind]: part}
    if part or kind not in ("squad", "agnews", "text"):
        raise UserError(f"--task={name}: have {', '.join(TASKS)}, mlm, clm")
    if kind == "text":
        return {"name": "labelled_text"} | columns
    return {"name": kind}


def make_task(
    name: str,
    columns: Mapping[str, Any],
    data: str | None,
    tokenizer: Any = None,
    folder: Path | None = None,
):
    """The task on its own reported split, or on all rows of a local file or folder; read as in the
    training of the model in `folder`, where that says how."""
    config = task_config(name, columns)
    config = provenance.task_of(folder, config.pop("name"), config, tokenizer)
    if name == "squad" and config.get("null_threshold") is None:
        config["null_threshold"] = 0.0  # no validation split to tune it on
    given = None if data is None else {"test": {"source": "files", "path": data}}
    if config["name"] == "labelled_text" and config.get("labels") is None and given:
        given["train"] = given["test"]  # the classes are those that occur
    if data is None and config["name"] in ("labelled_text", "phrasebank"):
        raise UserError(f"--task={name} needs --data, a local file or folder")
    return plugins.load("tasks", config["name"], "make").make(config, given, tokenizer)


def of_checkpoint(
    model: str,
    revision: str | None,
    task: str,
    columns: Mapping[str, Any],
    data: str | None,
    labels: Sequence[str] | None,
    seq_len: int | None,
    batch_size: int | None,
    precision: str | None,
) -> tuple[Any, list[np.ndarray], Report]:
    """An HF checkpoint with a classification or span head, on a task.

    Args:
        model: folder, or hub id of `revision`.
        task: one of TASKS.
        columns: of the task "text": text, pair, label.
        data: file or folder; None for the task's reported split on the hub.
        labels: the model's class names in its own order, where its config.json has none.
        seq_len: tokens of a row at most; as in the model's training where its folder says so, else
            the task's own default, or what the model can read.
        batch_size, precision: default 64 rows, fp32.

    Returns:
        the task; its outputs, logits of each row of the split "test"; and {"model", "commit",
        "task", "split", "data", the task's figures, "classes" and "confusion" where there are
        classes, "parameters", "size_mb", "precision", "machine", "seconds"}.
    """
    head = make_task(task, columns, data).head
    size = subject.rows(batch_size, ROWS)
    own = subject.of_checkpoint(model, revision, head, precision)
    described, mesh = own.described, sharding.make_mesh()
    check_vocabulary("model", described, own.tokenizer)
    known = columns.get("labels") or provenance.trained(described.folder).get("labels")
    if task == "text" and not known:
        columns = {**columns, "labels": tuple(labels or described.config.labels)}
    this = make_task(task, columns, data, own.tokenizer, described.folder)
    most = described.config.max_tokens
    if seq_len is not None and not 0 < seq_len <= most:
        raise UserError(f"--seq_len={seq_len}: the model has positions for {most} tokens")
    this.seq_len = seq_len or min(this.seq_len, most)
    check_types("model", described, own.tokenizer, this.examples("test").pairs[0])
    order = None
    if head == "classification" and not this.regression:
        order = class_order(model, labels, described.config.labels, this.labels, "--labels")
    encoded = this.rows("test")  # in lengths of their own: the training data need not be there
    lengths = lengths_of(encoded.lengths_N, this.seq_len)
    stream = BucketStream(encoded.lengths_N, lengths, encoded.batch, size)
    found = predict(own.model(mesh), stream, mesh, family.PARTITION)
    outputs = [in_order(found[i], order) for i in range(len(found))]
    report = own.stated | {"task": task, "split": "test", "data": manifest(this, "test")}
    if this.has_labels("test"):
        report |= measure.of_logits(this, outputs, "test")
    return this, outputs, report | own.report()


def of_stage(
    folder: str, name: str, data: str | None, split: str | None
) -> tuple[Any, list[np.ndarray], Report]:
    """The best checkpoint of a finished run's stage, on the run's own data or on `data`; see
    `of_checkpoint`."""
    made = runs.read(folder)
    config = ConfigDict(made.config, type_safe=False)
    config.mesh.fsdp = config.accumulate = 1
    if data:
        config.data.test = {"source": "files", "path": data}
    run = build(config, made.workdir)
    split, this = split or run.split, run.stage(name)
    if this is None and (name not in run.teachers or name in run.trained):
        raise made.no_stage(name, [each.name for each in run.stages])
    own = subject.of_run(run, name)
    if this is None:
        model, logits = name, functools.partial(Answers(run, {name: own.params}).of, name)
    else:
        model = this.model
        whole = Model(own.params, own.described.abstract().graphdef)
        logits = functools.partial(measure.logits, run, model, whole)
    task = run.tasks[model]
    if task.tunes(split):
        task = task.tuned(logits("validation"))
    outputs = logits(split)
    report = own.stated | {"task": config.task.name, "split": split, "data": manifest(task, split)}
    report |= measure.of_logits(task, outputs, split)
    return task, outputs, report | own.report()


def of_predictions(task: str, columns: Mapping[str, Any], data: str | None, file: str) -> Report:
    """A file of predictions in the task's format: {"predictions", "task", "data", figures}."""
    this = make_task(task, columns, data)
    found = this.score_predictions("test", this.read_predictions("test", file))
    about = {"predictions": file, "task": task, "split": "test", "data": manifest(this, "test")}
    return about | found


def manifest(task: Any, split: str) -> dict[str, Any]:
    """Which examples figures are of."""
    found = task.examples(split)
    return {"name": found.name, "digest": found.digest, "examples": len(found)}


def write_files(task: Any, outputs: list, report: Report, out: str) -> list[str]:
    """The predictions in the task's submission format, figures by class, the confusion matrix."""
    folder = epath.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "json" if task.head == "span" else "tsv"
    written = [folder / f"predictions.{suffix}"]
    task.write_submission(report["split"], outputs, str(written[0]))
    if "classes" in report:
        written.append(folder / "classes.md")
        written[-1].write_text(by_class(report).markdown())
        path = folder / "confusion.png"
        names = list(report["classes"])
        pictures.confusion_matrix(names, report["confusion"], path, title=report["task"])
        written.append(path)
    return [str(Path(path)) for path in written]


def by_class(report: Report) -> table.Table:
    """Precision, recall and F1 of every class."""
    rows = [
        [
            name,
            *(f"{found[key]:.4f}" for key in ("precision", "recall", "f1")),
            str(found["support"]),
        ]
        for name, found in report["classes"].items()
    ]
    return table.Table("", ["class", "precision", "recall", "F1", "examples"], rows)
