"""Computes SQuAD's metrics (Rajpurkar et al. 2016, 2018), and finds answers from span logits."""

import collections
import re
import string
from collections.abc import Mapping, Sequence

import numpy as np

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Normalizes a text: lower case, then no punctuation, no articles, and single spaces."""
    text = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(text.split())


def exact_match(prediction: str, gold: str) -> float:
    """Returns 1.0 if both texts are the same once normalized, else 0.0."""
    return float(normalize(prediction) == normalize(gold))


def f1(prediction: str, gold: str) -> float:
    """Computes the F1 of the words in common, counted with repetition; an empty text matches only
    an empty one."""
    predicted, true = normalize(prediction).split(), normalize(gold).split()
    if not predicted or not true:
        return float(predicted == true)
    common = sum((collections.Counter(predicted) & collections.Counter(true)).values())
    return 2 * common / (len(predicted) + len(true))


def scores(
    predictions: Mapping[str, str], golds: Mapping[str, Sequence[str]]
) -> dict[str, tuple[float, float]]:
    """Scores each question by its best match with a gold answer: {id: (exact match, F1)}. Without
    gold answers the right answer is the empty text. Gold answers that are empty once normalized do
    not count, as in the official script."""
    found = {}
    for key, answers in golds.items():
        answers = [answer for answer in answers if normalize(answer)] or [""]
        text = predictions[key]
        found[key] = (
            max(exact_match(text, answer) for answer in answers),
            max(f1(text, answer) for answer in answers),
        )
    return found


def figures(
    predictions: Mapping[str, str], golds: Mapping[str, Sequence[str]], unanswerable: bool
) -> dict[str, float]:
    """Computes exact_match and f1 in percent over all questions; with `unanswerable` (v2.0) also
    HasAns_... and NoAns_..., over the questions that have a gold answer and those without."""
    of_key = scores(predictions, golds)
    groups = {"": list(golds)}
    if unanswerable:
        groups["HasAns_"] = [key for key in golds if golds[key]]
        groups["NoAns_"] = [key for key in golds if not golds[key]]
    found = {}
    for prefix, keys in groups.items():
        if keys:
            exact, overlap = 100 * np.mean([of_key[key] for key in keys], axis=0)
            found |= {f"{prefix}exact_match": float(exact), f"{prefix}f1": float(overlap)}
    return found


def best_spans(
    start_T: np.ndarray, end_T: np.ndarray, n_best: int, max_length: int
) -> list[tuple[float, int, int]]:
    """Finds the `n_best` best spans (score, first, last token), best first; fewer if few are valid.

    The score is the sum of start and end logit. Candidates are the `n_best` starts with the
    `n_best` ends, first <= last, at most `max_length` tokens; ties go to the better start, then to
    the first token.
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


def best_threshold(
    null_odds: Mapping[str, float],
    best_texts: Mapping[str, str],
    golds: Mapping[str, Sequence[str]],
) -> float:
    """Finds the threshold t with the best F1: a question is answered if its null odds (score of no
    answer minus score of the best span) are at most t; -inf answers none."""
    of_key = scores(best_texts, golds)
    keys = sorted(golds, key=lambda key: null_odds[key])
    gain = np.array([of_key[key][1] - (0.0 if golds[key] else 1.0) for key in keys])
    odds = np.array([null_odds[key] for key in keys])
    total = np.concatenate([[0.0], np.cumsum(gain)])
    # Questions with the same odds are answered together: only the last of them is a cut.
    cuts = np.flatnonzero(np.concatenate([[True], odds[1:] != odds[:-1], [True]]))
    best = cuts[total[cuts].argmax()]
    return float(odds[best - 1] if best else odds[0] - 1)
