"""Metrics of embedders beside scikit-learn, definitions written out, and what can be counted."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, ndcg_score

from kd_jax.metrics import embedding


def vectors(count, seed, width=6):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def unit(vectors_ND):
    return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)


def plain(scores_QN, grades_QN, places):
    """trec_eval's definitions of what is found at the first places, query by query, with all
    documents sorted."""
    found = {name: [] for name in embedding.RETRIEVAL}
    for scores_N, grades_N in zip(scores_QN, grades_QN, strict=True):
        order = sorted(range(len(scores_N)), key=lambda n: (-scores_N[n], grades_N[n]))
        grades = [max(0, grades_N[n]) for n in order]
        gain = lambda some: sum(g / math.log2(2 + i) for i, g in enumerate(some[:10]))  # noqa: E731
        best, relevant = gain(sorted(grades, reverse=True)), sum(g > 0 for g in grades)
        ranks = [i for i, grade in enumerate(grades[:10], 1) if grade > 0]
        found["ndcg@10"].append(gain(grades) / best if best else 0)
        found["mrr@10"].append(1 / ranks[0] if ranks else 0)
        for k in (10, 100):
            hits = sum(grade > 0 for grade in grades[:k])
            found[f"recall@{k}"].append(hits / relevant if relevant else 0)
    return {name: pytest.approx(np.mean(each), abs=1e-6) for name, each in found.items()}


def retrieval(queries_QD, documents_ND, grades_QN, same_Q=None):
    grades = [{n: g for n, g in enumerate(grades_N) if g} for grades_N in grades_QN.tolist()]
    same_Q = np.full(len(queries_QD), -1) if same_Q is None else np.array(same_Q)
    return embedding.retrieval(queries_QD, documents_ND, grades, same_Q)


@pytest.mark.parametrize("size", [1, 7, 60, 300])
def test_retrieval_is_that_of_scikit_learn_and_of_plain_definitions(size):
    queries_QD, documents_ND = vectors(9, 0), vectors(size, 1)
    grades_QN = np.random.default_rng(2).integers(0, 4, (9, size)) * (vectors(9, 3, size) > 0.8)
    grades_QN[4] = 0
    found = retrieval(queries_QD, documents_ND, grades_QN)
    scores_QN = unit(queries_QD) @ unit(documents_ND).T
    assert found == plain(scores_QN, grades_QN, size) and [*found] == [*embedding.RETRIEVAL]
    if size > 1:
        theirs = ndcg_score(grades_QN, scores_QN, k=10)
        assert found["ndcg@10"] == pytest.approx(theirs, abs=1e-6) and 0 < theirs < 1


def test_retrieval_by_hand():
    documents_ND = np.eye(4, dtype=np.float32)
    queries_QD = np.array([[4, 3, 2, 1], [1, 2, 3, 4], [0, 0, 0, 5]], np.float32)
    found = retrieval(queries_QD, documents_ND, np.array([[0, 2, 0, 1], [0, 0, 1, -1], [0] * 4]))
    first = (2 / math.log2(3) + 1 / math.log2(5)) / (2 + 1 / math.log2(3))
    assert found["ndcg@10"] == pytest.approx((first + 1 / math.log2(3) + 0) / 3)
    assert found["mrr@10"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert found["recall@10"] == found["recall@100"] == pytest.approx(2 / 3)


def test_few_similarities_exist_at_a_time(monkeypatch):
    queries_QD, documents_ND = vectors(23, 4), vectors(300, 5)
    grades_QN = np.random.default_rng(6).integers(0, 2, (23, 300))
    whole = retrieval(queries_QD, documents_ND, grades_QN)
    sizes, partition = [], np.partition
    monkeypatch.setattr(embedding, "_AT_ONCE", 5 * 300)
    monkeypatch.setattr(
        np,
        "partition",
        lambda x, *args, **keys: (sizes.append(x.size), partition(x, *args, **keys))[1],
    )
    assert retrieval(queries_QD, documents_ND, grades_QN) == pytest.approx(whole)
    assert max(sizes) == 5 * 300 and len(sizes) == 5


def test_equal_similarities_win_nothing():
    ones_ND = np.ones((200, 4), np.float32)
    grades_QN = np.zeros((2, 200), int)
    grades_QN[:, :3] = [1, 2, 1]  # listed first
    found = retrieval(ones_ND[:2], ones_ND, grades_QN)
    assert set(found.values()) == {0.0}
    few = retrieval(ones_ND[:2], ones_ND[:12], grades_QN[:, :12])
    assert few["recall@100"] == 1 and few["mrr@10"] == 1 / 10 and few["recall@10"] == 1 / 3
    grades_N, query_N = np.array([1, 0, 0, 1, 0]), np.array([0, 0, 0, 1, 1])
    found = embedding.reranking(np.zeros(5), grades_N, query_N)
    assert found["mrr@10"] == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_a_query_does_not_find_itself():
    documents_ND, grades_QN = vectors(50, 7), np.zeros((1, 50), int)
    nearest = int((unit(documents_ND) @ unit(documents_ND)[3]).argsort()[-2])
    grades_QN[0, nearest] = 1
    assert retrieval(documents_ND[3:4], documents_ND, grades_QN)["mrr@10"] == 1 / 2
    assert retrieval(documents_ND[3:4], documents_ND, grades_QN, [3])["mrr@10"] == 1
    grades_QN[0, 3] = 1
    # Which is relevant all the same.
    assert retrieval(documents_ND[3:4], documents_ND, grades_QN, [3])["recall@100"] == 1 / 2


def test_reranking_is_that_of_scikit_learn():
    rng = np.random.default_rng(8)
    query_N = np.repeat(np.arange(20), rng.integers(2, 30, 20))
    scores_N, grades_N = rng.normal(size=len(query_N)), rng.integers(0, 2, len(query_N))
    for query in range(20):
        grades_N[np.flatnonzero(query_N == query)[:2]] = 0, 1
    found = embedding.reranking(scores_N, grades_N, query_N)
    parts = [(grades_N[query_N == query], scores_N[query_N == query]) for query in range(20)]
    expected = np.mean([average_precision_score(*part) for part in parts])
    assert found["map"] == pytest.approx(expected)
    ranks = [1 + np.flatnonzero(y[np.argsort(-x)])[0] for y, x in parts]
    assert found["mrr@10"] == pytest.approx(np.mean([1 / r if r <= 10 else 0 for r in ranks]))
    assert max(ranks) > 1


def test_correlations_are_those_of_scipy():
    first_ND, second_ND, scores_N = vectors(40, 9), 3 * vectors(40, 10), np.arange(40) % 6
    cosines_N = (unit(first_ND) * unit(second_ND)).sum(axis=1)
    found = embedding.similarity(first_ND, second_ND, scores_N)
    assert found["spearman"] == pytest.approx(stats.spearmanr(cosines_N, scores_N).statistic)
    assert found["pearson"] == pytest.approx(stats.pearsonr(cosines_N, scores_N).statistic)
    constant = embedding.similarity(first_ND, first_ND * 0, scores_N)
    assert constant == {"spearman": 0.0, "pearson": 0.0}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_figures_of_vectors_that_are_not_finite_are_nan(value):
    spoilt_ND = vectors(12, 11)
    spoilt_ND[3, 0] = value
    found = [
        embedding.similarity(spoilt_ND, vectors(12, 12), np.arange(12)),
        retrieval(spoilt_ND[:4], vectors(12, 12), np.eye(4, 12)),
        retrieval(vectors(4, 12), spoilt_ND, np.eye(4, 12)),
        embedding.reranking(spoilt_ND[:, 0], np.arange(12) % 2, np.zeros(12)),
    ]
    names = (embedding.SIMILARITY, *[embedding.RETRIEVAL] * 2, embedding.RERANKING)
    for figures, have in zip(found[: 3 + np.isnan(value)], names, strict=False):
        assert [*figures] == [*have] and all(map(math.isnan, figures.values()))
