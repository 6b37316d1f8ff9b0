import hashlib

import numpy as np
import pytest

from kd_jax.data import encoded
from kd_jax.data.encoded import pack
from kd_jax.data.tokenizers import load_tokenizer, train_tokenizer

TOKENS = [[2, 7, 3], [2, 3], [2, 9, 8, 7, 3]]
TYPES = [[0, 0, 1], [0, 1], [0, 0, 0, 1, 1]]
LABELS = np.array([[1], [0], [2]], np.int32)


def test_rows_are_padded_to_the_length_asked_for():
    rows = encoded.join(TOKENS, TYPES, LABELS, pad=5)
    assert len(rows) == 3 and rows.lengths_N.tolist() == [3, 2, 5]
    batch = rows.batch(np.array([2, 0, 2]), 6)
    assert batch.tokens_BT.tolist() == [[2, 9, 8, 7, 3, 5], [2, 7, 3, 5, 5, 5], [2, 9, 8, 7, 3, 5]]
    assert batch.mask_BT.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert batch.types_BT.tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]]
    assert batch.ids_B.tolist() == [2, 0, 2] and batch.labels.tolist() == [[2], [1], [2]]
    assert (batch.weights == 1).all() and batch.weights.shape == (3, 1)
    for array in (batch.ids_B, batch.tokens_BT, batch.types_BT, batch.labels):
        assert array.dtype == np.int32
    assert batch.mask_BT.dtype == batch.weights.dtype == np.float32
    encoding = rows.encoding(np.array([1]), 3)
    assert encoding.tokens_BT.tolist() == [[2, 3, 5]] and encoding.types_BT.tolist() == [[0, 1, 0]]


def test_a_length_that_is_too_short_is_refused():
    rows = encoded.join(TOKENS, None, LABELS, pad=0)
    assert rows.batch(np.array([0, 1]), 3).types_BT is None
    with pytest.raises(ValueError, match="5 tokens does not fit into 4"):
        rows.batch(np.array([1, 2]), 4)


def test_digests_are_of_tokens_and_types():
    plain = encoded.join(TOKENS, None, LABELS, pad=0).digests
    typed = encoded.join(TOKENS, TYPES, LABELS, pad=0).digests
    want = hashlib.blake2b(np.array([2, 7, 3], np.int32).tobytes(), digest_size=16)
    assert len(plain) == 3 and plain[0] == want.digest()
    assert len({*plain, *typed}) == 6
    other = encoded.join(TOKENS[::-1], None, LABELS, pad=1).digests
    assert other[::-1] == plain


def test_examples_that_are_cut_are_counted_and_the_longest_is_measured_whole(tmp_path):
    tokenizer = train_tokenizer("wordpiece", ["a b c d e f g h"], 40, tmp_path)
    texts = ["a b", "a b c d e f g h", "a b c d e f", "a b c d e f g"]
    rows = encoded.encode(tokenizer, texts, None, np.zeros((4, 1), np.int32), 8)
    assert rows.lengths_N.tolist() == [4, 8, 8, 8]
    assert (rows.cut, rows.longest) == (2, 10)  # with two special tokens
    pairs = encoded.encode(tokenizer, texts[:1], texts[1:2], np.zeros((1, 1), np.int32), 8)
    assert (pairs.cut, pairs.longest) == (1, 13)
    short = encoded.encode(tokenizer, texts, None, np.zeros((4, 1), np.int32), 10)
    assert (short.cut, short.longest) == (0, 10)


def test_tokenizing_single_texts_and_pairs(data_folder):
    bert = load_tokenizer(data_folder / "tokenizers" / "bert-base-uncased")
    rows = encoded.encode(bert, ["a man", "a b c d e f g h"], None, LABELS[:2], 8)
    assert rows.lengths_N.tolist() == [4, 8] and rows.pad_id == bert.pad_token_id
    assert bert.convert_ids_to_tokens(rows.tokens_F[:4]) == ["[CLS]", "a", "man", "[SEP]"]
    assert rows.tokens_F[-1] == bert.sep_token_id
    pairs = encoded.encode(bert, ["one two"], ["a b c d e f g"], LABELS[:1], 8)
    words = bert.convert_ids_to_tokens(pairs.tokens_F)
    assert words == ["[CLS]", "one", "two", "[SEP]", "a", "b", "c", "[SEP]"]
    assert pairs.types_F.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    gpt2 = load_tokenizer(data_folder / "tokenizers" / "gpt2")
    rows = encoded.encode(gpt2, ["a man"], None, LABELS[:1], 8)
    assert rows.types_F is None and rows.pad_id == 0


