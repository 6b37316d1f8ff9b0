"""Figures of classifiers: accuracy, F1, Matthews' correlation, and the same class by class.

`macro_f1` is the plain mean of the classes' F1. A class without predictions or examples has the
precision, recall or F1 0, and a correlation with something constant is 0.
"""

from collections.abc import Sequence

import numpy as np
from scipy import special


def cross_entropy(logits_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean of -log softmax at the labels, nats an example, in float64."""
    logs_NC = special.log_softmax(np.asarray(logits_NC, np.float64), axis=1)
    return float(-np.take_along_axis(logs_NC, labels_N[:, None], axis=1).mean())


def figures(
    predictions_N: np.ndarray, labels_N: np.ndarray, names: Sequence[str], num_classes: int
) -> dict[str, float]:
    """The figures called `names`: accuracy, f1 (of class 1 of two), macro_f1,
    matthews_correlation."""
    return {name: float(_FIGURES[name](predictions_N, labels_N, num_classes)) for name in names}


def by_class(predictions_N: np.ndarray, labels_N: np.ndarray, classes: Sequence[str]) -> dict:
    """{"classes": {name: precision, recall, f1, support}, "confusion": counts (C, C)}; rows of
    the confusion matrix are the true classes, columns the predicted ones."""
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


def _f1(predictions_N, labels_N, classes):
    from sklearn.metrics import f1_score  # takes a second to import

    return f1_score(labels_N, predictions_N, labels=classes, average="macro", zero_division=0.0)


def _matthews(predictions_N, labels_N):
    from sklearn.metrics import matthews_corrcoef

    if np.ptp(predictions_N) == 0 or np.ptp(labels_N) == 0:
        return 0.0
    return matthews_corrcoef(labels_N, predictions_N)


_FIGURES = {
    "accuracy": lambda predictions_N, labels_N, C: np.mean(predictions_N == labels_N),
    "f1": lambda predictions_N, labels_N, C: _f1(predictions_N, labels_N, [1]),
    "macro_f1": lambda predictions_N, labels_N, C: _f1(predictions_N, labels_N, range(C)),
    "matthews_correlation": lambda predictions_N, labels_N, C: _matthews(predictions_N, labels_N),
}
