"""What the processes of the HellaSwag benchmark share: arguments, and how passes are timed."""

import argparse
import pathlib
import time
from collections.abc import Callable

import numpy as np
from timing import run


def arguments() -> argparse.ArgumentParser:
    """Arguments of every timed process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=pathlib.Path)
    parser.add_argument("--batch_size", required=True, type=int)
    parser.add_argument("--steps", required=True, type=int, help="timed passes")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="the scores, as .npz")
    return parser


def time_passes(
    one_pass: Callable[[], np.ndarray],
    judge: Callable[[np.ndarray], dict[str, float]],
    args: argparse.Namespace,
) -> None:
    """Writes what the first pass finds, (N,) log-likelihoods, and what `judge` makes of it; then
    times passes and prints the process's result."""
    began = time.perf_counter()
    values_N = one_pass()
    first = time.perf_counter() - began
    np.savez(args.out, log_likelihoods=values_N, first=first, **judge(values_N))
    args.warmup = 0
    run(lambda: float(one_pass().mean()), args)
