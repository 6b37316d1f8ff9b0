"""SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250; v2.0: 2018, arXiv:1806.03822): the span of a
context that answers a question. A split is of v2.0 where its file has `is_impossible`.

config.task:
    name                 "squad"
    seq_len              tokens of a window: question and a piece of its context
    doc_stride           tokens that two neighboring windows share
    max_question_length  tokens of a question that are kept
    max_answer_length    tokens of the longest answer that is considered
    n_best               starts and ends of a window that are considered
    null_threshold       v2.0: a question is answered when (score of no answer) - (score of the
                         best answer) is at most this. None: the number that is best on the
                         validation split (`tuned`)
    best_non_null        True: always answer, also on v2.0

config.data as in data/splits.py; files are SQuAD's .json, the hub's columns are read too. With
`without`, the path of another SQuAD .json, a source leaves out that file's contexts, and also its
articles (by title) unless `same_articles` is True.
Held-out questions come from articles that are not in the training data.
"""

import copy
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import special

from kd_jax.data import source, splits, squad
from kd_jax.data.splits import HELD_OUT_SEED
from kd_jax.data.squad import Windows, windows
from kd_jax.errors import UserError
from kd_jax.metrics import span
from kd_jax.ranges import Real, Whole
from kd_jax.tasks.task import ExampleTask, local

DEFAULTS = dict(
    name="squad",
    seq_len=Whole(least=8, default=384),
    doc_stride=Whole(least=1, default=128),
    max_question_length=Whole(least=1, default=64),
    max_answer_length=Whole(least=1, default=30),
    n_best=Whole(least=1, default=20),
    null_threshold=Real(default=None),
    best_non_null=False,
)


class _Best(NamedTuple):
    text: str  # of the best span, "" where there is none
    null_odds: float  # score of no answer minus score of the span


