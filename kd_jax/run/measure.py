"""Computes the held-out metrics of a run's models, for all stages and recipes.

A language model is measured in nats a token, and compared with a teacher by KL divergence and by
agreement of the most likely token. On examples the task computes metrics of a model's logits.
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
from kd_jax.metrics.classification import compare_with_teacher
from kd_jax.models import family
from kd_jax.models.blueprint import count, size_mb
from kd_jax.objectives.objective import held_out_objective
from kd_jax.precision import Policy
from kd_jax.run.results import kept
from kd_jax.run.run import Run
from kd_jax.run.stage import Stage
from kd_jax.run.teacher_logits import TeacherLogits, laid_out
from kd_jax.run.teaching import together
from kd_jax.tasks.likelihood import Scored
from kd_jax.train.passes import evaluate, log_likelihoods, predict
from kd_jax.train.state import TrainState
from kd_jax.train.step import Program
from kd_jax.types import Model, Params

Figures = dict[str, Any]


def figures(run: Run, this: Stage, student: Model, teachers: TeacherLogits, split: str) -> Figures:
    """Measures a stage's model on a split, and compares it with its teachers, if any."""
    alone, task = this.model in run.teachers, run.tasks[this.model]
    if not task.of_examples:
        # Whoever a stage learns from, the same model is what all are compared with.
        teacher = None if alone else teachers.model("teacher")
        return of_text(run, student, teacher, split)
    own = functools.partial(logits, run, this.model, student)
    task, found = scored(task, own, split)
    theirs = None if alone or task.regression else together(run, this, teachers, split)
    return of_logits(task, found, split, theirs)


def of_given(run: Run, name: str, teachers: TeacherLogits) -> Figures:
    """Measures a teacher that no stage trains, on the reported split; a language model's metrics
    are kept in a folder of its name."""
    task = run.tasks[name]
    if task.of_examples:
        task, found = scored(task, functools.partial(teachers.of, name), run.split)
        return of_logits(task, found, run.split)

    def measured() -> Figures:
        params = teachers.params(name)
        return of_text(run, _laid_out(run, name, params), None) | size(run, params)

    return kept(run.folder / name / "results.json", measured)


def of_start(
    run: Run, this: Stage, start: Callable[[], TrainState], teachers: TeacherLogits
) -> Figures:
    """Measures the model of a stage's first state, made by `start`, on the reported split; kept in
    the folder `Stage.reports_start`."""

    def measured() -> Figures:
        params = start().params["student"]
        model = _laid_out(run, this.model, params)
        return figures(run, this, model, teachers, run.split) | size(run, params)

    return kept(run.folder / this.reports_start / "results.json", measured)


def _laid_out(run: Run, name: str, params: Params) -> Model:
    return laid_out(Model(params, run.models[name].abstract().graphdef), run.mesh)


def of_text(
    run: Run, student: Model, teacher: Model | None, split: str = "", by: str = "token"
) -> Figures:
    """Measures a language model on a split (by default the reported one), and compares it with the
    teacher, if any; means are `by` token or batch (train/passes.py)."""
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
    """Measures a language model on batches of text: loss and accuracy, with a teacher also KL and
    agreement."""
    objective = held_out_objective(policy, policy if teacher is not None else None, chunk)
    how = Program(objective, mesh, family.PARTITION)
    return with_perplexity(evaluate(student, stream, teacher, how, by))


def with_perplexity(found: Figures) -> Figures:
    """Inserts the perplexity into metrics, after the loss."""
    perplexity = math.exp(min(found["loss"], 700.0))
    return {"loss": found["loss"], "perplexity": perplexity} | found


def logits(run: Run, name: str, model: Model, split: str) -> list[np.ndarray]:
    """Computes a model's logits of each row of a split; parameters are sharded as in training."""
    rows = run.tasks[name].held_out(split, run.config.eval.batch_size, **run.processes)
    found = predict(model, rows, run.mesh, family.PARTITION)
    return [found[i] for i in range(len(found))]


def scored(
    task: Any, logits: Callable[[str], list[np.ndarray]], split: str
) -> tuple[Any, list[np.ndarray]]:
    """Returns the task, with its threshold tuned if the split needs that, and a model's logits of
    the split."""
    if task.tunes(split):
        task = task.tuned(logits("validation"))
    return task, logits(split)


def of_logits(
    task: Any, found: list[np.ndarray], split: str, teachers: list | None = None
) -> Figures:
    """Scores a model's logits: the task's metrics, metrics by class, and the closeness to its
    teachers' logits."""
    made = task.score(split, found)
    if teachers is not None:
        made |= compare_with_teacher(found, teachers)
    return made | task.report(split, found)


def size(run: Run, params: Params) -> Figures:
    """Counts a model's parameters, and computes its reduction relative to the teacher."""
    own, whole = count(params), count(run.models["teacher"].abstract().params)
    return {
        "parameters": own,
        "reduction_percent": round(100 * (1 - own / whole), 2),
        "size_mb": size_mb(params),
    }


@dataclasses.dataclass(frozen=True)
class Scores:
    """The log-likelihoods of one model in a task that is scored by likelihood."""

    task: Scored
    log_likelihoods_N: np.ndarray  # float64, nats, one a stretch (ending, window) of the task

    @property
    def figures(self) -> dict[str, Any]:
        """Computes the task's metrics; see `Scored.figures` of the task."""
        return self.task.figures(self.log_likelihoods_N)

    def compared_with(self, original: Scores) -> dict[str, float | None]:
        """Compares these scores with the original model's; see `metrics.likelihood.compare`."""
        of_original, own = original.log_likelihoods_N, self.log_likelihoods_N
        hits = self.task.hits(of_original), self.task.hits(own)
        return likelihood.compare(of_original, own, *hits, self.task.chance)

    def write(self, out: str | Path) -> list[str]:
        """Writes likelihoods.jsonl, a line for each stretch; returns the path."""
        path = Path(out) / "likelihoods.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lines:
            for record in self.task.records(self.log_likelihoods_N):
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        return [str(path)]


def score(model: Model, task: Scored, policy: Policy, batch_size: int, mesh: Mesh) -> Scores:
    """Computes a model's log-likelihoods in a task, summed in float32, about `batch_size` stretches
    at a time over all devices. Parameters may be on any device or the host."""
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
