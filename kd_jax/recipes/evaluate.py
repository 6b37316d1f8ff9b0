"""Evaluates a model on a task: a checkpoint, a stage of a finished run or a teacher that the run
was given (run/subject.py), or a file of predictions that any system may have written.

    made, report = evaluate_checkpoint("gpt2", None, "hellaswag", None, Options())
    report["acc"], made.write("out/")

Tasks are of three kinds. Language modelling (mlm, clm, chat) gives loss, perplexity and accuracy on
held-out text, and beside a teacher the divergence from it and how often both choose the same token.
Examples (classification, regression, answers) give the task's figures of logits. Likelihood gives
the perplexity of a text, and multiple choice. Steps, masks and sums are those of training, so that
a run's stage on the run's own split gives what its results.json says.
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
from kd_jax.data.buckets import BucketStream, lengths_of
from kd_jax.errors import UserError
from kd_jax.models import family
from kd_jax.report import pictures, runs, tables
from kd_jax.run import measure, provenance, subject
from kd_jax.run.answers import Answers
from kd_jax.run.models import check_types, class_order, compare_rules
from kd_jax.run.run import build
from kd_jax.run.subject import Report, Subject
from kd_jax.tasks import text
from kd_jax.tasks.perplexity import Perplexity
from kd_jax.tasks.scoring import Scored, ScoringTask
from kd_jax.teachers.several import in_order
from kd_jax.train import sharding
from kd_jax.train.passes import predict

log = logging.getLogger(__name__)

LANGUAGE = ("mlm", "clm", "chat")
EXAMPLES = ("glue/NAME", "squad", "agnews", "phrasebank/LEVEL", "text")
LIKELIHOOD = ("perplexity", "cbt", "cbt/CLASS", "hellaswag")
PARTS = {"glue": "task", "phrasebank": "level", "cbt": "classes"}  # what the name's end sets

ROWS = 32  # of a batch, where neither the user nor a run says otherwise
ROWS_OF_EXAMPLES = 64  # likewise
TOKENS = 512  # of a row of text, likewise, unless the model takes fewer
TEACHER = "teacher"  # of a run: the model that others are compared with


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be left (None) to the run, to what is known of the model's training, or else to a
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
    batch_size: int | None = None  # rows over all devices
    precision: str | None = None  # fp32 | bf16: the run's, else fp32


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a model answers in a task on examples: logits of each row of a split."""

    task: Any
    outputs: list[np.ndarray]
    report: Report

    def write(self, out: str | Path) -> list[str]:
        """Writes predictions in the task's submission format, figures by class, the confusion
        matrix; their paths."""
        folder = epath.Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / f"predictions.{'json' if self.task.head == 'span' else 'tsv'}"]
        self.task.write_submission(self.report["split"], self.outputs, str(written[0]))
        if "classes" in self.report:
            written += [folder / "classes.md", folder / "confusion.png"]
            written[1].write_text(
                tables.by_class(self.report["task"], [{"": self.report}]).markdown()
            )
            names, counts = list(self.report["classes"]), self.report["confusion"]
            pictures.confusion_matrix(names, counts, written[2], title=self.report["task"])
        return [str(Path(path)) for path in written]


class Evaluated(NamedTuple):
    """What was made, where it can be written to a folder; and {"model", "commit", "task", "split",
    "data", the task's figures and settings, "parameters", "size_mb", "precision", "machine",
    "seconds"}."""

    made: measure.Scores | Predictions | None
    report: Report


def by_likelihood(task: str) -> bool:
    """Whether a task, as command lines call it, is scored by likelihood."""
    return task.partition("/")[0] in LIKELIHOOD


def task_config(name: str, options: Options) -> dict[str, Any]:
    """config.task of a task as command lines call it, with those options that it reads."""
    kind, _, part = name.partition("/")
    if part and kind not in PARTS or name in ("glue", "phrasebank"):
        have = LIKELIHOOD if by_likelihood(name) else (*EXAMPLES, *LANGUAGE)
        raise UserError(f"--task={name}: have {', '.join(have)}")
    config: dict[str, Any] = {"name": "labelled_text" if kind == "text" else kind}
    if part:
        config[PARTS[kind]] = (part,) if kind == "cbt" else part
    of_examples = any(kind == each.partition("/")[0] for each in EXAMPLES)
    read = [] if of_examples else ["seq_len"]  # of examples, a row may be shorter than in training
    read += ["text", "pair", "label", "labels"] if kind == "text" else []
    read += ["separator"] if kind in LANGUAGE else []
    read += ["stride", "documents"] if by_likelihood(name) else []
    config |= {key: getattr(options, key) for key in read}
    config |= {"column": options.text} if kind == "chat" else {}
    return {key: value for key, value in config.items() if value is not None}


