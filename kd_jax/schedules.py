"""Makes schedules of numbers that change with the step: learning rates, coefficients, temperatures.

Schedules are evaluated on the host in float64 and handed to the compiled step as inputs, so runs
that differ only in them share one program, and resuming needs nothing but the step.
"""

import math
from collections.abc import Callable
from typing import Any

from kd_jax.errors import UserError
from kd_jax.ranges import Real

Schedule = Callable[[int], float]


def _fraction(step: int, start: int, end: int) -> float:
    return min(max((step - start) / max(end - start, 1), 0.0), 1.0)


def _cosine(a: float, b: float, fraction: float) -> float:
    return b + (a - b) * (1.0 + math.cos(math.pi * fraction)) / 2.0


def value_schedule(value: Any, steps: int, key: str, within: Real) -> Schedule:
    """Makes a schedule from a number, or from {kind: linear | cosine, start, end, steps (default:
    the whole run)}; all of its values must be in the range `within`.

    Raises UserError naming `key`.
    """
    if isinstance(value, int | float):
        within.check(value, key)
        return lambda step: float(value)
    try:
        settings = dict(value)
        kind = settings.pop("kind")
        start, end = (float(settings.pop(name)) for name in ("start", "end"))
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{key}={value!r}: give a number or {{kind: linear | cosine, start, end[, steps]}}"
        ) from None
    last = Real(least=1).check(settings.pop("steps", steps), f"{key}.steps")
    if settings or kind not in ("linear", "cosine"):
        raise UserError(f"{key}: kind={kind!r} {sorted(settings)}: have linear, cosine; steps")
    for name, number in (("start", start), ("end", end)):
        within.check(number, f"{key}.{name}")
    if kind == "linear":
        return lambda step: start + (end - start) * _fraction(step, 0, last)
    return lambda step: _cosine(start, end, _fraction(step, 0, last))


def _with_warmup(peak: float, warmup: int, decay: Schedule) -> Schedule:
    return lambda step: peak * (step + 1) / (warmup + 1) if step < warmup else decay(step)


def _one_cycle(peak, steps, pct_start, div_factor, final_div_factor) -> Schedule:
    """Makes PyTorch's OneCycleLR with cosine annealing (Smith and Topin, arXiv:1708.07120)."""
    first, last = float(pct_start) * steps - 1, steps - 1
    low, final = peak / div_factor, peak / div_factor / final_div_factor

    def at(step):
        if step < first:
            return _cosine(low, peak, step / first)
        return _cosine(peak, final, min((step - first) / ((last - first) or 1.0), 1.0))

    return at


def learning_rate(config: Any, steps: int) -> Schedule:
    """Makes the schedule of `optim.learning_rate` (the peak) that `optim.schedule` names.

    kind: constant | linear | cosine | one_cycle. `warmup` is a number of steps, or a fraction of
    the run below 1, for the first three; `final` is the last value over the peak; one_cycle
    takes pct_start, div_factor and final_div_factor, as PyTorch's OneCycleLR.
    """
    peak, schedule = float(config.learning_rate), dict(config.schedule)
    kind = schedule.pop("kind", None)

    def setting(name: str, within: Real) -> float:
        return within.check(schedule.pop(name, within.default), f"optim.schedule.{name}")

    if kind == "one_cycle":
        pct_start = setting("pct_start", Real(least=0, most=1, default=0.3))
        div = setting("div_factor", Real(above=0, default=25.0))
        final_div = setting("final_div_factor", Real(above=0, default=1e4))
        result = _one_cycle(peak, steps, pct_start, div, final_div)
    else:
        warmup = setting("warmup", Real(least=0, default=0))
        warmup = round(warmup * steps) if 0 < warmup < 1 else int(warmup)
        final = 1.0 if kind == "constant" else setting("final", Real(least=0, default=0.0))
        final *= peak
        shapes = {
            "constant": lambda step: peak,
            "linear": lambda step: peak + (final - peak) * _fraction(step, warmup, steps),
            "cosine": lambda step: _cosine(peak, final, _fraction(step, warmup, steps)),
        }
        if kind not in shapes:
            raise UserError(f"optim.schedule.kind={kind!r}: have {', '.join(shapes)}, one_cycle")
        result = _with_warmup(peak, warmup, shapes[kind])
    if schedule:
        raise UserError(f"optim.schedule: {kind} does not read {', '.join(sorted(schedule))}")
    return result
