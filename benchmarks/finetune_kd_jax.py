"""One kd_jax process of the fine-tuning benchmark; prints one line of JSON.

Batches come from the task's own stream of buckets. The step is the one that recipes/distil.py
runs, with its metrics (accuracy, gradient norm); evaluation is `train.passes.predict`.
"""

import argparse
import functools

import jax
import numpy as np
from finetune_cases import (
    BETAS,
    CE_WEIGHT,
    CLIP_NORM,
    EPSILON,
    EVAL_ROWS,
    KL_WEIGHT,
    LEARNING_RATE,
    ROWS,
    SEQ_LEN,
    TEMPERATURE,
    WEIGHT_DECAY,
    arguments,
    chosen,
    first_of_each,
)
from kd_jax_step import load
from ml_collections import ConfigDict
from timing import run

from kd_jax.cli import start_jax
from kd_jax.data import tokenizers
from kd_jax.models import family
from kd_jax.models.blueprint import stored
from kd_jax.objectives.objective import build_objective
from kd_jax.precision import Policy, policy_for
from kd_jax.run.teaching import attach
from kd_jax.tasks import glue
from kd_jax.teachers.ensemble import Stored
from kd_jax.train import optim, sharding, state
from kd_jax.train.loop import Schedules
from kd_jax.train.passes import predict, predict_step
from kd_jax.train.step import Program, train_step
from kd_jax.types import Model

OPTIMIZER = ConfigDict(
    dict(
        weight_decay=WEIGHT_DECAY,
        beta1=BETAS[0],
        beta2=BETAS[1],
        epsilon=EPSILON,
        clip_norm=CLIP_NORM,
        learning_rate_multipliers=((".*", 1.0),),
    )
)


def placed(folder, policy: Policy, mesh) -> Model:
    """A checkpoint's classifier, its matrices in the operand type."""
    model = load(folder, "classification", policy)
    return model.replace(params=jax.device_put(stored(model.params, policy)))


def make_task(args: argparse.Namespace) -> glue.Glue:
    """SST-2, with the sentences to evaluate as its test split."""
    files = {
        "train": {"source": "files", "path": str(args.data / "train.tsv")},
        "validation": {"source": "files", "path": str(args.data / "dev.tsv")},
        "test": {"source": "files", "path": str(args.folder / "eval.tsv")},
    }
    tokenizer = tokenizers.load_tokenizer(args.folder / "teacher")
    return glue.make({"name": "glue", "task": "sst2", "seq_len": SEQ_LEN}, files, tokenizer)


def evaluate(args: argparse.Namespace, task: glue.Glue, policy: Policy, mesh) -> None:
    model = placed(args.folder / "teacher", policy, mesh)
    stream = task.held_out("test", EVAL_ROWS)

    def one_pass() -> float:
        found = predict(model, stream.batches(), mesh, family.PARTITION)
        return float(np.mean([found[i] for i in range(len(found))], axis=0)[0])

    run(one_pass, argparse.Namespace(warmup=1, steps=args.steps))


def train(args: argparse.Namespace, task: glue.Glue, policy: Policy, mesh) -> None:
    distill = args.work == "distill"
    terms = {"ce": {"weight": 1.0}}
    if distill:
        terms = {"ce": {"weight": CE_WEIGHT}}
        terms["kl"] = {"weight": KL_WEIGHT, "temperature": TEMPERATURE}
    objective, *schedules = build_objective(
        terms, 1, policy, policy if distill else None, outputs="classes"
    )
    program = Program(objective, mesh, family.PARTITION)
    schedules = Schedules(lambda step: LEARNING_RATE, *schedules, seed=0)
    student = load(args.folder / ("student" if distill else "teacher"), "classification", policy)
    trained = state.create(
        lambda params: {"student": params, "objective": {}},
        student.params,
        student.graphdef,
        functools.partial(optim.make_optimizer, OPTIMIZER),
        program.table,
        mesh,
    )
    del student
    stream = task.train(ROWS, seed=0)
    lengths_S = np.array([stream[i].tokens_BT.shape[1] for i in range(stream.steps_per_epoch)])
    warm, timed = first_of_each(lengths_S, len(stream.buckets)), chosen(lengths_S, args.steps)
    teacher = placed(args.folder / "teacher", policy, mesh) if distill else None
    if args.stored:
        rows = [None] * len(task.rows("train"))
        for number in {*warm, *timed}:
            batch = stream[number]
            logits_B1C = predict_step(teacher, batch, mesh=mesh, table=family.PARTITION)
            for row, logits_1C in zip(batch.ids_B, np.asarray(logits_B1C), strict=True):
                rows[row] = logits_1C[0]
        classes = len(task.labels)
        teacher, stream = Stored(classes), stream.map(attach(rows, False, classes))
    numbers = iter(warm + timed)

    def step() -> float:
        nonlocal trained
        batch = sharding.place(stream[next(numbers)], mesh)
        inputs = schedules.at(int(trained.step))
        trained, metrics = train_step(trained, batch, teacher, inputs, program=program)
        state.settle(trained)
        return float(metrics["loss"])

    run(step, argparse.Namespace(warmup=len(warm), steps=len(timed)))


def main() -> None:
    parser = argparse.ArgumentParser(parents=[arguments()])
    parser.add_argument("--stored", action="store_true", help="teacher's logits computed before")
    args = parser.parse_args()
    start_jax()
    policy = policy_for(args.precision, jax.default_backend())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])  # one, as PyTorch
    (evaluate if args.work == "evaluate" else train)(args, make_task(args), policy, mesh)


if __name__ == "__main__":
    main()
