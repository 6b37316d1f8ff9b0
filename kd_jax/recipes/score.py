"""Scores a causal language model on perplexity and multiple choice: a checkpoint, a stage of a run,
or any model that another recipe has at hand.

    task = make_task("hellaswag", "hellaswag_val.jsonl")
    scored = encode(task, tokenizer, config.max_tokens)  # once for all models of one tokenizer
    found = score(model, scored, policy, batch_size, mesh)
    found.figures["acc_norm"], found.log_likelihoods_N, found.beside(score(other, ...))
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from transformers import PreTrainedTokenizerBase

from kd_jax import plugins
from kd_jax.errors import UserError
from kd_jax.evals import likelihood, runs
from kd_jax.models import family
from kd_jax.precision import Policy
from kd_jax.recipes import evaluate as held_out
from kd_jax.recipes.evaluate import for_these_devices
from kd_jax.run import provenance, subject
from kd_jax.run.models import check_vocabulary
from kd_jax.run.run import Run, build
from kd_jax.run.subject import Report, Subject
from kd_jax.tasks import text
from kd_jax.tasks.perplexity import Perplexity
from kd_jax.tasks.scoring import Scored, ScoringTask
from kd_jax.train import sharding
from kd_jax.train.passes import log_likelihoods
from kd_jax.types import Model

log = logging.getLogger(__name__)

TASKS = ("perplexity", "cbt", "cbt/CLASS", "hellaswag")
KINDS = tuple(dict.fromkeys(task.partition("/")[0] for task in TASKS))
ROWS = 32  # of a batch, where nobody says otherwise

TEACHER = "teacher"  # of a run: the model that others are compared with


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be left (None) to a default."""

    seq_len: int | None = None  # tokens that the model reads at once: all that it can; of a text
    # (perplexity) as many as a row of its training had, if that is known
    text: str | None = None  # perplexity: column of the text
    separator: str | None = None  # eos | bos, before every text: as in the model's training
    stride: int | None = None  # perplexity: half of seq_len
    documents: str | None = None  # perplexity: joined | alone: joined
    batch_size: int | None = None  # rows over all devices: 32
    precision: str | None = None  # fp32 | bf16: the run's, else fp32


@dataclasses.dataclass(frozen=True)
class Scores:
    """What one model gets in one task."""

    task: Scored
    log_likelihoods_N: np.ndarray  # float64, nats, one a stretch (ending, window) of the task

    @property
    def figures(self) -> dict[str, Any]:
        """What the task reports; `evals` and the task's docstring name the units."""
        return self.task.figures(self.log_likelihoods_N)

    def beside(self, original: Scores) -> dict[str, float | None]:
        """What is left of the original model's answers: `evals.likelihood.compare`."""
        of_original, own = original.log_likelihoods_N, self.log_likelihoods_N
        hits = self.task.hits(of_original), self.task.hits(own)
        return likelihood.compare(of_original, own, *hits, self.task.chance)

    def write(self, path: Path) -> None:
        """A line of JSON for each stretch, in the data's order."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lines:
            for record in self.task.records(self.log_likelihoods_N):
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def make_task(
    name: str, data: str | Mapping[str, Any] | None, options: Options = Options()
) -> ScoringTask:
    """The task that command lines call `name`, on a local file or folder, on a source
    (data/source.py), or where `data` is None on the hub's split.

    Raises UserError for a task that there is not, and settings that it does not have.
    """
    kind, _, part = name.partition("/")
    if kind not in KINDS or (part and kind != "cbt"):
        raise UserError(f"--task={name}: have {', '.join(TASKS)}")
    config: dict[str, Any] = {"name": kind, "seq_len": options.seq_len}
    config |= {"classes": (part,)} if part else {}
    own = {"stride": options.stride, "documents": options.documents}
    config |= {key: value for key, value in own.items() if value is not None}
    spec = {"source": "files", "path": data} if isinstance(data, str) else data
    spec = {**spec, "text": options.text} if options.text and spec else spec
    return plugins.load("tasks", kind, "scoring").scoring(config, {"test": spec})


def encode(task: ScoringTask, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Scored:
    """The task's rows for models of that tokenizer that have `max_tokens` positions."""
    if (task.seq_len or 0) > max_tokens:
        raise UserError(
            f"config.task.seq_len={task.seq_len}: the model has positions for {max_tokens} tokens"
        )
    return task.encoded(tokenizer, task.seq_len or max_tokens)


