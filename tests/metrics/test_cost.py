import time

import pytest

from kd_jax.metrics import cost


class Clock:
    """A clock that only the timed calls move on."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def call(self, durations):
        """A call that takes the next of `durations`, the last one from then on."""
        left = list(durations)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_the_warm_up_is_not_counted(clock):
    durations = [50.0] * cost.WARM_UP + [0.01]
    assert cost.times(clock.call(durations), 7, 1.0) == pytest.approx([0.01] * 7)


def test_the_median_ignores_a_stumble(clock):
    durations = [1.0] * cost.WARM_UP + [0.03, 9.0, 0.01, 0.02, 0.02, 0.02]
    many = clock.call([1.0])
    found = cost.measure(clock.call(durations), many, repeats=6, budget_s=100.0)
    assert found["latency_ms"] == pytest.approx(20.0)


def test_a_slow_call_is_timed_less_often(clock):
    assert len(cost.times(clock.call([1.0]), 100, 8.0)) == 8
    assert len(cost.times(clock.call([60.0]), 100, 8.0)) == cost.FEWEST


def test_measure(clock):
    one = clock.call([9.0] * cost.WARM_UP + [i / 1000 for i in range(1, 12)])
    many = clock.call([0.5])
    found = cost.measure(one, many, batch_size=32, repeats=11)
    assert found == pytest.approx(
        {
            "latency_ms": 6.0,
            "latency_ms_p90": 10.0,
            "throughput": 64.0,
            "latency_calls": 11,
            "throughput_calls": 11,
        }
    )
