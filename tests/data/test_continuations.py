import numpy as np
import pytest
from tokenizers import processors

from kd_jax.data import continuations, tokenizers
from kd_jax.data.continuations import Question, Rows, Stretches, questions, sliding, together
from kd_jax.errors import UserError

TEXTS = ["the quick brown fox jumps over the lazy dog and runs away . "] * 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizers.train_tokenizer("bpe", TEXTS, 290, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def beginning(tokenizer):
    """Ids of texts with the end-of-text token in front, as Llama's tokenizer has its own there."""
    name, number = tokenizer.eos_token, tokenizer.eos_token_id
    backend = tokenizer.backend_tokenizer
    kept = backend.post_processor
    backend.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", special_tokens=[(name, number)]
    )
    yield tokenizer
    backend.post_processor = kept


def asked(*pairs):
    return questions("q", [(f"row {i}", Question(c, e, 0)) for i, (c, e) in enumerate(pairs)])


def pieces(stretches):
    """(context, stretch) ids of each."""
    return [
        (stretches.tokens_F[a:b].tolist(), stretches.tokens_F[c:d].tolist())
        for (a, b), (c, d) in zip(stretches.context_N2, stretches.scored_N2, strict=True)
    ]


def check_endings(tokenizer):
    context, ending = "the quick brown", "fox jumps"
    stretches, owners = continuations.endings(
        tokenizer, asked((context, (ending, "dog")), (context + "  ", (ending, "over the")))
    )
    assert owners == [0, 0, 1, 1]
    ids = tokenizer(context)["input_ids"]
    wanted = [
        (ids, tokenizer(whole)["input_ids"][len(ids) :])
        for whole in (
            "the quick brown fox jumps",
            "the quick brown dog",
            "the quick brown   fox jumps",
            "the quick brown   over the",
        )
    ]
    assert pieces(stretches) == wanted
    assert stretches.counts_N.tolist() == [len(ending) for _, ending in wanted]


def test_endings_are_what_a_text_has_more_than_its_context(tokenizer):
    check_endings(tokenizer)
    found, _ = continuations.endings(tokenizer, asked(("", ("the fox", "dog"))))
    assert [context for context, _ in pieces(found)] == [[tokenizer.eos_token_id]] * 2


def test_texts_begin_as_the_tokenizer_has_it(beginning):
    check_endings(beginning)
    found, _ = continuations.endings(beginning, asked(("the", ("fox", "dog"))))
    assert pieces(found)[0][0] == beginning("the")["input_ids"]
    assert pieces(found)[0][0][0] == beginning.eos_token_id


def test_an_ending_without_a_token(tokenizer):
    class Silent:
        def __call__(self, texts, **_):
            return {"input_ids": [[1] for _ in texts], "special_tokens_mask": [0]}

    with pytest.raises(UserError, match="row 0: the ending ' fox' has no token of its own"):
        continuations.endings(Silent(), asked(("the", ("fox", "dog"))))


def test_questions_are_checked():
    def made(endings, answer):
        return questions("val.jsonl", [("val.jsonl, row 3", Question("c", endings, answer))])

    with pytest.raises(UserError, match="^val.jsonl, row 3: 1 endings, there must be two or more"):
        made(("a",), 0)
    for label in (2, -1):
        with pytest.raises(
            UserError, match=f"row 3: the label is {label}; .* must be one of 0 to 1"
        ):
            made(("a", "b"), label)
    assert made(("a", "b"), None).questions[0].answer is None
    with pytest.raises(UserError, match="val.jsonl holds no questions"):
        questions("val.jsonl", [])
    one, two = made(("a", "b"), 0), made(("a", "b"), 1)
    assert len({part.digest for part in (one, two, together([one, two]))}) == 3
    assert together([one, two]).place(1) == "val.jsonl, row 3"


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (5, 1), (30, 30), (100, 7)])
def test_windows_score_every_token_but_the_first_once(window, stride):
    texts = [list(range(100, 130)), [7], list(range(40)), [1, 2]]
    found = sliding(texts, window, stride)
    scored = np.concatenate([np.arange(*pair) for pair in found.scored_N2])
    starts = np.cumsum([0] + [len(text) for text in texts])
    assert sorted(scored) == [n for n in range(starts[-1]) if n not in starts]
    np.testing.assert_array_equal(found.tokens_F, np.concatenate(texts))
    for (begin, end), (first, last) in zip(found.context_N2, found.scored_N2, strict=True):
        text = np.searchsorted(starts, begin, side="right") - 1
        assert end == first and (begin - starts[text]) % stride == 0
        assert last == min(begin + window + 1, starts[text + 1])  # it reads `window` tokens
    assert not Rows(found, window).truncated_N.any()


def stretches(*lengths):
    """Of (tokens of the context, of the endings ...); all tokens differ."""
    context_N2, scored_N2, owners, at = [], [], [], 0
    for owner, (context, *counts) in enumerate(lengths):
        begin, at = at, at + context
        for count in counts:
            context_N2.append((begin, begin + context))
            scored_N2.append((at, at + count))
            owners.append(owner)
            at += count
    tokens = np.arange(1, at + 1, dtype=np.int32)
    return Stretches(tokens, np.array(context_N2), np.array(scored_N2)), owners


