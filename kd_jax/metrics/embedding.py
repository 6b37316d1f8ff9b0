"""Computes metrics of embedders from vectors: correlation with scores of similarity, retrieval and
reranking.

Two texts are as similar as the cosine of their vectors, float32; a vector of zeros is similar to
none. Of documents that are equally similar to a query the irrelevant ones come first, so that
nothing is won by giving all texts one vector. Grades are relevant if they are above 0, and gain
what they are (Järvelin and Kekäläinen 2002), as in trec_eval. Means are over queries; one without
relevant documents counts as 0. Where a vector is not finite, all metrics are NaN.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kd_jax.metrics.classification import regression

SIMILARITY = ("spearman", "pearson")
RETRIEVAL = ("ndcg@10", "mrr@10", "recall@10", "recall@100")
RERANKING = ("map", "mrr@10")

_DEEPEST = 100  # place that a metric of retrieval looks at
_AT_ONCE = 1 << 24  # similarities that exist at a time, 64 MB


def similarity(first_ND: np.ndarray, second_ND: np.ndarray, scores_N: np.ndarray) -> dict:
    """Computes Spearman's and Pearson's correlation of the cosines of N pairs with their scores; 0
    where either are constant."""
    cosines_N = cosines(first_ND, second_ND)
    if np.isnan(cosines_N).any():
        return dict.fromkeys(SIMILARITY, math.nan)
    found = regression(cosines_N, scores_N)
    return {name: found[name] for name in SIMILARITY}


def retrieval(
    queries_QD: np.ndarray,
    documents_ND: np.ndarray,
    grades: Sequence[Mapping[int, float]],
    same_Q: np.ndarray,
) -> dict[str, float]:
    """Computes nDCG@10, MRR@10, recall@10 and recall@100 of finding documents by their similarity
    to queries, some queries at a time.

    Args:
        queries_QD: vectors of the queries.
        documents_ND: vectors of the corpus, which may be smaller than what a metric looks at.
        grades: for each query document -> grade; documents that are not there have 0.
        same_Q: the document that each query is itself, which it does not find; -1 for none.
    """
    queries_QD, documents_ND = _unit(queries_QD), _unit(documents_ND)
    if np.isnan(queries_QD).any() or np.isnan(documents_ND).any():
        return dict.fromkeys(RETRIEVAL, math.nan)
    size, found, grades_N = len(documents_ND), [], np.zeros(len(documents_ND))
    deepest, block = min(_DEEPEST, size), max(1, _AT_ONCE // size)
    for start in range(0, len(queries_QD), block):
        scores_BN = queries_QD[start : start + block] @ documents_ND.T
        own_B = same_Q[start : start + block]
        scores_BN[own_B >= 0, own_B[own_B >= 0]] = -np.inf
        least_B = np.partition(scores_BN, size - deepest, axis=1)[:, size - deepest]
        for query, (scores_N, least) in enumerate(zip(scores_BN, least_B, strict=True), start):
            known = {n: max(0, g) for n, g in grades[query].items()}
            # `deepest`, or more if some are equal, without the query itself.
            near = np.flatnonzero((scores_N >= least) & (scores_N > -np.inf))
            grades_N[[*known]] = [*known.values()]
            found_K = ranked(scores_N[near], grades_N[near])[:deepest]
            grades_N[[*known]] = 0
            found.append(_of_query(RETRIEVAL, found_K, np.array([*known.values()])))
    return _means(RETRIEVAL, found)


def reranking(scores_N: np.ndarray, grades_N: np.ndarray, query_N: np.ndarray) -> dict[str, float]:
    """Computes MAP and MRR@10 of ordering each query's own documents by their scores. Document n
    has the grade grades_N[n], and belongs to query query_N[n]; those of one query stand
    together."""
    if np.isnan(scores_N).any():
        return dict.fromkeys(RERANKING, math.nan)
    starts = np.flatnonzero(np.diff(query_N)) + 1
    parts = zip(np.split(scores_N, starts), np.split(grades_N, starts), strict=True)
    orders = [ranked(*part) for part in parts]
    return _means(RERANKING, [_of_query(RERANKING, found_K, found_K) for found_K in orders])


def cosines(first_ND: np.ndarray, second_ND: np.ndarray) -> np.ndarray:
    """Computes the cosine of each pair of vectors, (N,) float32; NaN where one is not finite."""
    return np.einsum("nd,nd->n", _unit(first_ND), _unit(second_ND))


def ranked(scores_N: np.ndarray, grades_N: np.ndarray) -> np.ndarray:
    """Sorts the grades of documents by falling score, and among equal scores by rising grade."""
    return grades_N[np.lexsort((grades_N, -scores_N))]


def _unit(vectors_ND: np.ndarray) -> np.ndarray:
    """Scales vectors to length 1, but for those of zeros; one that is not finite becomes NaN."""
    vectors_ND = np.asarray(vectors_ND, np.float32)
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    lengths_N1[~np.isfinite(lengths_N1)] = np.nan
    return vectors_ND / np.where(lengths_N1 == 0, 1, lengths_N1)


def _ndcg(found_K: np.ndarray, known_R: np.ndarray) -> float:
    most = _gain(np.sort(known_R)[::-1])
    return _gain(found_K) / most if most else 0.0


def _gain(grades_K: np.ndarray) -> float:
    first = grades_K[:10]
    return float((first / np.log2(np.arange(2, 2 + len(first)))).sum())


def _reciprocal_rank(found_K: np.ndarray, known_R: np.ndarray) -> float:
    hits = np.flatnonzero(found_K[:10] > 0)
    return 1 / (1 + int(hits[0])) if len(hits) else 0.0


def _recall(found_K: np.ndarray, known_R: np.ndarray) -> float:
    return int((found_K > 0).sum()) / max(1, int((known_R > 0).sum()))


def _average_precision(found_K: np.ndarray, known_R: np.ndarray) -> float:
    places = 1 + np.flatnonzero(found_K > 0)
    precisions = np.arange(1, 1 + len(places)) / places
    return float(precisions.sum()) / max(1, int((known_R > 0).sum()))


# Of one query: of the grades of documents from the first place on, and of all that are known.
_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "ndcg@10": _ndcg,
    "mrr@10": _reciprocal_rank,
    "recall@10": lambda found_K, known_R: _recall(found_K[:10], known_R),
    "recall@100": _recall,
    "map": _average_precision,
}


def _of_query(names: Sequence[str], found_K: np.ndarray, known_R: np.ndarray) -> list[float]:
    return [_METRICS[name](found_K, known_R) for name in names]


def _means(names: Sequence[str], found: Sequence[Sequence[float]]) -> dict[str, float]:
    return dict(zip(names, map(float, np.mean(found, axis=0)), strict=True))
