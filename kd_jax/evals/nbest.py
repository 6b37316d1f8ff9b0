"""The best answers of a context, with their scores; `span.best_span` is the first of them."""

import numpy as np


def best_spans(
    start_T: np.ndarray, end_T: np.ndarray, n_best: int, max_length: int
) -> list[tuple[float, int, int]]:
    """At most `n_best` (score, first, last token), the best first.

    The score is the sum of start and end logit; candidates and ties are those of
    `span.best_span`. Empty where no start has an end behind it.
    """
    starts_N = np.argsort(-start_T, kind="stable")[:n_best]
    ends_N = np.argsort(-end_T, kind="stable")[:n_best]
    size_NN = ends_N - starts_N[:, None] + 1
    rows, columns = np.nonzero((size_NN > 0) & (size_NN <= max_length))
    scores = start_T[starts_N[rows]].astype(np.float64) + end_T[ends_N[columns]]
    return [
        (float(scores[i]), int(starts_N[rows[i]]), int(ends_N[columns[i]]))
        for i in np.argsort(-scores, kind="stable")[:n_best]
    ]