def test_slices_of_examples_are_tokenized_as_one(data_folder, monkeypatch):
    for name in ("bert-base-uncased", "gpt2"):
        tokenizer = load_tokenizer(data_folder / "tokenizers" / name)
        texts = ["a man " * (40 if n == 23 else n % 7 + 1) for n in range(25)]
        whole = encoded.encode(tokenizer, texts, ["man"] * 25, np.arange(25)[:, None], 12)
        monkeypatch.setattr(encoded, "_SLICE", 10)
        cut = encoded.encode(tokenizer, texts, ["man"] * 25, np.arange(25)[:, None], 12)
        monkeypatch.undo()
        assert cut.digests == whole.digests and (cut.types_F is None) == (name == "gpt2")
        assert (cut.cut, cut.longest) == (whole.cut, whole.longest) and cut.cut > 5


@pytest.mark.parametrize("seed", range(5))
def test_items_are_packed_once_and_tightly(seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 65, 300).tolist()
    bins = pack(lengths, 64)
    assert sorted(item for each in bins for item in each) == list(range(300))
    assert all(sum(lengths[item] for item in each) <= 64 for each in bins)
    assert len(bins) <= 1.05 * sum(lengths) / 64 + 1


@pytest.mark.parametrize("room", [7, 64, 500])
@pytest.mark.parametrize("many", [0, 1, 2_000])
def test_packing_is_that_of_one_item_at_a_time(many, room):
    """So that rows stay what they were in runs that are continued."""
    random = np.random.default_rng(many + room)
    skewed = (room * random.random(many) ** 3).astype(int) + 1
    for lengths in (random.integers(1, room + 1, many), skewed):
        bins, rooms = [], []
        left = {}  # bins by room, the last one first
        for item in sorted(range(many), key=lambda item: -lengths[item]):
            rooms = [free for free in sorted(left) if left[free] and free >= lengths[item]]
            if rooms:
                number, free = left[rooms[0]].pop(), rooms[0]
            else:
                number, free = len(bins), room
                bins.append([])
            bins[number].append(item)
            left.setdefault(free - lengths[item], []).append(number)
        assert [each.tolist() for each in pack(lengths, room)] == bins


def marked(folder, rows, dtype=np.uint16):
    encoded.Marked.write(folder, [rows[:3], rows[3:]], dtype)
    return encoded.Marked.load(folder)


def test_marked_rows_on_disk_are_those_that_were_written(tmp_path):
    random = np.random.default_rng(0)
    rows = [(random.integers(0, 2**16, n), random.random(n) < 0.6) for n in (5, 0, 1, 40, 9, 70)]
    rows.append((np.arange(4), np.ones(4, bool)))
    found = marked(tmp_path, rows)
    assert len(found) == len(rows) and found.tokens_F.dtype == np.uint16
    for row, (tokens_T, marks_T) in enumerate(rows):
        assert [each.tolist() for each in found[row]] == [tokens_T.tolist(), marks_T.tolist()]
        assert [each.dtype for each in found[row]] == [np.int32, bool]
    for begin, end in ((0, 100), (1, 6), (1, 41), (3, 4)):
        counts, ends, behind = found.within(begin, end)
        for row, (_, marks_T) in enumerate(rows):
            at = begin + np.flatnonzero(marks_T[begin:end])
            assert counts[row] == len(at) and behind[row] == marks_T[end:].any()
            assert ends[row] == (at[-1] + 1 if len(at) else 0)


def test_what_fits_exactly():
    assert [each.tolist() for each in pack([3, 5, 8, 1, 7], 8)] == [[2], [4, 3], [1, 0]]
    assert len(pack([], 8)) == 0


def test_an_item_that_fits_nowhere():
    with pytest.raises(ValueError, match="item 1 of length 9 does not fit into 8"):
        pack([3, 9], 8)
