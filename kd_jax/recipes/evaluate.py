"""Evaluates a checkpoint, a stage or teacher of a finished run (run/subject.py), or a file of
predictions from any system on a task.

    made, report = evaluate_checkpoint("gpt2", None, "hellaswag", None, Options())
    report["acc"], made.write("out/")

There are three kinds of tasks. Language modelling (mlm, clm, chat): loss, perplexity and accuracy
on held-out text, with a teacher also the KL divergence and the agreement of the most likely token.
Examples (classification, regression, spans): the task's metrics. Likelihood: the perplexity of a
text, and multiple choice. Batches, masks and sums are those of training, so that evaluating a run's
stage on the run's own split reproduces its results.json.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from transformers import PreTrainedTokenizerBase

from kd_jax import plugins
from kd_jax.data import tokenizers
from kd_jax.errors import UserError
from kd_jax.models import family
from kd_jax.report import runs, tables
from kd_jax.report.table import Table, of_runs
from kd_jax.run import measure, provenance, subject
from kd_jax.run.models import check_types, class_order, compare_rules
from kd_jax.run.run import build
from kd_jax.run.subject import Report, Subject
from kd_jax.run.teaching import TeacherLogits
from kd_jax.tasks import command
from kd_jax.tasks.likelihood import LikelihoodTask, Scored
from kd_jax.teachers.ensemble import in_order
from kd_jax.train import sharding
from kd_jax.train.passes import predict

log = logging.getLogger(__name__)

TOKENS = 512  # of a row of text, where neither the user nor a run nor the model says otherwise
TEACHER = "teacher"  # of a run: the model that others are compared with


@dataclasses.dataclass(frozen=True)
class Options:
    """Optional settings; None takes the run's setting, that of the model's training, or else a
    default."""

    teacher: str | None = None  # language modelling: folder or hub id; the run's, else none
    text: str | None = None  # column of the text, or of the messages of chats
    pair: str | None = None  # task "text": column of a second text
    label: str | None = None  # task "text": column of the label
    labels: tuple[str, ...] | None = None  # classes in the order of the logits: config.json's
    separator: str | None = None  # eos | bos, before every text: clm, and by likelihood
    seq_len: int | None = None  # tokens of a row; by likelihood: that the model reads at once, else
    # all that it can, of a text (perplexity) as many as a row of its training had
    stride: int | None = None  # perplexity: half of seq_len
    documents: str | None = None  # perplexity: joined | alone: joined
    query_prompt: str | None = None  # embedding: before queries; as trained, else none
    document_prompt: str | None = None  # embedding: before documents; likewise
    batch_size: int | None = None  # rows over all devices
    precision: str | None = None  # fp32 | bf16: the run's, else fp32


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A model's logits for each row of a split of a task on examples."""

    task: Any
    outputs: list[np.ndarray]
    report: Report

    def write(self, out: str | Path) -> list[str]:
        """Writes predictions in the task's submission format, metrics by class and the confusion
        matrix; returns the paths."""
        folder = epath.Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / f"predictions.{'json' if self.task.head == 'span' else 'tsv'}"]
        self.task.write_submission(self.report["split"], self.outputs, str(written[0]))
        if "classes" in self.report:
            from kd_jax.report import pictures  # with matplotlib, slow to import

            written += [folder / "classes.md", folder / "confusion.png"]
            shown = tables.by_class(self.report["task"], [{"stages": {"": self.report}}])
            written[1].write_text(shown.markdown())
            names, counts = list(self.report["classes"]), self.report["confusion"]
            pictures.confusion_matrix(names, counts, written[2], title=self.report["task"])
        return [str(Path(path)) for path in written]


class Evaluated(NamedTuple):
    """The result of an evaluation: predictions or scores that can be written to a folder, if any,
    and the report {"model", "commit", "task", "split", "data", the task's metrics and settings,
    "parameters", "size_mb", "precision", "machine", "seconds"}."""

    made: measure.Scores | Predictions | None
    report: Report