class Squad(ExampleTask):
    """SQuAD; rows are windows, labels (B, 2) are the first and last token of the answer."""

    head = "span"
    labels = ()
    metrics = ("f1", "exact_match")  # v2.0 splits also have HasAns_ and NoAns_ figures
    primary = "f1"
    defaults = DEFAULTS
    evaluated = dict(null_threshold=0.0)  # which else is tuned on the validation split

    def __init__(self, config, data, tokenizer) -> None:
        super().__init__(config, data, tokenizer)
        self.threshold = self.config["null_threshold"]

    @classmethod
    def smoke(cls, task, data, samples):
        train = str(data["train"])
        version = "v1.1" if "v1" in train or "1.1" in train else "v2.0"
        names = (samples / "squad" / f"{name}-{version}.json" for name in ("train", "dev"))
        return dict(seq_len=48, doc_stride=16, max_question_length=16), local(*names)

    def tunes(self, split):
        return self.threshold is None and split != "validation" and self._may_decline(split)

    def tuned(self, outputs):
        """Returns a copy of the task with the null threshold that has the best F1 on these outputs
        of the validation split; itself if the config sets the threshold or the split is v1.1."""
        if self.threshold is not None or not self._may_decline("validation"):
            return self
        other = copy.copy(self)
        other.threshold = self._threshold("validation", self._best("validation", outputs))
        return other

    def _read(self, key):
        where, spec = self._spec(key, without=None, same_articles=False)
        without, same, path = spec.pop("without"), spec.pop("same_articles"), spec["path"]
        if spec["source"] == "files" and str(path).endswith(".json"):
            found = squad.read(Path(os.path.expanduser(path)))
        else:
            found = squad.of_table(source.table(spec, where))
        if without is None:
            return found
        others = squad.read(Path(os.path.expanduser(without))).questions
        titles = set() if same else {question.title for question in others} - {""}
        contexts = {question.context for question in others}
        kept = [q.title not in titles and q.context not in contexts for q in found.questions]
        if not any(kept):
            raise UserError(
                f"{found.name} (config.{where}) holds nothing that {without} lacks: take another "
                f"file, or config.{where}.same_articles=True to leave out its contexts alone"
            )
        return found.part(kept, f"{found.name} without {without}")

    def _held_out(self, examples):
        questions = examples.questions
        titles: dict[str, str] = {}
        for question in questions:  # a context stays on one side, even where two articles have it
            titles.setdefault(question.context, question.title)
        groups = [titles[question.context] for question in questions]
        if len(set(groups)) < 2:
            groups = [question.context for question in questions]
        return splits.grouped(groups, self.data["held_out"], HELD_OUT_SEED)

    def _about(self, split):
        examples, found = self.examples(split), super()._about(split)
        if not examples.unanswerable:
            return found
        answered = sum(bool(question.answers) for question in examples.questions)
        classes = dict(answerable=answered, unanswerable=len(examples) - answered)
        return found | dict(classes=classes)

    def _encode(self, split):
        config = self.config
        return windows(
            self.tokenizer,
            self.examples(split).questions,
            self.seq_len,
            config["doc_stride"],
            config["max_question_length"],
            self.examples(split).place,
        )

    def score(self, split, outputs):
        """Computes the loss (cross-entropy of start and end, nats, mean over windows), f1 and
        exact_match in percent; on v2.0 also for each kind of question, and null_threshold. Raises
        UserError for the test split of v2.0 if the threshold is neither set nor `tuned`."""
        labels_N2 = self.rows(split).labels_NP
        losses = [
            -special.log_softmax(np.asarray(logits_2T, np.float64), axis=1)[[0, 1], label_2].mean()
            for logits_2T, label_2 in zip(outputs, labels_N2, strict=True)
        ]
        found = {"loss": float(np.mean(losses))}
        best = self._best(split, outputs)
        threshold = self._threshold(split, best)
        found |= self.score_predictions(split, _answers(best, threshold))
        if self._may_decline(split):
            found["null_threshold"] = threshold
        return found

    def predictions(self, split, outputs) -> dict[str, str]:
        """Returns the answer's text by question id, "" for no answer."""
        best = self._best(split, outputs)
        return _answers(best, self._threshold(split, best))

    def write_submission(self, split, outputs, path) -> None:
        """Writes the .json that the official script reads: {question id: text}."""
        predictions = self.predictions(split, outputs)
        Path(path).write_text(json.dumps(predictions, indent=1, ensure_ascii=False) + "\n")

    def read_predictions(self, split, path) -> dict[str, str]:
        try:
            pairs = json.loads(Path(path).read_text(), object_pairs_hook=list)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as JSON: {error}") from None
        golds = self.examples(split).golds
        if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
            raise UserError(f"{path} must be an object of question ids and texts")
        found: dict[str, str] = {}
        for key, text in pairs:
            if key in found:
                raise UserError(f"{path}: question {key!r} is there twice")
            if key not in golds:
                raise UserError(f"{path}: {self.examples(split).name} has no question {key!r}")
            if not isinstance(text, str):
                raise UserError(f"{path}, question {key!r}: {text!r} is no text")
            found[key] = text
        missing = [key for key in golds if key not in found]
        if missing:
            raise UserError(
                f"{path} lacks {len(missing)} of {len(golds)} questions: {missing[0]!r}"
            )
        return found

    def score_predictions(self, split, predictions):
        examples = self.examples(split)
        return span.figures(predictions, examples.golds, examples.unanswerable)

    def _may_decline(self, split) -> bool:
        return self.examples(split).unanswerable and not self.config["best_non_null"]

    def _threshold(self, split, best: dict[str, _Best]) -> float:
        if not self._may_decline(split):
            return math.inf
        if self.threshold is not None:
            return self.threshold
        if split != "validation":
            raise UserError(
                "config.task.null_threshold is not set: tune it on the validation split first, or "
                "give a number, such as 0.0"
            )
        odds = {key: found.null_odds for key, found in best.items()}
        texts = {key: found.text for key, found in best.items()}
        return span.best_threshold(odds, texts, self.examples(split).golds)

    def _best(self, split, outputs) -> dict[str, _Best]:
        """Finds the best span over all windows of each question. The score of no answer is the
        lowest [CLS] score among the windows."""
        rows, questions = self.rows(split), self.examples(split).questions
        if len(outputs) != len(rows):
            raise ValueError(f"{len(outputs)} outputs of {len(rows)} rows")
        texts, scores = [""] * len(questions), [-math.inf] * len(questions)
        nulls = [math.inf] * len(questions)
        limits = self.config["n_best"], self.config["max_answer_length"]
        for index, null, found in spans(rows, outputs, *limits):
            score, begin, end = found[0] if found else (-math.inf, 0, 0)
            if score > scores[index]:
                texts[index], scores[index] = questions[index].context[begin:end], score
            nulls[index] = min(nulls[index], null)
        return {
            question.id: _Best(text, null - score)
            for question, text, score, null in zip(questions, texts, scores, nulls, strict=True)
        }


def spans(
    made: Windows, outputs: Iterable[np.ndarray], n_best: int, max_length: int
) -> Iterator[tuple[int, float, list[tuple[float, int, int]]]]:
    """Finds (question, score of no answer, [(score, begin, end)]) of each window: its best spans in
    characters of the context, the best one first. `outputs` are (2, T) start and end logits."""
    for row, (start_T, end_T) in enumerate(outputs):
        first = made.first_N[row]
        context, offsets_T2 = slice(first, first + made.count_N[row]), made.offsets(row)
        found = [
            (score, int(offsets_T2[begin, 0]), int(offsets_T2[last, 1]))
            for score, begin, last in span.best_spans(
                start_T[context], end_T[context], n_best, max_length
            )
        ]
        yield made.question_N[row], float(start_T[0]) + float(end_T[0]), found


def _answers(best: dict[str, _Best], threshold: float) -> dict[str, str]:
    return {key: found.text if found.null_odds <= threshold else "" for key, found in best.items()}


make = Squad
