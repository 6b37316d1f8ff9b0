"""What a changed model keeps of the original one, on the same endings.

The primary figure is the mean absolute difference of log-likelihoods: it needs no right answers,
and it tells apart what accuracies of small models, close to guessing, do not. An accuracy's
retention is the changed model's over the original's (Musaeus and van der Goot 2025), and is given
only where the original knows more than guessing: by more than two of its standard errors.
"""

import math
from collections.abc import Mapping

import numpy as np

ERRORS = 2.0  # standard errors above chance from which on there is something to retain


def difference(original_N: np.ndarray, changed_N: np.ndarray) -> dict[str, float]:
    """Of log-likelihoods in nats an ending: mean |difference| and its standard error over endings,
    the largest one, and the mean of changed - original.

    Endings that are NaN in both (left out) do not count. Raises ValueError where they are not the
    same endings.
    """
    original_N, changed_N = (np.asarray(x, np.float64) for x in (original_N, changed_N))
    kept_N = ~np.isnan(original_N)
    if original_N.shape != changed_N.shape or (kept_N != ~np.isnan(changed_N)).any():
        raise ValueError("the two models were not scored on the same endings")
    signed_N = (changed_N - original_N)[kept_N]
    sizes_N = np.abs(signed_N)
    spread = sizes_N.std(ddof=1) / math.sqrt(len(sizes_N)) if len(sizes_N) > 1 else 0.0
    return {
        "mean_difference": float(sizes_N.mean()),
        "mean_difference_error": float(spread),
        "largest_difference": float(sizes_N.max()),
        "mean_change": float(signed_N.mean()),
    }


def retention(
    original_Q: np.ndarray, changed_Q: np.ndarray, chance: float
) -> dict[str, float | None]:
    """Of an accuracy, from which questions both models answer rightly (bool, the same questions).

    {"retention": changed / original, or None where the original is not above chance by two of its
    standard errors; "retention_error": its standard error (delta method, questions paired), or
    None; "agreement": the share of questions that both answer rightly or both wrongly}.
    """
    a, b = (np.asarray(x, np.float64) for x in (original_Q, changed_Q))
    if a.shape != b.shape:
        raise ValueError(f"{len(a)} questions of the original, {len(b)} of the changed model")
    p, n = a.mean(), len(a)
    found = {"retention": None, "retention_error": None, "agreement": float((a == b).mean())}
    if p - chance > ERRORS * math.sqrt(p * (1 - p) / n):
        ratio = b.mean() / p
        # The ratio's error is that of the mean of b - ratio a, over the original's accuracy.
        residual_Q = b - ratio * a
        found["retention"] = float(ratio)
        found["retention_error"] = float(residual_Q.std() / math.sqrt(n) / p)
    return found


def compare(
    original_N: np.ndarray,
    changed_N: np.ndarray,
    original_hits: Mapping[str, np.ndarray],
    changed_hits: Mapping[str, np.ndarray],
    chance: float | None,
) -> dict[str, float | None]:
    """`difference`, and `retention` of each accuracy in the mappings, under its name: "acc" gives
    "acc_retention", "acc_retention_error", "acc_agreement"."""
    found: dict[str, float | None] = dict(difference(original_N, changed_N))
    for name, hits_Q in original_hits.items():
        kept = retention(hits_Q, changed_hits[name], chance)
        found |= {f"{name}_{key}": value for key, value in kept.items()}
    return found