def make_task(
    name: str,
    data: str | None,
    options: Options,
    tokenizer: PreTrainedTokenizerBase | None = None,
    folder: Path | None = None,
    **defaults: Any,
) -> Any:
    """The task that command lines call `name`, on a local file or folder, or where `data` is None
    on its own reported split; with a tokenizer it is read as in the training of the model in
    `folder`, where that says how, and else with `defaults` of config.task.

    Raises UserError for a task that there is not, and settings that it does not have.
    """
    config = task_config(name, options)
    source = None if data is None else _source(config["name"], data, options)
    if by_likelihood(name):
        return plugins.load("tasks", config["name"], "scoring").scoring(config, {"test": source})
    if tokenizer is not None:
        config = defaults | provenance.task_of(folder, config.pop("name"), config, tokenizer)
    if name == "squad" and config.get("null_threshold") is None:
        config["null_threshold"] = 0.0  # no validation split to tune it on
    given = None if data is None else {"test": source}
    if config["name"] == "labelled_text" and config.get("labels") is None and given:
        given["train"] = given["test"]  # the classes are those that occur
    if data is None and config["name"] in ("labelled_text", "phrasebank"):
        raise UserError(f"--task={name} needs --data, a local file or folder")
    return plugins.load("tasks", config["name"], "make").make(config, given, tokenizer)


def _source(task: str, data: str, options: Options) -> dict[str, str]:
    """The file, folder or glob as a source; which column is a setting of chats and of labelled
    texts themselves."""
    column = {} if task in ("chat", "labelled_text") or not options.text else {"text": options.text}
    return {"source": "files", "path": data} | column


def evaluate_checkpoint(
    model: str, revision: str | None, task: str, data: str | None, options: Options
) -> Evaluated:
    """Evaluates an HF checkpoint, with its own tokenizer.

    Args:
        model: folder, or hub id of `revision`.
        task: one of LANGUAGE, EXAMPLES, LIKELIHOOD, or another module of kd_jax.tasks.
        data: file, folder or glob; None for the task's reported split on the hub.
        options: defaults are no teacher, rows of text as in the model's training where its folder
            says how (run/provenance.py), else of the task's own length or 512 tokens (or as many
            as the models take); batches of 32 rows, of 64 examples, fp32.

    Raises UserError for what is wrong with any of these, and where the model has no such head or
    no tokenizer, or the teacher has another one.
    """
    bare = make_task(task, data, dataclasses.replace(options, labels=None))
    if by_likelihood(task):
        own = subject.of_checkpoint(model, revision, "clm", options.precision)
        scored = _encoded(bare, own, options, provenance.trained(own.described.folder))
        return _score(own, scored, bare, task, options)
    rows = subject.rows(options.batch_size, ROWS_OF_EXAMPLES if bare.of_examples else ROWS)
    own = subject.of_checkpoint(model, revision, bare.head, options.precision)
    evaluate = _examples_of_checkpoint if bare.of_examples else _text_of_checkpoint
    return evaluate(own, task, data, options, rows)


def _text_of_checkpoint(
    own: Subject, task: str, data: str | None, options: Options, rows: int
) -> Evaluated:
    teacher, folder = _teacher(options.teacher, own), own.described.folder
    most = min(each.described.config.max_tokens for each in (own, teacher) if each is not None)
    this = make_task(task, data, options, own.tokenizer, folder, seq_len=min(TOKENS, most))
    if this.seq_len > most:
        raise UserError(f"--seq_len={this.seq_len}: the models have positions for {most} tokens")
    about = {"task": task, "split": "test", "data": this.prepare()["test"]}
    return _text(own, teacher, this, about, rows)


def _examples_of_checkpoint(
    own: Subject, task: str, data: str | None, options: Options, rows: int
) -> Evaluated:
    described, mesh = own.described, sharding.make_mesh()
    labels = None
    if task == "text" and not provenance.trained(described.folder).get("labels"):
        labels = tuple(options.labels or described.config.labels)
    given = dataclasses.replace(options, labels=labels)
    this = make_task(task, data, given, own.tokenizer, described.folder)
    most = described.config.max_tokens
    if (options.seq_len or 0) > most:
        raise UserError(f"--seq_len={options.seq_len}: the model has positions for {most} tokens")
    this.seq_len = options.seq_len or min(this.seq_len, most)
    check_types("model", described, own.tokenizer, this.examples("test").pairs[0])
    order = None
    if this.head == "classification" and not this.regression:
        names = described.config.labels, this.labels
        order = class_order(own.stated["model"], options.labels, *names, "--labels")
    found = this.rows("test")  # in lengths of their own: the training data need not be there
    lengths = lengths_of(found.lengths_N, this.seq_len)
    stream = BucketStream(found.lengths_N, lengths, found.batch, rows)
    logits = predict(own.model(mesh), stream, mesh, family.PARTITION)
    outputs = [in_order(logits[i], order) for i in range(len(logits))]
    return _examples(own, this, outputs, task, "test")


