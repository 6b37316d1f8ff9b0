"""What the timed processes share: their arguments, the stop-watch and the line they print."""

import argparse
import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from cases import CASES, TINY, Case

QUIET = dict(  # of transformers' trainers: nothing but steps, on the CPU
    use_cpu=True,
    dataloader_pin_memory=False,
    logging_strategy="no",
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)


def arguments() -> argparse.ArgumentParser:
    """Arguments of every timed process."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--case", required=True, choices=CASES)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--precision", required=True, choices=("fp32", "bf16"))
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--models", required=True, type=pathlib.Path, help="teacher/, student/")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    return parser


def case_of(args: argparse.Namespace) -> Case:
    return (TINY if args.tiny else CASES)[args.case]


def _others_seconds() -> float:
    """Processor seconds that everybody but this process has used; constant where /proc is not."""
    stat = pathlib.Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    machine = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return machine - time.process_time()


def resident() -> int:
    """The most memory that the process has had, imports included, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Laps:
    """A stop-watch on steps that come one after the other: `start` it, then say when each ends.
    What it says is of those after the first `warmup` ones."""

    def __init__(self, warmup: int) -> None:
        self._left = warmup
        self._first = 0.0
        self._found: dict[str, list[float]] = {"seconds": [], "cpu": [], "others": []}

    def start(self) -> None:
        self._others, self._cpu = _others_seconds(), time.process_time()
        self._start = time.perf_counter()

    def end(self, **more: float) -> None:
        """Ends a step; the next one begins. `more`: what else is known of it."""
        seconds, cpu = time.perf_counter() - self._start, time.process_time() - self._cpu
        others = (_others_seconds() - self._others) / (seconds * os.cpu_count())
        self._first = self._first or seconds
        self._left -= 1
        if self._left < 0:
            found = {"seconds": seconds, "cpu": cpu, "others": others, **more}
            for name, value in found.items():
                self._found.setdefault(name, []).append(value)
        self.start()

    def result(self, losses: list[float], peak: Callable[[], int] = resident, **more: Any) -> dict:
        """What a process prints: `losses` of all steps, `first_s`, the seconds of the very first
        one, and `peak`, the most memory in use, in bytes."""
        about = {"losses": losses, "first_s": self._first, "peak_bytes": peak()}
        return self._found | about | more


def run(
    step: Callable[[], float], args: argparse.Namespace, peak: Callable[[], int] = resident
) -> None:
    """Times `step`, as `timed`, and prints the process's result."""
    print(json.dumps(timed(step, args, peak)))


def timed(
    step: Callable[[], float], args: argparse.Namespace, peak: Callable[[], int] = resident
) -> dict:
    """Times `step`, which returns its loss as a float (so it has ended when it returns); `peak`:
    the most memory in use, in bytes."""
    laps, losses = Laps(args.warmup), []
    laps.start()
    for _ in range(args.warmup + args.steps):
        losses.append(step())
        laps.end()
    return laps.result(losses, peak)
