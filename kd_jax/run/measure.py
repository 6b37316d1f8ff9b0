"""Computes the held-out figures of a run's models, what they cost to run, and what their training
took.

A language model is measured in nats a token; compared with a teacher also by the divergence from
it, and by how often both choose the same token. On examples the task scores a model's logits.
All models of a run are timed in one sitting, on one device.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd_jax.data.loader import Batches, BucketStream, lengths_of_pass
from kd_jax.metrics import cost, flops, likelihood
from kd_jax.metrics.classification import compare_with_teacher
from kd_jax.models import family
from kd_jax.models.blueprint import count, size_mb
from kd_jax.objectives.logits import in_chunks
from kd_jax.objectives.measures import expected_calibration_error
from kd_jax.objectives.objective import held_out_objective
from kd_jax.precision import Policy
from kd_jax.run import text_logits
from kd_jax.run.results import kept
from kd_jax.run.run import Run
from kd_jax.run.stage import Parameters, Stage
from kd_jax.run.teaching import TeacherLogits, laid_out, on_mesh, together
from kd_jax.tasks.likelihood import Scored
from kd_jax.teachers import ensemble
from kd_jax.train import sharding
from kd_jax.train.passes import evaluate, log_likelihoods, predict, predict_step
from kd_jax.train.state import TrainState
from kd_jax.train.step import Program
from kd_jax.types import Array, Batch, Model, Params

ROWS, BATCHES = 32, 4  # of a timed batch; batches that one timed pass goes through
CALLS, SECONDS = 20, 5.0  # of `cost_of_mean`: how often, and how long at most
CHUNK = 256  # tokens whose logits exist at a time

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
    of_classes = task.outputs == "classes"
    theirs = together(run, this, teachers, split) if of_classes and not alone else None
    return of_logits(task, found, split, theirs)


def of_given(run: Run, name: str, teachers: TeacherLogits) -> Figures:
    """Measures a teacher that no stage trains, on the reported split; a language model's metrics
    are kept in a folder of its name."""
    task = run.tasks[name]
    if task.of_examples:
        task, found = scored(task, functools.partial(teachers.of, name), run.split)
        return of_logits(task, found, run.split)

    def measured() -> Figures:
        params = teachers.given[name]
        return of_text(run, on_mesh(run, name, params), None) | size(run, params)

    return kept(run.folder / name / "results.json", measured)


def of_start(
    run: Run, this: Stage, start: Callable[[], TrainState], teachers: TeacherLogits
) -> Figures:
    """Measures the model of a stage's first state, made by `start`, on the reported split; kept in
    the folder `Stage.reports_start`."""

    def measured() -> Figures:
        params = start().params["student"]
        model = on_mesh(run, this.model, params)
        return figures(run, this, model, teachers, run.split) | size(run, params)

    return kept(run.folder / this.reports_start / "results.json", measured)


def of_text(
    run: Run, student: Model, teacher: Model | None, split: str = "", by: str = "token"
) -> Figures:
    """Measures a language model on a split (by default the reported one), and compares it with the
    teacher, if any; means are `by` token or batch (train/passes.py)."""
    split = split or run.split
    stream = run.task.held_out(split, run.config.eval.batch_size, **run.processes)
    # Those that are followed in training are few.
    how = dict(by=by, calibration=split != "validation")
    return of_stream(student, teacher, stream, run.policy, run.mesh, run.chunk, **how)


def of_stream(
    student: Model,
    teacher: Model | None,
    stream: Batches,
    policy: Policy,
    mesh: Mesh,
    chunk: int = 0,
    by: str = "token",
    calibration: bool = True,
) -> Figures:
    """Measures a language model on batches of text: loss and accuracy, with a teacher also KL and
    agreement, and with `calibration` the expected calibration error."""
    theirs = policy if teacher is not None else None
    objective = held_out_objective(policy, theirs, chunk, calibration=calibration)
    how = Program(objective, mesh, family.PARTITION)
    found = with_perplexity(evaluate(student, stream, teacher, how, by))
    return expected_calibration_error(found) if calibration else found


def with_perplexity(found: Figures) -> Figures:
    """Inserts the perplexity into metrics, after the loss."""
    perplexity = math.exp(min(found["loss"], 700.0))
    return {"loss": found["loss"], "perplexity": perplexity} | found


def logits(run: Run, name: str, model: Model, split: str) -> list[np.ndarray]:
    """Computes a model's logits of each row of a split; parameters are sharded as in training."""
    rows = run.tasks[name].held_out(split, run.config.eval.batch_size, **run.processes)
    found = predict(model, rows.batches(), run.mesh, family.PARTITION)
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
        task.rows.batches(batch_size, sharding.num_parts(mesh), *processes),
        task.rows.branches,
        policy,
        mesh,
        family.PARTITION,
    )
    return Scores(task, task.rows.by_stretch(found))


