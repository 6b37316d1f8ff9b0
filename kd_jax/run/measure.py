"""Held-out figures of a run's models: the only place that computes them.

A language model is measured in nats a token; beside a teacher also the divergence from it, and how
often both choose the same token. Of examples the task scores a model's logits, row by row.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kd_jax.data.loader import Batches
from kd_jax.metrics import likelihood
from kd_jax.metrics.classification import beside_teacher
from kd_jax.models import family
from kd_jax.models.blueprint import count, size_mb
from kd_jax.objectives import combine
from kd_jax.precision import Policy
from kd_jax.run.answers import Answers, laid_out
from kd_jax.run.results import kept
from kd_jax.run.run import Run
from kd_jax.run.stage import Stage
from kd_jax.run.teaching import together
from kd_jax.tasks.likelihood import Scored
from kd_jax.train.passes import evaluate, log_likelihoods, predict
from kd_jax.train.step import Program
from kd_jax.types import Model, Params

Figures = dict[str, Any]


def figures(run: Run, this: Stage, student: Model, answers: Answers, split: str) -> Figures:
    """Figures of a stage's model on a split, beside its teachers; of a teacher alone."""
    alone, task = this.model in run.teachers, run.tasks[this.model]
    if not task.of_examples:
        # Whoever a stage learns from, the same model is what all are compared with.
        beside = None if alone else answers.model("teacher")
        return of_text(run, student, beside, split)
    own = functools.partial(logits, run, this.model, student)
    task, found = scored(task, own, split)
    theirs = None if alone or task.regression else together(run, this, answers, split)
    return of_logits(task, found, split, theirs)


def of_given(run: Run, name: str, answers: Answers) -> Figures:
    """Figures of a teacher that no stage trains, on the reported split; those of a language model
    are kept in the folder of its name."""
    task = run.tasks[name]
    if not task.of_examples:
        return _kept(run, name, name, answers.params(name), lambda whole: of_text(run, whole, None))
    task, found = scored(task, functools.partial(answers.of, name), run.split)
    return of_logits(task, found, run.split)


def of_start(run: Run, this: Stage, name: str, params: Params, answers: Answers) -> Figures:
    """Figures of what a stage starts from, on the reported split, kept in the folder of `name`."""
    measure = functools.partial(figures, run, this, answers=answers, split=run.split)
    return _kept(run, name, this.model, params, measure)


def _kept(
    run: Run, name: str, model: str, params: Params, measure: Callable[[Model], Figures]
) -> Figures:
    def found() -> Figures:
        whole = laid_out(Model(params, run.models[model].abstract().graphdef), run.mesh)
        return measure(whole) | size(run, params)

    return kept(run.folder / name / "results.json", found)


def of_text(
    run: Run, student: Model, teacher: Model | None, split: str = "", by: str = "token"
) -> Figures:
    """Figures of a language model on a split (the reported one), beside a teacher where there is
    one; the mean is `by` token or batch (train/passes.py)."""
    stream = run.task.held_out(split or run.split, run.config.eval.batch_size, **run.processes)
    return of_stream(student, teacher, stream, run.policy, run.mesh, run.chunk, by)


def of_stream(
    student: Model,
    teacher: Model | None,
    stream: Batches,
    policy: Policy,
    mesh: Mesh,
    chunk: int = 0,
    by: str = "token",
) -> Figures:
    """Figures of a language model on batches of text: loss and accuracy, beside a teacher also KL
    and agreement."""
    objective = combine.held_out(policy, policy if teacher is not None else None, chunk)
    how = Program(objective, mesh, family.PARTITION)
    return with_perplexity(evaluate(student, stream, teacher, how, by))


def with_perplexity(found: Figures) -> Figures:
    """The figures with the perplexity behind the loss."""
    perplexity = math.exp(min(found["loss"], 700.0))
    return {"loss": found["loss"], "perplexity": perplexity} | found


def logits(run: Run, name: str, model: Model, split: str) -> list[np.ndarray]:
    """The logits of each row of a split, of a model as training leaves it."""
    rows = run.tasks[name].held_out(split, run.config.eval.batch_size, **run.processes)
    found = predict(model, rows, run.mesh, family.PARTITION)
    return [found[i] for i in range(len(found))]


def scored(
    task: Any, logits: Callable[[str], list[np.ndarray]], split: str
) -> tuple[Any, list[np.ndarray]]:
    """The task, tuned where scoring the split needs it, and a model's logits of the split."""
    if task.tunes(split):
        task = task.tuned(logits("validation"))
    return task, logits(split)


def of_logits(
    task: Any, found: list[np.ndarray], split: str, beside: list | None = None
) -> Figures:
    """Figures of a model's logits: the task's, by class, and how near they are to a teacher's."""
    made = task.score(split, found)
    if beside is not None:
        made |= beside_teacher(found, beside)
    return made | task.report(split, found)


def size(run: Run, params: Params) -> Figures:
    """Parameters of a model, and how many fewer they are than the teacher's."""
    own, whole = count(params), count(run.models["teacher"].abstract().params)
    return {
        "parameters": own,
        "reduction_percent": round(100 * (1 - own / whole), 2),
        "size_mb": size_mb(params),
    }


@dataclasses.dataclass(frozen=True)
class Scores:
    """What one model gets in one task that is scored by likelihood."""

    task: Scored
    log_likelihoods_N: np.ndarray  # float64, nats, one a stretch (ending, window) of the task

    @property
    def figures(self) -> dict[str, Any]:
        """What the task reports; `metrics` and the task's docstring name the units."""
        return self.task.figures(self.log_likelihoods_N)

    def beside(self, original: Scores) -> dict[str, float | None]:
        """What is left of the original model's answers: `metrics.likelihood.compare`."""
        of_original, own = original.log_likelihoods_N, self.log_likelihoods_N
        hits = self.task.hits(of_original), self.task.hits(own)
        return likelihood.compare(of_original, own, *hits, self.task.chance)

    def write(self, out: str | Path) -> list[str]:
        """Writes likelihoods.jsonl, a line for each stretch in the data's order; its path."""
        path = Path(out) / "likelihoods.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lines:
            for record in self.task.records(self.log_likelihoods_N):
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        return [str(path)]


def score(model: Model, task: Scored, policy: Policy, batch_size: int, mesh: Mesh) -> Scores:
    """The model's log-likelihoods, in fp32 sums; rows that share a context's endings are computed
    `batch_size` at a time over all devices. Parameters may lie anywhere."""
    processes = jax.process_index(), jax.process_count()
    found = log_likelihoods(
        laid_out(model, mesh),
        task.rows.batches(batch_size, mesh.size, *processes),
        task.rows.branches,
        policy.operand,
        mesh,
        family.PARTITION,
    )
    return Scores(task, task.rows.by_stretch(found))
