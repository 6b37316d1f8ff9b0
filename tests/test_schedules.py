import math
from types import SimpleNamespace

import numpy as np
import optax
import pytest

from kd_jax.errors import UserError
from kd_jax.ranges import Real
from kd_jax.schedules import learning_rate, value_schedule

STEPS = 20


def rates(steps=STEPS, peak=0.5, **schedule):
    at = learning_rate(SimpleNamespace(learning_rate=peak, schedule=schedule), steps)
    return [at(step) for step in range(steps)]


def test_constant():
    assert rates(kind="constant") == [0.5] * STEPS
    np.testing.assert_allclose(rates(kind="constant", warmup=4)[:6], [0.1, 0.2, 0.3, 0.4, 0.5, 0.5])


@pytest.mark.parametrize("warmup", [5, 0.25])
def test_warm_up_reaches_the_peak_and_never_is_zero(warmup):
    found = rates(kind="linear", warmup=warmup)
    np.testing.assert_allclose(found[:6], 0.5 * np.arange(1, 7) / 6)
    assert found[5] == max(found) == 0.5


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_decay_is_that_of_optax(warmup, final):
    length = STEPS - warmup
    linear = optax.linear_schedule(0.5, 0.5 * final, length)
    cosine = optax.cosine_decay_schedule(0.5, length, alpha=final)
    for kind, reference in (("linear", linear), ("cosine", cosine)):
        found = rates(kind=kind, warmup=warmup, final=final)[warmup:]
        wanted = [float(reference(step)) for step in range(length)]
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        (20, {}),
        (100, {"pct_start": 0.1, "div_factor": 10.0, "final_div_factor": 100.0}),
        (7, {"pct_start": 0.5}),
        (3, {"pct_start": 0.3}),  # the first phase ends before the first step
        (11, {"pct_start": 0.99}),
        (9, {"pct_start": 1.0}),
    ],
)
def test_one_cycle_is_that_of_pytorch(steps, settings):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=steps, **settings)
    wanted = []
    for step in range(steps):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < steps:
            schedule.step()
    np.testing.assert_allclose(rates(steps, kind="one_cycle", **settings), wanted, rtol=1e-12)


def test_one_cycle_that_starts_at_its_peak():
    found = rates(10, kind="one_cycle", pct_start=0.1)  # PyTorch divides by zero here
    assert found[0] == 0.5 and found == sorted(found, reverse=True)


def value_of(value):
    return value_schedule(value, STEPS, "key", Real(least=-1))


def test_values_of_terms():
    assert value_of(2)(7) == 2.0
    linear = value_of({"kind": "linear", "start": 1.0, "end": 3.0})
    assert [linear(step) for step in (0, 5, 10, 20, 30)] == [1.0, 1.5, 2.0, 3.0, 3.0]
    short = value_of({"kind": "linear", "start": 1.0, "end": 3.0, "steps": 4})
    assert [short(step) for step in (0, 2, 4, 5)] == [1.0, 2.0, 3.0, 3.0]
    cosine = value_of({"kind": "cosine", "start": 4.0, "end": 1.0})
    wanted = [1 + 3 * (1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS + 1)]
    np.testing.assert_allclose([cosine(step) for step in range(STEPS + 1)], wanted)
    assert cosine(99) == 1.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("high", r"key='high': give a number or \{kind: linear \| cosine, start, end\[, steps\]\}"),
        (None, "key=None: give a number"),
        ({"kind": "linear", "start": 1.0}, "give a number or"),
        ({"kind": "linear", "start": 1.0, "end": "x"}, "give a number or"),
        ({"kind": "step", "start": 1.0, "end": 2.0}, "key: kind='step' .*have linear, cosine"),
        (-2, "key=-2 must be at least -1"),
        ({"kind": "linear", "start": -2, "end": 2.0}, "key.start=-2.0 must be at least -1"),
        ({"kind": "cosine", "start": 1.0, "end": math.inf}, "key.end=inf must be finite"),
        (
            {"kind": "linear", "start": 1.0, "end": 2.0, "steps": 0},
            "key.steps=0 must be at least 1",
        ),
        ({"kind": "linear", "start": 1.0, "end": 2.0, "stop": 3}, r"\['stop'\]: have linear"),
    ],
)
def test_values_that_are_none(value, message):
    with pytest.raises(UserError, match=message):
        value_of(value)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"kind": "step"}, "kind='step': have constant, linear, cosine, one_cycle"),
        ({}, "kind=None: have constant"),
        ({"kind": "linear", "pct_start": 0.3}, "linear does not read pct_start"),
        ({"kind": "one_cycle", "warmup": 3}, "one_cycle does not read warmup"),
        ({"kind": "constant", "final": 0.1}, "constant does not read final"),
        ({"kind": "linear", "warmup": -3}, "optim.schedule.warmup=-3 must be at least 0"),
        ({"kind": "linear", "final": math.nan}, "optim.schedule.final=nan must be finite"),
        ({"kind": "one_cycle", "div_factor": 0}, "schedule.div_factor=0 must be above 0"),
        (
            {"kind": "one_cycle", "pct_start": 1.5},
            r"schedule.pct_start=1.5 must be at least 0 and at most 1",
        ),
    ],
)
def test_schedules_that_are_none(schedule, message):
    with pytest.raises(UserError, match=message):
        rates(**schedule)