def costs(run: Run, params: dict[str, Params], repeats: int) -> dict[str, dict[str, Any]]:
    """Measures the cost of each model on examples: parameters, size_mb, flops_per_sample (at the
    mean length of a row), and the times of `metrics.cost.measure`. All are timed on the same
    examples of the reported split: one row at a time for the latency, batches of 32 for the
    throughput. All processes call this together, the first one measures; {} in the others."""
    found = {}
    for name, own in params.items():
        own = sharding.gathered(own)
        if own is None:
            continue
        rows = run.tasks[name].rows(run.split)
        tokens = round(float(rows.lengths_N.mean()))
        one, many, samples = _calls(run, name, own)
        found[name] = {
            "parameters": count(own),
            "size_mb": size_mb(own),
            "flops_per_sample": flops.forward(
                run.models[name].counted(own), 1, tokens, 1, vocabulary=False
            ),
            **cost.measure(one, many, batch_size=samples, repeats=repeats),
        }
    return found


def _calls(run: Run, name: str, params: Params) -> tuple[Callable, Callable, int]:
    """Makes the functions to time: (one, many, samples), where `one` runs the next single row and
    `many` the next `samples` rows."""
    device = jax.local_devices()[0]  # parameters may lie on all
    mesh = sharding.make_mesh(1, [device])
    model = laid_out(Model(params, run.models[name].abstract().graphdef), mesh)
    rows = run.tasks[name].rows(run.split)
    buckets = lengths_of_pass(rows.lengths_N, run.tasks[name].seq_len, ROWS)
    # The same examples for all models: drawn by number.
    ids_N = np.random.default_rng(0).permutation(len(rows))[: ROWS * BATCHES]

    def make(ids_B: np.ndarray, length: int) -> Batch:
        return rows.batch(ids_N[ids_B], length)

    def batches(size: int) -> list[Batch]:
        stream = BucketStream(rows.lengths_N[ids_N], buckets, make, size)
        return [sharding.place(stream[i], mesh) for i in range(stream.steps)]

    def predict(batch: Batch) -> Any:
        return predict_step(model, batch, mesh=mesh, table=family.PARTITION)

    singles, groups = batches(1), batches(ROWS)
    turn = itertools.cycle(singles)
    for batch in singles:
        jax.block_until_ready(predict(batch))  # compiles each length
    return (
        lambda: jax.block_until_ready(predict(next(turn))),
        lambda: jax.block_until_ready([predict(batch) for batch in groups]),
        len(ids_N),
    )


def cost_of_mean(run: Run, name: str, members: Sequence[Params], space: str) -> dict[str, Any]:
    """Times the prediction of every token of real rows by the mean of several models of one shape
    (`metrics.cost.measure`). `name`: the run's model with that shape; all processes call this
    together."""
    device = jax.local_devices()[0]
    stacked = ensemble.stack(map(sharding.to_host, members), run.policy)
    stacked = jax.device_put(stacked, device)
    graphdef = run.models[name].of_members

    def call(rows: int) -> Any:
        batch = jax.device_put(run.task.held_out(run.split, rows)[0], device)
        return lambda: jax.block_until_ready(
            _first_choices(stacked, graphdef, batch, space=space, policy=run.policy)
        )

    return cost.measure(call(1), call(ROWS), batch_size=ROWS, repeats=CALLS, budget_s=SECONDS)


@functools.partial(jax.jit, static_argnames=("graphdef", "space", "policy"))
def _first_choices(
    members: Params, graphdef: Any, batch: Batch, *, space: str, policy: Policy
) -> Array:
    size = len(jax.tree.leaves(members)[0])
    weights_E = jnp.full(size, 1.0 / size)
    found = ensemble.members(members, graphdef, weights_E, batch, space)
    rows = in_chunks(found.rows, min(CHUNK, len(found.rows)))
    return jax.lax.map(lambda part: found.logits(part, policy).argmax(axis=1), rows)


def shape_of_step(run: Run, stage: Stage) -> tuple[int, int, int]:
    """Counts rows and tokens of a batch, and positions of a row that reach the head."""
    batch = stage.step_inputs(run, stage).batch
    positions = jax.eval_shape(stage.program.objective.dense_labels, batch).labels.shape[1]
    return *batch.tokens_BT.shape, positions


def training_cost(run: Run, stage: Stage, parameters: Parameters) -> dict[str, int]:
    """Counts the steps and FLOPs of a stage's training (metrics/flops.py), including the teacher's
    forward passes: only one over each row if its logits are stored. If blocks are replaced at
    random, original and compact blocks both count."""
    shape, total = shape_of_step(run, stage), 0
    program, computing = stage.program, stage.step_inputs(run, stage).computing
    for phase in stage.phases(run, parameters):
        params = phase.abstract().params
        student = run.models[stage.model].counted(params["student"])
        again = [student] if program.caches_vectors else []  # forward only, as teachers
        models = student, [*computing, *again], params["objective"]
        total += (phase.end - phase.start) * flops.train_step(*models, *shape)
    if text_logits.are_kept(run, stage):  # the teacher, once over every row
        teacher = run.models[stage.teachers[0]].counted()
        total += text_logits.steps_of_new_rows(run, stage) * flops.forward(teacher, *shape)
    more = dict(stage.more_training)
    total += more.pop("training_flops", 0)
    return {"steps": stage.steps, "training_flops": total} | more
