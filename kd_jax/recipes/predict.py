"""Labels a file of texts, or answers a file of questions, with an HF checkpoint.

The checkpoint's config.json names the head. Rows are computed some thousands at a time, in batches
of similar length, and written in the order of the input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from kd_jax import hub
from kd_jax.data import encoded
from kd_jax.data.encoded import Encoded
from kd_jax.data.loader import BucketStream, lengths_of_pass
from kd_jax.data.squad import Question, Windows, windows
from kd_jax.errors import UserError
from kd_jax.models import family, hf
from kd_jax.ranges import settings
from kd_jax.run import subject
from kd_jax.run.models import check_types
from kd_jax.run.subject import Subject
from kd_jax.tasks import prediction, squad
from kd_jax.tasks.classification import Texts
from kd_jax.tasks.prediction import Input
from kd_jax.teachers.store import NOT_FINITE
from kd_jax.train.passes import predict
from kd_jax.train.progress import ProgressBar
from kd_jax.types import Batch

log = logging.getLogger(__name__)

TOKENS = 512  # of a text at most, or as many as the model takes
AT_ONCE = 4096  # texts or questions whose tokens are in memory
SPANS = settings(None, squad.DEFAULTS, "task")  # what questions are read and answered with
HEADS = {"ForSequenceClassification": "classification", "ForQuestionAnswering": "span"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Optional settings; None takes the default."""

    text: str | None = None  # column of the text: "text"
    pair: str | None = None  # column of a second text: none
    batch_size: int | None = None  # rows over all devices: 32
    precision: str | None = None  # fp32 | bf16: fp32
    null_threshold: float | None = None  # logits; see `answers_of`. None: always answer
    delimiter: str | None = None  # of a .csv or .tsv: see data/source.py
    keep_empty: bool = False  # rows without text: True keeps them, without an answer


def predict_file(
    open_model: Callable[[], Subject], source: str, target: str, options: Options
) -> dict[str, Any]:
    """Writes a model's predictions for the rows of the file `source` to the file `target`.

    Args:
        open_model: opens a classifier, regression or answer extractor, as `checkpoint` does.
        source: a file as tasks/prediction.py reads it.
        target: a file as `prediction.writing` writes it. Each row has `index`, the number of the
            text or question from 0 (a header does not count), `id` if the input has ids, and the
            keys of `labels_of` or `answers_of`, all None for an empty text.

    Returns {"model", "commit", "head", "rows", "seconds", "output"}. Raises UserError for mistakes
    in any of these before anything is computed, and then leaves no file.
    """
    began = time.perf_counter()
    read, written = Path(source).expanduser(), Path(target).expanduser()
    prediction.check_output(written, read)
    batch_size = subject.rows(options.batch_size)
    own = open_model()
    described = own.described
    found = _read(read, described.head, options)
    batch_size = subject.rows_for(len(found), batch_size)
    most = SPANS["seq_len"] if described.head == "span" else TOKENS
    seq_len = min(most, described.config.max_tokens)
    check_types("model", described, own.tokenizer, found.first)
    student, mesh = own.frozen
    bar, buckets = ProgressBar("predict", 0, len(found)), ()
    with contextlib.closing(bar), prediction.writing(written) as write:
        for start in range(0, len(found), AT_ONCE):
            part = slice(start, min(start + AT_ONCE, len(found)))
            rows = _encode(own.tokenizer, seq_len, found, part)
            # Later rows are padded to the lengths of the first ones, so they compile nothing.
            buckets = buckets or buckets_of(rows, seq_len, batch_size, len(found) > AT_ONCE)
            stream = BucketStream(rows.lengths_N, buckets, rows.batch, batch_size)
            logits = predict(student, shown(stream, bar, part), mesh, family.PARTITION)
            logits = [logits[i] for i in range(len(rows))]
            check_finite(logits, own)
            if isinstance(rows, Windows):
                about = answers_of(rows, found.examples[part], logits, options.null_threshold)
            else:
                about = labels_of(np.stack(logits), described.config.labels)
            write(_numbered(about, part.start, found))
    return {
        "model": described.name,
        "commit": described.commit,
        "head": described.head,
        "rows": len(found),
        "seconds": round(time.perf_counter() - began, 1),
        "output": str(written),
    }


def checkpoint(model: str, revision: str | None, precision: str | None) -> Subject:
    """Reads the description of a checkpoint, with the head that `architectures` in its config.json
    names. UserError if that is neither a classifier nor an answer extractor."""
    folder = hub.resolve(model, revision, "--model").path
    names = hf.read_config(folder).get("architectures") or []
    heads = [head for end, head in HEADS.items() for name in names if str(name).endswith(end)]
    if len(heads) != 1:
        raise UserError(
            f"{model}: config.json's architectures are {', '.join(map(str, names)) or 'missing'}; "
            f"have: {', '.join(f'*{end}' for end in HEADS)}; fine-tune the model first"
        )
    return subject.of_checkpoint(model, revision, heads[0], precision)


def check_finite(outputs: Iterable[np.ndarray], own: Subject) -> None:
    """Raises UserError if an output of a model is not finite."""
    if not all(np.isfinite(each).all() for each in outputs):
        raise UserError(f"{own.described.name}: its outputs are not finite; {NOT_FINITE}")


