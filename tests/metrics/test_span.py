import numpy as np
import pytest

from kd_jax.metrics import span


@pytest.mark.parametrize(
    "text, want",
    [
        ("The  Cat!", "cat"),
        ("an apple a day", "apple day"),
        ("theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("a-the", "athe"),  # punctuation goes before articles
        ("The", ""),
        ("", ""),
    ],
)
def test_normalize(text, want):
    assert span.normalize(text) == want


def test_words_are_counted_with_repetition():
    assert span.f1("b b c", "b d") == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert span.f1("b b", "b b b") == pytest.approx(0.8)
    assert span.f1("x", "y") == 0.0
    assert (span.f1("", "the"), span.f1("x", ""), span.f1("", "x")) == (1.0, 0.0, 0.0)


def test_the_best_gold_answer_counts_and_unanswerable_ones_want_nothing():
    golds = {"several": ["one two", "two three"], "none": [], "other": [], "blank": ["the", "red"]}
    predictions = {"several": "The two three.", "none": "", "other": "x", "blank": ""}
    assert span.scores(predictions, golds) == {
        "several": (1.0, 1.0),
        "none": (1.0, 1.0),
        "other": (0.0, 0.0),
        "blank": (0.0, 0.0),
    }
    found = span.figures(predictions | {"several": "one"}, golds, unanswerable=True)
    assert found == pytest.approx(
        {
            "exact_match": 25.0,
            "f1": 100 * (1 + 2 / 3) / 4,
            "HasAns_exact_match": 0.0,
            "HasAns_f1": 100 / 3,
            "NoAns_exact_match": 50.0,
            "NoAns_f1": 50.0,
        }
    )
    assert list(span.figures(predictions, golds, unanswerable=False)) == ["exact_match", "f1"]
    only = span.figures({"a": "x"}, {"a": ["x"]}, unanswerable=True)
    assert only == {"exact_match": 100, "f1": 100, "HasAns_exact_match": 100, "HasAns_f1": 100}


def slow_best(start, end, n_best, max_length):
    tokens = range(len(start))
    starts = sorted(tokens, key=lambda t: -start[t])[:n_best]
    ends = sorted(tokens, key=lambda t: -end[t])[:n_best]
    found = [(start[s] + end[e], s, e) for s in starts for e in ends if 0 <= e - s < max_length]
    return sorted(found, key=lambda item: -item[0])[:n_best]


@pytest.mark.parametrize("seed", range(20))
def test_best_spans_are_those_of_trying_all(seed):
    rng = np.random.default_rng(seed)
    start, end = rng.normal(size=(2, 12)).astype(np.float32)
    if seed % 3 == 0:
        start, end = start.round(), end.round()  # ties
    for n_best, max_length in ((2, 12), (12, 3), (3, 1), (20, 30)):
        found = span.best_spans(start, end, n_best, max_length)
        expected = slow_best(start, end, n_best, max_length)
        assert np.array(found) == pytest.approx(np.array(expected))


def test_no_span_at_all():
    assert span.best_spans(np.zeros(0), np.zeros(0), 3, 3) == []
    down = np.array([0.0, 1.0]), np.array([1.0, 0.0])
    assert span.best_spans(*down, 1, 5) == []


@pytest.mark.parametrize("seed", range(10))
def test_the_threshold_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    keys = [str(i) for i in range(12)]
    odds = {key: float(rng.integers(-4, 5)) for key in keys}  # with ties
    golds = {key: [["x"], ["x y"], []][rng.integers(3)] for key in keys}
    texts = dict.fromkeys(keys, "x")

    def f1_at(threshold):
        answers = {key: texts[key] if odds[key] <= threshold else "" for key in keys}
        return span.figures(answers, golds, True)["f1"]

    found = span.best_threshold(odds, texts, golds)
    assert np.isfinite(found)
    assert f1_at(found) == pytest.approx(max(f1_at(t) for t in np.arange(-6, 6, 0.5)))
