"""What the systems of the fine-tuning benchmark have in common.

Read by every process of it, so it imports numpy alone: a row's peak memory is its own.
"""

import argparse
import pathlib

import numpy as np

ROWS, EVAL_ROWS = 32, 64  # of a batch
SEQ_LEN = 128  # tokens at most; no sentence of SST-2 has as many
TEMPERATURE, CE_WEIGHT, KL_WEIGHT = 2.0, 0.5, 0.5
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 5e-5, 0.01, 1.0
BETAS, EPSILON = (0.9, 0.999), 1e-8
WORKS = ("finetune", "distill", "evaluate")


def arguments() -> argparse.ArgumentParser:
    """Arguments of every timed process."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--work", required=True, choices=WORKS)
    parser.add_argument("--precision", required=True, choices=("fp32", "bf16"))
    parser.add_argument("--folder", required=True, type=pathlib.Path, help="of finetune_models.py")
    parser.add_argument("--data", required=True, type=pathlib.Path, help="train.tsv of SST-2")
    parser.add_argument("--steps", required=True, type=int, help="timed steps, or passes")
    return parser


def chosen(lengths_S: np.ndarray, steps: int) -> list[int]:
    """Which batches of an epoch are timed, given their padded lengths: every (S / steps)-th in the
    order of length, so that a few stand for all; in random order."""
    places = ((np.arange(steps) + 0.5) * len(lengths_S) / steps).astype(int)
    order_S = np.argsort(lengths_S, kind="stable")
    return np.random.default_rng(0).permutation(order_S[places]).tolist()


def first_of_each(lengths_S: np.ndarray, most: int) -> list[int]:
    """A batch of each padded length, at most so many, from the shortest to the longest: what is
    run before the stop-watch starts."""
    lengths, first = np.unique(lengths_S, return_index=True)
    return first[np.unique(np.linspace(0, len(lengths) - 1, most).astype(int))].tolist()