def table(found: dict) -> Table:
    """Makes a table of one report, or of the reports of a run's stages."""
    first = next(iter(found.get("stages", {"": found}).values()))
    about = [first["data"]["name"], first["task"]]
    if "stride" in first:
        about += [f"windows of {first['seq_len']} tokens, stride {first['stride']}"]
        about += [f"documents {first['documents']}"]
    elif "seq_len" in first:
        about += [f"rows of {first['seq_len']} tokens"]
    about += [f"joined by {first['separator']}"] if "separator" in first else []
    about += [first["precision"]] if "precision" in first else []
    about += [f"beside {first['teacher']}"] if first.get("teacher") else []
    if "stages" in found:
        return tables.scores(found["stages"], ", ".join(about))
    name = found.get("stage") or Path(found.get("model") or found["predictions"]).name
    kind = command.tasks().get(found["task"].partition("/")[0])  # None: a run's own name of it
    if kind and kind.by_likelihood:
        return tables.scores({name: found}, ", ".join(about))
    return of_runs([{"stages": {name: found}}], ", ".join(about))


def make_task(
    name: str,
    data: str | None,
    options: Options,
    tokenizer: PreTrainedTokenizerBase | None = None,
    folder: Path | None = None,
    **defaults: Any,
) -> Any:
    """Makes the task called `name` on command lines, on a local file or folder, or, if `data` is
    None, on the split that the task reports.

    With a tokenizer, rows are made as in the training of the model in `folder`, if its files record
    that, else with `defaults` of config.task. Raises UserError for an unknown task, and for
    settings that it does not have.
    """
    kind, config = command.find(name), command.config(name, dataclasses.asdict(options))
    if tokenizer is not None:
        config = defaults | provenance.task_of(folder, config.pop("name"), config, tokenizer)
    source = None if data is None else command.source(kind, data, options.text)
    return command.build(name, config, source, tokenizer)


def evaluate_checkpoint(
    model: str, revision: str | None, task: str, data: str | None, options: Options
) -> Evaluated:
    """Evaluates an HF checkpoint with its tokenizer.

    Args:
        model: folder, or hub id of `revision`.
        task: its name on command lines (tasks/command.py).
        data: file, folder or glob; None for the task's reported split on the hub.
        options: defaults are no teacher; rows of text as in the model's training if its folder
            records that (run/provenance.py), else of the task's default length or 512 tokens, or
            as many as the models take; batches of 32 rows; fp32.

    Raises UserError for mistakes in any of these, and if the model lacks the head or a tokenizer,
    or the teacher has a different one.
    """
    bare = make_task(task, data, dataclasses.replace(options, labels=None))
    scored = bare.by_likelihood
    rows = subject.rows(options.batch_size)
    own = subject.of_checkpoint(model, revision, "clm" if scored else bare.head, options.precision)
    if scored:
        trained = provenance.trained(own.described.folder)
        return _score(own, _encoded(bare, own, options, trained), bare, task, rows)
    evaluate = _examples_of_checkpoint if bare.of_examples else _text_of_checkpoint
    return evaluate(own, task, data, options, rows)


def _text_of_checkpoint(
    own: Subject, task: str, data: str | None, options: Options, rows: int
) -> Evaluated:
    teacher = _teacher(options.teacher, own)
    most = _most_tokens(options.seq_len, *filter(None, (own, teacher)))
    folder = own.described.folder
    this = make_task(task, data, options, own.tokenizer, folder, seq_len=min(TOKENS, most))
    _most_tokens(this.seq_len, *filter(None, (own, teacher)))
    about = {"task": task, "split": "test", "data": this.prepare()["test"]}
    return _text(own, teacher, this, about, rows)


def _examples_of_checkpoint(
    own: Subject, task: str, data: str | None, options: Options, rows: int
) -> Evaluated:
    described, mesh = own.described, sharding.make_mesh()
    labels = None
    trained = provenance.trained(described.folder)
    if command.reads(command.find(task), "labels") and not trained.get("labels"):
        labels = tuple(options.labels or described.config.labels)
    given = dataclasses.replace(options, labels=labels)
    stated = command.find(task).settings_of(described.config, task)
    this = make_task(task, data, given, own.tokenizer, described.folder, **stated)
    most = _most_tokens(options.seq_len, own)
    this.seq_len = options.seq_len or min(this.seq_len, most)
    check_types("model", described, own.tokenizer, this.examples("test").pairs[0])
    order = None
    if this.regression and len(described.config.labels) != 1:
        raise UserError(
            f"{own.stated['model']} has {len(described.config.labels)} classes, and task "
            f"{task} needs one score"
        )
    if this.head == "classification" and not this.regression:
        names = described.config.labels, this.labels
        order = class_order(own.stated["model"], options.labels, *names, "--labels")
    stream = this.held_out("test", rows)
    logits = predict(own.model(mesh), stream.batches(), mesh, family.PARTITION)
    outputs = [in_order(logits[i], order) for i in range(len(logits))]
    return _examples(own, this, outputs, task, "test")