def labels_of(logits_NC: np.ndarray, labels: tuple[str, ...]) -> list[dict]:
    """Converts logits into predictions: for each row `label`, its `probability`, and
    `probabilities` of all classes by name; or for a regression (a single label) `score`."""
    if len(labels) == 1:
        return [{"score": _rounded(score)} for score in logits_NC[:, 0]]
    found = []
    for probability_C in special.softmax(logits_NC.astype(np.float64), axis=1):
        best = int(probability_C.argmax())
        each = dict(zip(labels, map(_rounded, probability_C), strict=True))
        found.append({"label": labels[best], "probability": each[labels[best]]})
        found[-1]["probabilities"] = each
    return found


def answers_of(
    made: Windows, questions: list[Question], logits: list[np.ndarray], threshold: float | None
) -> list[dict]:
    """Converts span logits into answers: for each question `answer`, its `probability`, `start` and
    `end` (characters [start, end) of the context), and `no_answer`, the probability that there is
    none.

    Probabilities are a softmax over the scores of no answer and of the 20 best spans. A span's
    score is its start logit plus its end logit; the same characters in two windows count once, with
    the better score. The score of no answer is the lowest [CLS] score among the windows. If that is
    more than `threshold` above the best span's, the answer is "", without start and end, and its
    probability is that of no answer.
    """
    places: list[dict[tuple[int, int], float]] = [{} for _ in questions]
    nulls = [math.inf] * len(questions)
    limits = SPANS["n_best"], SPANS["max_answer_length"]
    for index, null, spans in squad.spans(made, logits, *limits):
        for score, begin, end in spans:
            place = begin, end
            places[index][place] = max(score, places[index].get(place, -math.inf))
        nulls[index] = min(nulls[index], null)
    found = []
    for question, scores, null in zip(questions, places, nulls, strict=True):
        best = sorted(scores.items(), key=lambda item: -item[1])[: SPANS["n_best"]]
        probabilities = special.softmax([null, *(score for _, score in best)])
        none = _rounded(probabilities[0])
        if not best or (threshold is not None and null - best[0][1] > threshold):
            answer = {"answer": "", "probability": none, "start": None, "end": None}
        else:
            start, end = best[0][0]
            answer = {
                "answer": question.context[start:end],
                "probability": _rounded(probabilities[1]),
                "start": start,
                "end": end,
            }
        found.append(answer | {"no_answer": none})
    return found


def _read(path: Path, head: str, options: Options) -> Input:
    if head == "span":
        if options.text or options.pair:
            raise UserError("--text and --pair do not go with a model that answers questions")
        return prediction.questions(path, options.delimiter, options.keep_empty)
    if options.null_threshold is not None:
        raise UserError("--null_threshold goes with a model that answers questions; leave it out")
    return prediction.texts(path, options.text, options.pair, options.delimiter, options.keep_empty)


def _encode(tokenizer: Any, seq_len: int, found: Input, part: slice) -> Encoded:
    examples = found.examples
    if isinstance(examples, Texts):
        first = examples.first[part]
        second = None if examples.second is None else examples.second[part]
        labels_N1 = np.zeros((len(first), 1), np.int32)
        return encoded.encode(tokenizer, first, second, labels_N1, seq_len)
    # The task's defaults for 384 tokens, scaled down for shorter rows.
    stride = min(SPANS["doc_stride"], seq_len // 3)
    question = min(SPANS["max_question_length"], seq_len // 6)

    def place(row: int) -> str:
        return found.place(part.start + row)

    return windows(tokenizer, examples[part], seq_len, stride, question, place)


def buckets_of(rows: Encoded, seq_len: int, batch_size: int, more: bool) -> tuple[int, ...]:
    """Chooses the lengths that a batch's rows may be padded to, for as little padding as possible;
    of a single batch few lengths, 16, 24, 32, 48, 64 ..., so that many calls with a batch each need
    no more programs. `more`: other rows follow, of up to `seq_len` tokens, and have to fit."""
    if len(rows) <= batch_size and not more:
        longest = int(rows.lengths_N.max())
        power = 1 << (longest - 1).bit_length()
        fits = power * 3 // 4 if longest <= power * 3 // 4 else power
        return (min(max(fits, 16), seq_len),)
    found = lengths_of_pass(rows.lengths_N, seq_len, batch_size)
    return (*found, seq_len) if more and found[-1] < seq_len else found


def shown(stream: BucketStream, bar: ProgressBar, part: slice) -> Iterator[Batch]:
    """Yields the batches, and moves the progress bar with each from the first row of `part` to its
    last."""
    for number, batch in enumerate(stream.batches(), 1):
        yield batch
        bar.update(part.start + (part.stop - part.start) * number // stream.steps, {}, 0.0)


def _numbered(rows: list[dict], start: int, source: Input) -> list[dict]:
    found = []
    for index, row in enumerate(rows, start):
        own = {} if source.ids is None else {"id": source.ids[index]}
        found.append({"index": index} | own | (_emptied(row) if index in source.empty else row))
    return found


def _emptied(row: dict) -> dict:
    return {k: _emptied(v) if isinstance(v, dict) else None for k, v in row.items()}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