def read_back(rows, made, max_tokens):
    """What a model reads and predicts for each stretch, from the batches."""
    found = {}
    for batch in rows.batches(4):
        assert batch.tokens_BT.shape[1] % 8 == 0
        for b, r in enumerate(batch.ids_B):
            if r < 0:
                assert not batch.weights[b].any() and not batch.mask_BT[b].any()
                continue
            segments_T = np.ones_like(batch.tokens_BT[b])
            if batch.segments_BT is not None:
                segments_T = batch.segments_BT[b]
            for k, n in enumerate(rows._rows[r], 1):
                own, shared = (
                    (segments_T == segment) & (batch.mask_BT[b] > 0) for segment in (k, 0)
                )
                seen = own | shared
                reads = batch.tokens_BT[b][seen]
                predicts = batch.labels[b][own & (batch.weights[b] > 0)]
                assert len(reads) <= max_tokens
                found[int(n)] = (reads.tolist(), predicts.tolist())
    return found


@pytest.mark.parametrize("shared", [True, False])
def test_rows_hold_contexts_and_stretches_as_far_as_they_fit(shared):
    made, owners = stretches((5, 3, 4, 2), (9, 1, 6, 6), (2, 12, 11), (20, 3, 3))
    rows = Rows(made, 10, owners if shared else None)
    assert rows.left_out_N.tolist() == [n in (6, 7) for n in range(10)]
    assert rows.truncated_N.tolist() == [n in (4, 5, 8, 9) for n in range(10)]
    assert rows.branches == (3 if shared else 1)
    # Of the second question's endings the last two see equally much; 20 tokens are too long.
    together = [[0, 1, 2], [3], [4, 5], [8, 9]]
    alone = [[n] for n in (0, 1, 2, 3, 4, 5, 8, 9)]
    assert [row.tolist() for row in rows._rows] == (together if shared else alone)
    found = read_back(rows, made, 10)
    for n in (0, 1, 2, 3, 4, 5, 8, 9):
        (begin, end), (first, last) = made.context_N2[n], made.scored_N2[n]
        whole = np.r_[made.tokens_F[begin:end], made.tokens_F[first:last]][-11:]
        assert found[n] == (whole[:-1].tolist(), whole[-(last - first) :].tolist())


def test_a_row_does_not_grow_without_bounds():
    made, owners = stretches((10, *[4] * 9), (30, 2, *[8] * 9))
    lengths = Rows(made, 40, owners).lengths_R
    assert lengths.tolist() == [9 + 7 * 4, 9 + 2 * 4, 29 + 2 + 3 * 8, 29 + 5 * 8, 29 + 8]


def test_batches_of_long_rows_have_fewer_of_them():
    made, owners = stretches(*[(6, 2)] * 80, *[(30, 10)] * 80)
    rows = Rows(made, 64, owners)
    shapes = [batch.tokens_BT.shape for batch in rows.batches(20)]
    assert shapes == [(4, 40)] * 20 + [(20, 8)] * 4
    shapes = [batch.tokens_BT.shape for batch in rows.batches(20, devices=8)]
    assert shapes == [(8, 40)] * 10 + [(16, 8)] * 5
    # Another length would be compiled for less than four batches.
    assert [batch.tokens_BT.shape for batch in rows.batches(40)] == [(40, 40)] * 4
    halves = [list(rows.batches(20, 8, p, 2)) for p in range(2)]
    for one, two, whole in zip(*halves, rows.batches(20, 8), strict=True):
        np.testing.assert_array_equal(np.r_[one.ids_B, two.ids_B], whole.ids_B)


def test_the_last_batch_of_a_length_is_filled_up_with_shorter_rows():
    made, owners = stretches(*[(6, 2)] * 83, *[(30, 10)] * 81)
    rows = Rows(made, 64, owners)
    batches = list(rows.batches(20))
    # 81 long rows leave room for three others in their last batch, and 80 are four whole batches.
    assert [batch.tokens_BT.shape for batch in batches] == [(4, 40)] * 21 + [(20, 8)] * 4
    assert sorted(np.concatenate([batch.ids_B for batch in batches])) == list(range(164))


def test_values_come_back_by_stretch():
    made, owners = stretches((5, 3, 4), (2, 12, 2), (4, 1, 1))
    rows = Rows(made, 10, owners)
    found = {r: np.arange(10.0 * r, 10.0 * r + rows.branches) for r in range(len(rows))}
    np.testing.assert_array_equal(rows.by_stretch(found), [0, 1, np.nan, 10, 20, 21])


def test_a_token_behind_every_text_is_no_part_of_what_is_scored(beginning):
    backend, name = beginning.backend_tokenizer, beginning.eos_token
    texts = asked(("the quick", ("brown", "dog")), ("", ("the fox", "dog")))
    plain, _ = continuations.endings(beginning, texts)
    ids = continuations.begun(beginning, ["the fox", ""])
    kept = backend.post_processor
    backend.post_processor = processors.TemplateProcessing(
        single=f"{name} $A {name} {name}", special_tokens=[(name, beginning.eos_token_id)]
    )
    assert beginning("the fox")["input_ids"] == [*ids[0], *[beginning.eos_token_id] * 2]
    found, _ = continuations.endings(beginning, texts)
    assert continuations.begun(beginning, ["the fox", ""]) == ids
    backend.post_processor = kept
    assert pieces(found) == pieces(plain)
