"""Computes log-likelihoods of stretches of text, and metrics of multiple choice from them.

Logits are computed only for tokens that predict a scored one, in chunks, never for all tokens.

A changed model is compared with the original one on the same endings. The primary metric is the
mean absolute difference of log-likelihoods: it needs no right answers, and it shows differences
that accuracies of small models, which are close to chance, do not. An accuracy's retention is the
changed model's over the original's (Musaeus and van der Goot 2025), and is given only if the
original is above chance by more than two standard errors.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.precision import Policy, product
from kd_jax.types import Array, Batch, ModelOutput

LOGITS = 2**22  # of a chunk: 16 MB
ROWS = 128, 1024  # of a chunk, at least and at most
ERRORS = 2.0  # standard errors above chance from which on there is something to retain


def of_segments(output: ModelOutput, batch: Batch, segments: int, policy: Policy) -> Array:
    """Sums log p(label) in nats over each segment's tokens of weight 1: float32 (B, K).

    Column k belongs to segment k + 1 of `batch.segments_BT`, K = `segments`; without segments there
    is one column. `policy` has the types of the product that makes the float32 logits.
    """
    B, T = batch.tokens_BT.shape
    features, unembed_VD, bias_V = output.whole()
    features_ND, unembed_VD = (
        features.reshape(B * T, -1).astype(policy.operand),
        unembed_VD.astype(policy.operand),
    )
    least = max(ROWS[0], policy.least_rows)
    size = min(B * T, max(least, min(ROWS[1], LOGITS // unembed_VD.shape[0])))
    scored_N = batch.weights.reshape(-1) > 0
    count = scored_N.sum()
    # Indices of the scored tokens, filled up to whole chunks with indices of no token.
    room = -(-B * T // size) * size
    order_R = jnp.nonzero(scored_N, size=room, fill_value=B * T)[0]
    labels_N = batch.labels.reshape(-1)

    def chunk(i: Array, found_N: Array) -> Array:
        rows_C = jax.lax.dynamic_slice(order_R, (i * size,), (size,))
        features_CD = features_ND.at[rows_C].get(mode="clip")
        logits_CV = product("cd,vd->cv", features_CD, unembed_VD, policy.operand)
        if bias_V is not None:
            logits_CV += bias_V.astype(jnp.float32)[None]
        labels_C1 = labels_N.at[rows_C].get(mode="clip")[:, None]
        label_C = jnp.take_along_axis(logits_CV, labels_C1, axis=1)[:, 0]
        log_p_C = label_C - jax.nn.logsumexp(logits_CV, axis=1)
        return found_N.at[rows_C].set(log_p_C, mode="drop")

    zeros_N = jnp.zeros(B * T, jnp.float32)
    log_p_BT = jax.lax.fori_loop(0, -(-count // size), chunk, zeros_N).reshape(B, T)
    if batch.segments_BT is None:
        return log_p_BT.sum(axis=1, keepdims=True)
    own = [batch.segments_BT == number for number in range(1, segments + 1)]
    return jnp.stack([jnp.where(own_BT, log_p_BT, 0.0).sum(axis=1) for own_BT in own], axis=1)


def taken(log_likelihoods: Sequence[np.ndarray]) -> np.ndarray:
    """Chooses the most likely ending of each question, int (Q,); the first one in a tie."""
    return np.array([int(np.argmax(values)) for values in log_likelihoods])


def per_character(log_likelihoods: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Divides log-likelihoods of endings by their numbers of characters; -inf for an empty one."""
    lengths = np.array([len(text) for text in texts], np.float64)
    with np.errstate(divide="ignore"):
        return np.where(lengths > 0, log_likelihoods / lengths, -np.inf)


def share(hits_Q: np.ndarray) -> dict[str, float | list[float]]:
    """Computes the share of True, its standard error (binomial), and Wilson's 95% interval (1927),
    which unlike the error also holds for few questions and for shares near 0 or 1."""
    n, p = len(hits_Q), float(np.mean(hits_Q))
    from scipy import stats  # takes half a second to import

    found = stats.binomtest(int(np.sum(hits_Q)), n).proportion_ci(method="wilson")
    interval = [float(found.low), float(found.high)]
    return {"value": p, "error": math.sqrt(p * (1 - p) / n), "interval": interval}


def chance(counts_Q: Sequence[int]) -> float:
    """Computes the accuracy of guessing, from the number of endings of each question."""
    return float(np.mean([1 / count for count in counts_Q]))


def difference(original_N: np.ndarray, changed_N: np.ndarray) -> dict[str, float]:
    """Compares two models' log-likelihoods in nats an ending: mean and largest |difference|, the
    mean's standard error over endings, and the mean of changed - original.

    Endings that are NaN in both (left out) do not count. Raises ValueError if the endings are not
    the same.
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
    """Compares the accuracies of two models on the same questions, from whether each answers a
    question correctly (bool).

    Returns {"retention": changed / original, or None if the original is not above chance by two of
    its standard errors; "retention_error": its standard error (delta method, questions paired), or
    None; "agreement": the share of questions that both answer correctly or both wrongly}.
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
    """Computes `difference`, and `retention` for each accuracy under the accuracy's name: "acc"
    gives "acc_retention", "acc_retention_error", "acc_agreement"."""
    found: dict[str, float | None] = dict(difference(original_N, changed_N))
    for name, hits_Q in original_hits.items():
        kept = retention(hits_Q, changed_hits[name], chance)
        found |= {f"{name}_{key}": value for key, value in kept.items()}
    return found
