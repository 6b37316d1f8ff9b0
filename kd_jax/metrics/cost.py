"""Times a model's forward pass: medians over many calls, after a warm-up.

A call takes no arguments and returns when its result is computed (`jax.block_until_ready`); its
inputs are on the device already.
"""

import statistics
import time
from collections.abc import Callable

WARM_UP = 3  # calls that are not counted: compilation, caches, clocks that speed up
FEWEST = 5  # calls that are counted however long they take


def measure(
    one: Callable[[], object],
    many: Callable[[], object],
    *,
    batch_size: int = 32,
    repeats: int = 100,
    budget_s: float = 10.0,
) -> dict[str, float]:
    """Measures the latency of a single sample and the throughput of batches.

    Args:
        one: runs a batch of one sample.
        many: runs a batch of `batch_size` samples.
        repeats, budget_s: see `times`; for each of the two.

    Returns:
        latency_ms and latency_ms_p90: median and 90th percentile of `one`; throughput: samples a
        second at the median of `many`; latency_calls and throughput_calls: how many were timed.
    """
    single = times(one, repeats, budget_s)
    batch = times(many, repeats, budget_s)
    return {
        "latency_ms": 1e3 * statistics.median(single),
        "latency_ms_p90": 1e3 * statistics.quantiles(single, n=10, method="inclusive")[-1],
        "throughput": batch_size / statistics.median(batch),
        "latency_calls": len(single),
        "throughput_calls": len(batch),
    }


def times(call: Callable[[], object], repeats: int, budget_s: float) -> list[float]:
    """Measures the seconds of each of `repeats` calls, after WARM_UP calls that do not count.

    Stops early, but not before FEWEST calls, once the counted calls took `budget_s` together.
    """
    for _ in range(WARM_UP):
        call()
    found: list[float] = []
    while len(found) < FEWEST or (len(found) < repeats and sum(found) < budget_s):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return found
