import pytest

from kd_jax.data import tokenizers
from kd_jax.data.squad import Answer, Question, windows
from kd_jax.errors import UserError

WORDS = [f"w{i:02d}" for i in range(30)]
CONTEXT = " ".join(WORDS) + "."


@pytest.fixture(scope="module", params=["wordpiece", "bpe"])
def tokenizer(request, tmp_path_factory):
    size = {"wordpiece": 200, "bpe": 400}[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return tokenizers.train_tokenizer(request.param, [CONTEXT, "Which one?"], size, folder)


def question(answer=None, words="Which one?", key="q"):
    answers = () if answer is None else (Answer(CONTEXT.index(answer), answer),)
    return Question(key, "T", CONTEXT, words, answers)


def shown(made, row):
    """The part of the context that a row holds."""
    offsets = made.offsets(row)
    return CONTEXT[offsets[0, 0] : offsets[-1, 1]]


def answer_of(made, row):
    first, last = made.labels_NP[row]
    if first == last == 0:
        return None
    offsets = made.offsets(row)
    first, last = first - made.first_N[row], last - made.first_N[row]
    return CONTEXT[offsets[first, 0] : offsets[last, 1]].strip()


def test_windows_cover_the_context_and_overlap(tokenizer):
    made = windows(tokenizer, [question("w05"), question("w29")], 28, 8, 8)
    assert made.question_N.tolist() == sorted(made.question_N.tolist())
    for index in (0, 1):
        rows = [row for row in range(len(made)) if made.question_N[row] == index]
        assert len(rows) > 1
        assert shown(made, rows[0]).startswith("w00") and shown(made, rows[-1]).endswith("29.")
        for one, other in zip(rows, rows[1:], strict=False):
            overlap = made.offsets(one)[-8:]
            assert (made.offsets(other)[:8] == overlap).all()
    assert made.lengths_N.max() == 28
    whole = windows(tokenizer, [question()], 200, 8, 8)  # one row holds it all
    assert len(whole) == 1 and made.longest == whole.longest == whole.lengths_N[0]
    batch = made.batch(made.question_N[:1], 28)
    first, count = made.first_N[0], made.count_N[0]
    decoded = tokenizer.decode(batch.tokens_BT[0, first : first + count]).replace(" ", "")
    assert decoded == shown(made, 0).replace(" ", "").lower()


def test_labels_point_at_the_first_answer_or_at_nothing(tokenizer):
    for answer in ("w05", "w00 w01", "w07 w08 w09", "w29."):
        made = windows(tokenizer, [question(answer)], 28, 8, 8)
        for row in range(len(made)):
            inside = answer in shown(made, row)
            assert answer_of(made, row) == (answer if inside else None)
        assert any(answer_of(made, row) for row in range(len(made)))
    none = windows(tokenizer, [question()], 28, 8, 8)
    assert not none.labels_NP.any()


def test_an_answer_that_is_cut_counts_as_none(tokenizer):
    made = windows(tokenizer, [question(CONTEXT[:99])], 28, 8, 8)
    assert not made.labels_NP.any()
    offsets = windows(tokenizer, [question()], 28, 8, 8).offsets(0)
    over = CONTEXT[offsets[-2, 0] : offsets[-1, 1] + 4].strip()  # one word of it is outside
    made = windows(tokenizer, [question(over)], 28, 8, 8)
    assert answer_of(made, 0) is None


def test_long_questions_are_cut(tokenizer):
    made = windows(tokenizer, [question(words="w01 w02 w03 w04 w05 w06 w07 w08")], 60, 8, 6)
    short = windows(tokenizer, [question(words="w01")], 60, 8, 6)
    assert made.first_N[0] == short.first_N[0] + 6 - len(tokenizer.tokenize("w01"))
    assert (made.cut, short.cut) == (1, 0)


def test_a_row_needs_room(tokenizer):
    special = tokenizer.num_special_tokens_to_add(pair=True)
    windows(tokenizer, [question()], 17 + special, 8, 8)
    with pytest.raises(UserError, match=f"seq_len={16 + special} must be at least {17 + special}"):
        windows(tokenizer, [question()], 16 + special, 8, 8)


def test_a_context_without_a_token_is_named(tokenizer):
    silent = type("Silent", (), {"__call__": lambda self, *a, **k: SilentRows(), "pad_token": None})
    silent.num_special_tokens_to_add = lambda self, pair: 3
    with pytest.raises(
        UserError, match="^row 8: the tokenizer makes no token of the context 'w00 "
    ):
        windows(silent(), [question()], 28, 8, 8, lambda i: f"row {i + 8}")


class SilentRows(dict):
    """What a tokenizer gives that drops every character of the contexts."""

    def __init__(self):
        super().__init__(input_ids=[[1, 2]], overflow_to_sample_mapping=[0], offset_mapping=[[]])

    def sequence_ids(self, row):
        return [None, 0, None]
