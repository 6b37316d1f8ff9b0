"""Windows: a question with a part of its context, for contexts longer than a row."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from kd_jax.data.encoded import Encoded, join, pad_id
from kd_jax.data.squad import Answer, Question
from kd_jax.errors import UserError

_AT_ONCE = 512  # questions tokenised in one call, which bounds its lists of offsets


@dataclasses.dataclass(frozen=True)
class Windows:
    """N rows and where each of them comes from. Row i's tokens [first, first + count) are the
    context's; offsets_F2 has the characters [begin, end) that a token of a row stands for."""

    rows: Encoded
    question_N: np.ndarray  # index of the question
    first_N: np.ndarray
    count_N: np.ndarray
    offsets_F2: np.ndarray  # int32, flat like the rows' tokens

    def offsets(self, row: int) -> np.ndarray:
        """(count, 2) characters of the context's tokens of a row."""
        start = self.rows.starts_N[row] + self.first_N[row]
        return self.offsets_F2[start : start + self.count_N[row]]


def windows(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    seq_len: int,
    doc_stride: int,
    max_question: int,
    place: Callable[[int], str] = "question {}".format,
) -> Windows:
    """Rows of at most `seq_len` tokens. Windows of a question share `doc_stride` tokens of its
    context; questions are cut to `max_question` tokens. Labels are the first and last token of
    the first answer, and 0 and 0, the [CLS], where the window does not hold all of it. `place(i)`
    says where a question stands, for messages.

    Raises UserError where a row has no room for more than question and overlap, and for a context
    of which the tokenizer makes no token.
    """
    special = tokenizer.num_special_tokens_to_add(pair=True)
    least = special + max_question + doc_stride + 1
    if seq_len < least:
        raise UserError(
            f"config.task.seq_len={seq_len} must be at least {least}: max_question_length + "
            f"doc_stride + {special} special tokens + 1"
        )
    tokens, types, offsets, places, labels = [], [], [], [], []
    for start in range(0, len(questions), _AT_ONCE):
        part = questions[start : start + _AT_ONCE]
        found = tokenizer(
            _cut(tokenizer, [question.question.strip() for question in part], max_question),
            [question.context for question in part],
            truncation="only_second",
            max_length=seq_len,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        tokens += [np.array(row, np.int32) for row in found["input_ids"]]
        types += [np.array(row, np.int8) for row in found.get("token_type_ids", [])]
        for row, index in enumerate(found["overflow_to_sample_mapping"]):
            sequences = found.sequence_ids(row)
            if 1 not in sequences:
                raise UserError(
                    f"{place(start + index)}: the tokenizer makes no token of the context "
                    f"{part[index].context!r:.60}; remove the row"
                )
            first, count = sequences.index(1), sequences.count(1)
            offsets_T2 = np.array(found["offset_mapping"][row], np.int32)
            answers = part[index].answers
            offsets.append(offsets_T2)
            places.append((start + index, first, count))
            labels.append(_label(offsets_T2[first : first + count], first, answers))
    question_N, first_N, count_N = np.array(places).T
    rows = join(tokens, types or None, np.array(labels, np.int32), pad_id(tokenizer))
    return Windows(rows, question_N, first_N, count_N, np.concatenate(offsets))


def _cut(tokenizer, texts, most):
    offsets = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    return [
        text if len(places) <= most else text[: places[most - 1][1]]
        for text, places in zip(texts, offsets["offset_mapping"], strict=True)
    ]


def _label(offsets_T2: np.ndarray, first: int, answers: Sequence[Answer]) -> tuple[int, int]:
    if not answers:
        return 0, 0
    begin, end = answers[0].start, answers[0].start + len(answers[0].text)
    if begin < offsets_T2[0, 0] or end > offsets_T2[-1, 1]:
        return 0, 0
    start = np.searchsorted(offsets_T2[:, 1], begin, side="right")
    last = np.searchsorted(offsets_T2[:, 0], end, side="left") - 1
    return (first + start, first + last) if start <= last else (0, 0)