def _most_tokens(seq_len: int | None, *models: Subject) -> int:
    """Computes the length of rows that all models take. Raises UserError if `seq_len` is longer."""
    most = min(each.described.config.max_tokens for each in models)
    if (seq_len or 0) > most:
        raise UserError(f"--seq_len={seq_len}: there are positions for {most} tokens only")
    return most


def evaluate_stage(
    folder: str,
    stage: str | None,
    task: str | None,
    data: str | None,
    split: str | None,
    options: Options,
) -> Evaluated:
    """Evaluates the best checkpoint of a finished run's stage, or a teacher that the run loaded.

    Args:
        folder: the run directory.
        stage: a trained stage, or a teacher; None for the one that the run reports as its student.
        task: the run's task (or None), or a task that is scored by likelihood.
        data: file, folder or glob; None for the run's data, or the task's on the hub.
        split: of the run's data, validation | test; None for the split that the run reports.
        options: defaults are the run's settings and its teacher.

    Returns and raises as `evaluate_checkpoint` does.
    """
    if stage and task and command.find(task).by_likelihood:
        return evaluate_run(folder, task, data, options, stage)[stage]
    made = runs.read(folder)
    rows = options.batch_size or made.config["eval"]["batch_size"]
    config = subject.for_these_devices(made.config, rows, options.precision)
    config.task.seq_len = options.seq_len or config.task.seq_len
    name, manifest = config.task.name, made.results["data"]
    if task not in (None, name):
        raise UserError(f"{folder} is a run of task {name!r}, not {task!r}")
    kind = plugins.load("tasks", name, "make").make
    of_examples = kind.of_examples
    if data:
        others = config.data if of_examples else {}  # buckets are those of the training data
        if options.text and kind.of_chats:
            config.task.column = options.text
        config.data = {**others, "test": command.source(kind, data, options.text)}
    elif not of_examples and split is not None and split not in manifest:
        raise UserError(f"{folder} has no split {split!r}; have: {', '.join(manifest)}")
    run = build(config, made.workdir)
    stage = stage or run.principal.name
    trained = [each.name for each in run.stages if each.name in made.stages]
    if stage not in trained and stage not in set(run.teachers) - set(run.trained):
        raise made.no_stage(stage, trained)
    own, this = subject.of_run(run, stage), run.stage(stage)
    if of_examples:
        split = split or run.split
        if this is None:
            teachers = TeacherLogits(run, {stage: own.params})
            model, logits = stage, functools.partial(teachers.of, stage)
        else:
            model = this.model
            logits = functools.partial(measure.logits, run, model, own.model(run.mesh))
        task, outputs = measure.scored(run.tasks[model], logits, split)
        return _examples(own, task, outputs, name, split)
    split = "test" if data else split or made.results["split"]
    teacher = _teacher(options.teacher, own)
    if teacher is None and this is not None and this.model not in run.teachers:
        taught = [each.name for each in run.stages if each.model == TEACHER]
        teacher = subject.of_run(run, *(taught or [TEACHER]))
    about = run.task.prepare()["test"] if data else manifest[split]
    about = {"task": name, "split": split, "data": about}
    return _text(own, teacher, run.task, about, rows, run.chunk)


