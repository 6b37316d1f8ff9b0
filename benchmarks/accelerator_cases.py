"""The work that accelerator.py times: shapes, and the stop-watch of its processes.

Read by every process of the benchmark, so it imports nothing large.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable

TEMPERATURE, LEARNING_RATE, WEIGHT_DECAY = 2.0, 1e-4, 0.01
SECONDS, STEPS, WARMUP = 8.0, 30, 3  # timed steps end after so long, or so many
CHUNK = 2048  # rows whose logits PyTorch has at a time


@dataclasses.dataclass(frozen=True)
class Work:
    """Teacher and student by hub id, whose shapes are built in; rows of so many tokens."""

    head: str  # clm | mlm
    teacher: str
    student: str  # "": the teacher with `layers` layers
    layers: int
    tokens: int
    rows: int
    small: int  # rows on a chip of 16 GB
    kind: str = "step"  # step | loss | generate


QWEN = ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-0.5B", 0)
WORK = {
    "bert": Work("mlm", "google-bert/bert-base-uncased", "", 6, 512, 64, 16),
    "gpt2": Work("clm", "openai-community/gpt2", "", 6, 1024, 32, 8),
    "qwen": Work("clm", *QWEN, 2048, 8, 1),
    "loss": Work("clm", *QWEN, 2048, 8, 1, "loss"),
    "generate": Work("clm", *QWEN, 128, 32, 8, "generate"),  # so many tokens after so many
}
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
TINY |= dict(max_position_embeddings=64, vocab_size=512)


def work_of(args: argparse.Namespace) -> Work:
    """The work that a process is to time."""
    found = WORK[args.work]
    if args.tiny:
        return dataclasses.replace(found, tokens=32, rows=2, layers=1)
    return dataclasses.replace(found, rows=found.small) if args.small else found


def arguments() -> argparse.ArgumentParser:
    """Arguments of every timed process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", required=True, choices=WORK)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--small", action="store_true")
    return parser


def time_and_print(
    step: Callable[[], object], work: Work, tiny: bool, peak: Callable[[], int], **more: object
) -> None:
    """Times `step`, which returns when the device is done, and prints the process's result."""
    for _ in range(1 if tiny else WARMUP):
        step()
    seconds, begin = [], time.perf_counter()
    while len(seconds) < (2 if tiny else STEPS) and time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    result = {"median_s": statistics.median(seconds), "tokens": work.rows * work.tokens}
    print(json.dumps(result | {"peak_bytes": peak()} | more))
