"""One kd_jax process of the benchmark: times the step of a case and prints one line of JSON.

The step is the one that recipes/distil.py runs, with its metrics (KL at T = 1, gradient norm).
"""

import argparse
import functools

import jax
import numpy as np
from cases import BETAS, EPSILON, LEARNING_RATE, TEMPERATURE, WEIGHT_DECAY, Case
from ml_collections import ConfigDict
from timing import arguments, case_of, resident, run

from kd_jax.cli import start_jax
from kd_jax.models import family, hf
from kd_jax.models.blueprint import stored
from kd_jax.objectives.objective import build_objective
from kd_jax.precision import Policy, policy_for
from kd_jax.train import optim, sharding, state
from kd_jax.train.loop import Schedules
from kd_jax.train.step import Program, train_step
from kd_jax.types import Batch, Model

OPTIMIZER = ConfigDict(
    dict(
        weight_decay=WEIGHT_DECAY,
        beta1=BETAS[0],
        beta2=BETAS[1],
        epsilon=EPSILON,
        clip_norm=0.0,
        learning_rate_multipliers=((".*", 1.0),),
    )
)


def load(folder, head: str, policy: Policy) -> Model:
    """A checkpoint's model with float32 numpy parameters."""
    kind, config = family.read(hf.read_config(folder))
    graphdef = family.abstract(kind, config, head, policy).graphdef
    return Model(hf.load(folder, kind, config, head), graphdef)


def batch_of(case: Case) -> Batch:
    """The case's batch; masked positions lie in slots, the unused ones with weight 0."""
    arrays = case.batch()
    whole = dict(
        ids_B=np.arange(case.rows, dtype=np.int32),
        tokens_BT=arrays["tokens_BT"],
        mask_BT=np.ones(arrays["tokens_BT"].shape, np.float32),
    )
    weights = np.ones(arrays["labels"].shape, np.float32)
    if case.model_type == "gpt2":
        return Batch(**whole, labels=arrays["labels"], weights=weights)
    fill = [(0, 0), (0, case.slots - case.masked)]
    return Batch(
        **whole,
        labels=np.pad(arrays["labels"], fill),
        weights=np.pad(weights, fill),
        positions_BP=np.pad(arrays["positions"], fill),
    )


def main() -> None:
    args = argparse.ArgumentParser(parents=[arguments()]).parse_args()
    start_jax()
    case = case_of(args)
    head = "clm" if case.model_type == "gpt2" else "mlm"
    policy = policy_for(args.precision, jax.default_backend())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])  # one, as PyTorch
    terms = {"ce": {"weight": 1.0}, "kl": {"weight": 1.0, "temperature": TEMPERATURE}}
    objective, *schedules = build_objective(terms, 1, policy, policy)
    program = Program(objective, mesh, family.PARTITION)
    schedules = Schedules(lambda step: LEARNING_RATE, *schedules, seed=0)

    teacher = load(args.models / "teacher", head, policy)
    teacher = teacher.replace(params=jax.tree.map(jax.device_put, stored(teacher.params, policy)))
    student = load(args.models / "student", head, policy)
    trained = state.create(
        lambda params: {"student": params, "objective": {}},
        student.params,
        student.graphdef,
        functools.partial(optim.make_optimizer, OPTIMIZER),
        program.table,
        mesh,
    )
    del student
    batch = sharding.place(batch_of(case), mesh)

    def step() -> float:
        nonlocal trained
        inputs = schedules.at(int(trained.step))
        trained, metrics = train_step(trained, batch, teacher, inputs, program=program)
        state.settle(trained)
        return float(metrics["loss"])

    def peak() -> int:
        found = jax.local_devices()[0].memory_stats()
        return found["peak_bytes_in_use"] if args.device == "gpu" else resident()

    run(step, args, peak)


if __name__ == "__main__":
    main()
