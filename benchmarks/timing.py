"""What the timed processes share: their arguments, the stop-watch and the line they print."""

import argparse
import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable

from cases import CASES, TINY, Case


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
    losses = [step() for _ in range(args.warmup)]
    seconds, others = [], []
    for _ in range(args.steps):
        others_start, start = _others_seconds(), time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
        others.append((_others_seconds() - others_start) / (seconds[-1] * os.cpu_count()))
    return {"seconds": seconds, "others": others, "losses": losses, "peak_bytes": peak()}
