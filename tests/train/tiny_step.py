"""A tiny distillation step, the same in every process: models, batch, objective, inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.models import family as families
from kd_jax.objectives.objective import build_objective
from kd_jax.precision import Policy
from kd_jax.train import sharding, step
from kd_jax.train.state import TrainState
from kd_jax.types import Batch, Model, ModelSpec, Params
from tests.models import tiny

ROWS, LENGTH, SLOTS = 32, 12, 4
FAMILY = {"mlm": "bert", "clm": "gpt2"}
# Widths of the student that 8 devices divide, and one (of the MLP) that they do not.
STUDENT = {
    "mlm": dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=36),
    "clm": dict(n_embd=16, n_layer=1, n_head=2, n_inner=36),
}


SPECS = ModelSpec(width=16, num_layers=1), ModelSpec(width=32, num_layers=2)


@functools.cache
def models(head: str) -> tuple[Model, Model]:
    """(student, teacher)."""
    return (
        tiny.model(FAMILY[head], head, seed=1, **STUDENT[head]),
        tiny.model(FAMILY[head], head, seed=2),
    )


def batch(head: str, rows: int = ROWS) -> Batch:
    """Rows of all lengths, one empty, with as many supervised tokens as it happens (numpy)."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, LENGTH + 1, rows)
    lengths[3] = 0
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.float32)
    tokens = rng.integers(4, tiny.VOCAB, (rows, LENGTH)).astype(np.int32)
    if head == "clm":
        labels, weights, positions = np.roll(tokens, -1, axis=1), np.roll(mask, -1, axis=1), None
        weights[:, -1] = 0
    else:
        labels = rng.integers(4, tiny.VOCAB, (rows, SLOTS)).astype(np.int32)
        order = rng.permuted(np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1)), axis=1)
        positions = np.argsort(order >= lengths[:, None], axis=1, kind="stable")[:, :SLOTS]
        positions = np.take_along_axis(order, positions, axis=1)
        used = rng.integers(1, SLOTS + 1, rows)[:, None] > np.arange(SLOTS)
        weights = (used & (positions < lengths[:, None])).astype(np.float32)
    return Batch(
        ids_B=np.arange(rows, dtype=np.int32),
        tokens_BT=tokens,
        mask_BT=mask,
        labels=labels,
        weights=weights,
        positions_BP=positions,
    )


def program(
    settings, devices=1, fsdp=1, accumulate=1, chunk=0, dropout=False, teacher=True, model=1
):
    """A float32 step of an objective, as configured, on the first `devices` devices."""
    objective, *schedules = build_objective(
        settings, 10, Policy(), Policy() if teacher else None, chunk
    )
    mesh = sharding.make_mesh(fsdp, jax.devices()[:devices], model)
    return step.Program(objective, mesh, families.PARTITION, accumulate, dropout), schedules


def inputs(schedules, learning_rate: float = 0.1, seed: int = 0) -> step.Inputs:
    """Those of step 0, of schedules of coefficients and of temperatures."""
    at_0 = ({name: jnp.float32(at(0)) for name, at in each.items()} for each in schedules)
    return step.Inputs(jnp.float32(learning_rate), *at_0, jnp.uint32(seed))


def state(student: Model, own: Params | None = None) -> TrainState:
    """A student, and the objective's own parameters, without an optimizer."""
    params = {"student": student.params, "objective": own or {}}
    return TrainState(jnp.int32(0), params, (), student.graphdef, None)