def evaluate_stage(
    folder: str,
    stage: str | None,
    task: str | None,
    data: str | None,
    split: str | None,
    options: Options,
) -> Evaluated:
    """Evaluates the best checkpoint of a finished run's stage, or a teacher that the run was given;
    see `evaluate_checkpoint`.

    Args:
        folder: the run directory.
        stage: one that the run trained, or a teacher; None for the one that the run is about.
        task: None, or the run's; or one of LIKELIHOOD.
        data: file, folder or glob; None for the run's own, or the hub's.
        split: of the run's own data, validation | test; None for the one that it reports.
        options: defaults are the run's settings and its teacher.
    """
    if stage and task and by_likelihood(task):
        return evaluate_run(folder, task, data, options, stage)[stage]
    made = runs.read(folder)
    rows = options.batch_size or made.config["eval"]["batch_size"]
    config = subject.for_these_devices(made.config, rows, options.precision)
    config.task.seq_len = options.seq_len or config.task.seq_len
    name, manifest = config.task.name, made.results["data"]
    if task not in (None, name):
        raise UserError(f"{folder} is a run of task {name!r}, not {task!r}")
    of_examples = plugins.load("tasks", name, "make").make.of_examples
    if data:
        others = config.data if of_examples else {}  # buckets are those of the training data
        if options.text and name == "chat":
            config.task.column = options.text
        config.data = {**others, "test": _source(name, data, options)}
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
            model, logits = stage, functools.partial(Answers(run, {stage: own.params}).of, stage)
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
    """Scores the models of a finished run by likelihood, by name: the teacher first, and every
    stage beside it, whose report has also what `Scores.beside` says, as "beside_teacher"; or `only`
    one of them."""
    this, made = make_task(task, data, options), runs.read(folder)
    name = made.config["task"]["name"]
    if plugins.load("tasks", name, "make").make.head != "clm":
        raise UserError(
            f"{folder} is a run of task {name!r}, whose models are not causal: likelihoods "
            f"need one of task 'clm' or 'chat'"
        )
    rows = subject.rows(options.batch_size, ROWS)
    config = subject.for_these_devices(made.config, rows, options.precision)
    run = build(config, made.workdir)
    stages = [each.name for each in run.stages if each.name in made.stages]
    have = list(dict.fromkeys([TEACHER, *stages]))
    if not stages or only not in (None, *have):
        raise made.no_stage(only or "student", have if stages else ())
    found: dict[str, Evaluated] = {}
    scored = None
    for each in have if only is None else [only]:
        own = subject.of_run(run, each)
        scored = scored or _encoded(this, own, options, run.config.task)
        found[each] = _score(own, scored, this, task, options)
        if len(found) > 1:
            beside = found[each].made.beside(found[TEACHER].made)
            found[each].report["beside_teacher"] = beside
    return found


def evaluate_predictions(task: str, data: str | None, file: str, options: Options) -> Report:
    """A file of predictions in the task's format: {"predictions", "task", "data", figures}."""
    this = make_task(task, data, options)
    found = this.score_predictions("test", this.read_predictions("test", file))
    about = {"predictions": file, "task": task, "split": "test", "data": _manifest(this, "test")}
    return about | found


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
    """Which examples figures are of."""
    found = task.examples(split)
    return {"name": found.name, "digest": found.digest, "examples": len(found)}


def _encoded(
    task: ScoringTask, own: Subject, options: Options, trained: Mapping[str, Any]
) -> Scored:
    """The task's rows; texts begin as in training, whose config.task is `trained` ({}: unknown)."""
    tokenizer = text.begun_by(own.tokenizer, options.separator or trained.get("separator"))
    most = own.described.config.max_tokens
    used = trained.get("seq_len", most)
    if (task.seq_len or 0) > most:
        raise UserError(
            f"config.task.seq_len={task.seq_len}: the model has positions for {most} tokens"
        )
    if task.seq_len is None and used < most:
        most = used if isinstance(task, Perplexity) else most
        log.info(
            "the model was trained on rows of %d tokens and reads up to %d at once here; --seq_len "
            "takes another number",
            *(used, most),
        )
    return task.encoded(tokenizer, task.seq_len or most)


def _score(
    own: Subject, scored: Scored, task: ScoringTask, name: str, options: Options
) -> Evaluated:
    mesh, rows = sharding.make_mesh(), subject.rows(options.batch_size, ROWS)
    found = measure.score(own.model(mesh), scored, own.described.policy, rows, mesh)
    about = {"task": name, "data": task.manifest()} | found.figures | {"batch_size": rows}
    return Evaluated(found, own.report(about))