def score(model: Model, task: Scored, policy: Policy, batch_size: int, mesh: Mesh) -> Scores:
    """The model's log-likelihoods, in fp32 sums; rows that share a context's endings are computed
    `batch_size` at a time over all devices. Parameters may lie anywhere."""
    placed = jax.device_put(model.params, NamedSharding(mesh, P()))
    processes = jax.process_index(), jax.process_count()
    found = log_likelihoods(
        model.replace(params=placed),
        task.rows.batches(batch_size, mesh.size, *processes),
        task.rows.branches,
        policy.operand,
        mesh,
        family.PARTITION,
    )
    return Scores(task, task.rows.by_stretch(found))


def of_checkpoint(
    model: str, revision: str | None, task: str, data: str | None, options: Options
) -> tuple[Scores, Report]:
    """An HF checkpoint of a causal language model, with its own tokenizer.

    Args:
        model: folder, or hub id of `revision`.
        task: one of TASKS.
        data: file, folder or glob; None for the task's reported split on the hub.

    Returns:
        the scores; and {"model", "commit", "task", "data", the task's figures, "batch_size",
        "parameters", "size_mb", "precision", "machine", "seconds"}.
    """
    this = make_task(task, data, options)
    own = subject.of_checkpoint(model, revision, "clm", options.precision)
    check_vocabulary("model", own.described, own.tokenizer)
    trained = provenance.trained(own.described.folder)
    return _measure(own, _encoded(this, own, options, trained), this, task, options)


def of_stage(
    folder: str, stage: str, task: str, data: str | None, options: Options
) -> tuple[Scores, Report]:
    """The best checkpoint of a finished run's stage, or the model that the run was given (teacher);
    see `of_checkpoint`."""
    this, (run, have) = make_task(task, data, options), _run(folder, options)
    if stage not in have:
        raise runs.read(folder).no_stage(stage, have)
    own = subject.of_run(run, stage)
    return _measure(own, _encoded(this, own, options, run.config.task), this, task, options)


def of_run(
    folder: str, task: str, data: str | None, options: Options
) -> dict[str, tuple[Scores, Report]]:
    """By name, the models of a finished run: the teacher first, and every stage beside it, whose
    report has also what `Scores.beside` says, as "beside_teacher"."""
    this, (run, have) = make_task(task, data, options), _run(folder, options)
    found: dict[str, tuple[Scores, Report]] = {}
    scored = None
    for name in have:
        own = subject.of_run(run, name)
        scored = scored or _encoded(this, own, options, run.config.task)
        made, report = _measure(own, scored, this, task, options)
        if found:
            report["beside_teacher"] = made.beside(found[TEACHER][0])
        found[name] = made, report
    return found


def _run(folder: str, options: Options) -> tuple[Run, list[str]]:
    """A finished run of causal language models, and the names of those that it has, the teacher
    first."""
    made = runs.read(folder)
    name = made.config["task"]["name"]
    if plugins.load("tasks", name, "make").make(made.config["task"], None, None).head != "clm":
        raise UserError(
            f"{folder} is a run of task {name!r}, whose models are not causal: likelihoods "
            f"need one of task 'clm' or 'chat'"
        )
    rows = subject.rows(options.batch_size, ROWS)
    own = held_out.Options(batch_size=rows, precision=options.precision)
    run = build(for_these_devices(made.config, own), made.workdir)
    stages = [stage.name for stage in run.stages if stage.name in made.stages]
    if not stages:
        raise made.no_stage("student", ())
    return run, list(dict.fromkeys([TEACHER, *stages]))


def _encoded(
    task: ScoringTask, own: Subject, options: Options, trained: Mapping[str, Any]
) -> Scored:
    """The task's rows; texts begin as in training, whose config.task is `trained` ({}: unknown)."""
    tokenizer = text.begun_by(own.tokenizer, options.separator or trained.get("separator"))
    most = own.described.config.max_tokens
    used = trained.get("seq_len", most)
    if task.seq_len is None and used < most:
        most = min(most, used) if isinstance(task, Perplexity) else most
        log.info(
            "the model was trained on rows of %d tokens and reads up to %d at once here; --seq_len "
            "takes another number",
            *(used, most),
        )
    return encode(task, tokenizer, most)


def _measure(
    own: Subject, scored: Scored, task: ScoringTask, name: str, options: Options
) -> tuple[Scores, Report]:
    mesh, rows = sharding.make_mesh(), subject.rows(options.batch_size, ROWS)
    model = Model(own.params, own.described.abstract().graphdef)
    found = score(model, scored, own.described.policy, rows, mesh)
    report = {"commit": None} | own.stated | {"task": name, "data": task.manifest()}
    return found, report | found.figures | {"batch_size": rows} | own.report()
