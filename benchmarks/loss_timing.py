"""What the timed processes of the benchmark of losses share: arguments, stop-watch, result."""

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

import loss_case
import timing


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--folder", required=True, type=pathlib.Path, help="of loss_case.py")
    parser.add_argument("--loss", required=True, choices=loss_case.LOSSES)
    parser.add_argument("--precision", required=True, choices=loss_case.PRECISIONS)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    return parser


def run(
    step: Callable[[], tuple], args: argparse.Namespace, to_numpy: Callable[[Any], Any]
) -> None:
    """Times `step`, which returns (value, gradient of the features, of the unembedding), and prints
    seconds, peak memory and relative errors."""
    last = None

    def timed() -> float:
        nonlocal last
        last = None  # as a training step, which frees its gradients
        last = step()
        return last[0]

    result = timing.timed(timed, args)
    value, *gradients = last
    given = args.folder, args.precision, args.loss
    found = loss_case.errors(*given, value, *map(to_numpy, gradients))
    print(json.dumps(result | {"errors": found}))