def evaluate_run(
    folder: str, task: str, data: str | None, options: Options, only: str | None = None
) -> dict[str, Evaluated]:
    """Scores the models of a finished run by likelihood, or `only` one of them.

    Returns them by name, the teacher first; the report of every other model also compares it with
    the teacher, under "beside_teacher".
    """
    this, made = make_task(task, data, options), runs.read(folder)
    name = made.config["task"]["name"]
    if plugins.load("tasks", name, "make").make.head != "clm":
        raise UserError(
            f"{folder} is a run of task {name!r}, whose models are not causal: likelihoods "
            f"need one of task 'clm' or 'chat'"
        )
    rows = subject.rows(options.batch_size)
    config = subject.for_these_devices(made.config, rows, options.precision)
    run = build(config, made.workdir)
    stages = [each.name for each in run.stages if each.name in made.stages]
    have = list(dict.fromkeys([TEACHER, *stages]))
    if not stages or only not in (None, *have):
        raise made.no_stage(only or run.principal.name, have if stages else ())
    found: dict[str, Evaluated] = {}
    scored = None
    for each in have if only is None else [only]:
        own = subject.of_run(run, each)
        scored = scored or _encoded(this, own, options, run.config.task)
        found[each] = _score(own, scored, this, task, rows)
        if len(found) > 1:
            comparison = found[each].made.compared_with(found[TEACHER].made)
            found[each].report["beside_teacher"] = comparison
    return found


def evaluate_predictions(task: str, data: str | None, file: str, options: Options) -> Report:
    """Scores a file of predictions in the task's format; returns {"predictions", "task", "data",
    figures}."""
    this = make_task(task, data, options)
    found = this.score_predictions("test", this.read_predictions("test", file))
    about = {"predictions": file, "task": task, "split": "test", "data": _manifest(this, "test")}
    return about | found


def _teacher(model: str | None, own: Subject) -> Subject | None:
    """Loads the description of the checkpoint that --teacher names; None without one."""
    if model is None:
        return None
    precision = own.stated["precision"]
    found = subject.of_checkpoint(model, None, own.described.head, precision, "--teacher")
    if found.tokenizer.get_vocab() != own.tokenizer.get_vocab():
        raise UserError(
            f"--teacher={model} has another tokenizer than the model: the same ids would mean "
            f"other words; choose a teacher of the same vocabulary"
        )
    compare_rules(f"--teacher={model}", found.tokenizer, own.tokenizer, "the model's")
    return found


def _text(
    own: Subject, teacher: Subject | None, task: Any, about: Report, rows: int, chunk: int = 0
) -> Evaluated:
    mesh = sharding.make_mesh()
    frozen = None if teacher is None else teacher.model(mesh, frozen=True)
    stream = task.held_out(about["split"], rows)
    figures = measure.of_stream(own.model(mesh), frozen, stream, own.described.policy, mesh, chunk)
    settings = {"teacher": teacher and teacher.described.name, "seq_len": task.seq_len}
    settings |= {"separator": task.separator} if hasattr(task, "separator") else {}
    return Evaluated(None, own.report(about | settings | {"batch_size": rows} | figures))


def _examples(own: Subject, task: Any, outputs: list, name: str, split: str) -> Evaluated:
    about = {"task": name, "split": split, "data": _manifest(task, split)}
    figures = measure.of_logits(task, outputs, split) if task.has_labels(split) else {}
    report = own.report(about | figures)
    return Evaluated(Predictions(task, outputs, report), report)


def _manifest(task: Any, split: str) -> dict[str, Any]:
    """Describes the evaluated split, for the report: its name, digest and number of examples."""
    found = task.examples(split)
    return {"name": found.name, "digest": found.digest, "examples": len(found)}


def _encoded(
    task: LikelihoodTask, own: Subject, options: Options, trained: Mapping[str, Any]
) -> Scored:
    """Tokenizes the task's rows; texts begin with the same token as in the model's training, whose
    config.task is `trained` ({} if unknown)."""
    tokenizer = tokenizers.begun_by(own.tokenizer, options.separator or trained.get("separator"))
    most = _most_tokens(task.seq_len, own)
    used = trained.get("seq_len", most)
    if task.seq_len is None and used < most:
        most = used if task.as_trained else most
        log.info(
            "the model was trained on rows of %d tokens and reads up to %d at once here; --seq_len "
            "takes another number",
            *(used, most),
        )
    return task.encoded(tokenizer, task.seq_len or most)


def _score(own: Subject, scored: Scored, task: LikelihoodTask, name: str, rows: int) -> Evaluated:
    mesh = sharding.make_mesh()
    found = measure.score(own.model(mesh), scored, own.described.policy, rows, mesh)
    about = {"task": name, "data": task.manifest()} | found.figures | {"batch_size": rows}
    return Evaluated(found, own.report(about))
