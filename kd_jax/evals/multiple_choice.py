"""Figures of multiple choice by likelihood: which ending a model takes, how often it is the right
one, and how sure that share is."""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # of the normal distribution: 95% lie within


def taken(log_likelihoods: Sequence[np.ndarray]) -> np.ndarray:
    """int (Q,): the most likely ending of each question; the first one of several alike."""
    return np.array([int(np.argmax(values)) for values in log_likelihoods])


def per_character(log_likelihoods: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Log-likelihoods of endings over the characters they have; -inf for an empty text."""
    lengths = np.array([len(text) for text in texts], np.float64)
    with np.errstate(divide="ignore"):
        return np.where(lengths > 0, log_likelihoods / lengths, -np.inf)


def share(hits_Q: np.ndarray) -> dict[str, float | list[float]]:
    """The share of True, its standard error (binomial), and Wilson's interval at 95% (1927), which
    unlike the error is right for few questions and for shares near 0 or 1."""
    n, p = len(hits_Q), float(np.mean(hits_Q))
    middle, reach = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    interval = [max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)]
    return {"value": p, "error": math.sqrt(p * (1 - p) / n), "interval": interval}


def chance(counts_Q: Sequence[int]) -> float:
    """The share that guessing gets right among so many endings."""
    return float(np.mean([1 / count for count in counts_Q]))
