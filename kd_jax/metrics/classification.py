"""Computes metrics of classifiers and regressions: accuracy, F1 and correlations, metrics by class,
and how close a student's predictions are to its teacher's.

`macro_f1` is the plain mean of the classes' F1. A class without predictions or examples has
precision, recall or F1 of 0, and a correlation with constant values is 0.
"""

from collections.abc import Sequence

import numpy as np
from scipy import special


def cross_entropy(logits_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Computes the mean of -log softmax at the labels, nats an example, in float64."""
    logs_NC = special.log_softmax(np.asarray(logits_NC, np.float64), axis=1)
    return float(-np.take_along_axis(logs_NC, labels_N[:, None], axis=1).mean())


def figures(
    predictions_N: np.ndarray, labels_N: np.ndarray, names: Sequence[str], num_classes: int
) -> dict[str, float]:
    """Computes the metrics in `names`: accuracy, f1 (of class 1 of two), macro_f1,
    matthews_correlation."""
    from sklearn import metrics  # takes a second to import

    def f1(classes: Sequence[int]) -> float:
        return metrics.f1_score(
            labels_N, predictions_N, labels=classes, average="macro", zero_division=0.0
        )

    computed = {
        "accuracy": lambda: np.mean(predictions_N == labels_N),
        "f1": lambda: f1([1]),
        "macro_f1": lambda: f1(range(num_classes)),
        "matthews_correlation": lambda: metrics.matthews_corrcoef(labels_N, predictions_N),
    }
    return {name: float(computed[name]()) for name in names}


def by_class(predictions_N: np.ndarray, labels_N: np.ndarray, classes: Sequence[str]) -> dict:
    """Computes {"classes": {name: precision, recall, f1, support}, "confusion": counts (C, C)};
    rows of the confusion matrix are the true classes, columns the predicted ones."""
    from sklearn import metrics

    everything = range(len(classes))
    columns = metrics.precision_recall_fscore_support(
        labels_N, predictions_N, labels=everything, zero_division=0.0
    )
    return {
        "classes": {
            name: dict(precision=float(p), recall=float(r), f1=float(f), support=int(n))
            for name, p, r, f, n in zip(classes, *columns, strict=True)
        },
        "confusion": metrics.confusion_matrix(labels_N, predictions_N, labels=everything).tolist(),
    }


def regression(predictions_N: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    """Computes metrics of a regression: loss (mean squared error), pearson, spearman; a correlation
    with constant values is 0."""
    predictions_N = np.asarray(predictions_N, np.float64)
    labels_N = np.asarray(labels_N, np.float64)
    found = {
        "loss": float(np.mean((predictions_N - labels_N) ** 2)),
        "pearson": 0.0,
        "spearman": 0.0,
    }
    if np.ptp(predictions_N) > 0 and np.ptp(labels_N) > 0:
        from scipy import stats  # takes half a second to import

        found["pearson"] = float(stats.pearsonr(predictions_N, labels_N).statistic)
        found["spearman"] = float(stats.spearmanr(predictions_N, labels_N).statistic)
    return found


def compare_with_teacher(
    student: Sequence[np.ndarray], teacher: Sequence[np.ndarray]
) -> dict[str, float]:
    """Computes {"kl", "agreement"} of two models: KL(teacher || student) at temperature 1, nats a
    prediction, and the share of predictions where both have the same most likely class.

    Each row's logits are (C,), or (P, C) for P predictions, all of equal weight.
    """
    if student[0].ndim == 1:  # all of them at once
        student, teacher = [np.stack(student)], [np.stack(teacher)]
    divergence = agreed = count = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        pair = (np.asarray(logits, np.float64) for logits in (ours, theirs))
        log_p, log_q = (special.log_softmax(logits, axis=-1) for logits in pair)
        divergence += float(np.sum(np.exp(log_q) * (log_q - log_p)))
        agreed += float(np.sum(log_p.argmax(-1) == log_q.argmax(-1)))
        count += len(log_p)
    return {"kl": divergence / count, "agreement": agreed / count}
