"""Figures of regressions: how predicted and true numbers go together."""

import numpy as np
from scipy import stats


def figures(predictions_N: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    """loss (mean squared error), pearson, spearman. Correlations with something constant are 0."""
    predictions_N = np.asarray(predictions_N, np.float64)
    labels_N = np.asarray(labels_N, np.float64)
    found = {
        "loss": float(np.mean((predictions_N - labels_N) ** 2)),
        "pearson": 0.0,
        "spearman": 0.0,
    }
    if np.ptp(predictions_N) > 0 and np.ptp(labels_N) > 0:
        found["pearson"] = float(stats.pearsonr(predictions_N, labels_N).statistic)
        found["spearman"] = float(stats.spearmanr(predictions_N, labels_N).statistic)
    return found
