import errno
import logging as std_logging
import os
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from kd_jax.data import blocks, cache
from kd_jax.data.blocks import Blocks, tokenize
from kd_jax.data.source import Documents
from kd_jax.errors import UserError

END = 0
WORDS = ["<end>", "<unk>", "a", "b", "c", "d"]


def tokenizer(words=WORDS):
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def listed(texts):
    return Documents("listed", lambda: iter(texts))


def test_documents_are_joined_by_the_separator(tmp_path):
    tokens_N = tokenize(listed(["a b", "c", "d"]), tokenizer(), END, tmp_path)
    assert tokens_N.tolist() == [2, 3, END, 4, END, 5, END]
    assert isinstance(tokens_N, np.memmap) and tokens_N.dtype == np.uint16
    assert np.load(next(tmp_path.glob("*/tokens.npy"))).tolist() == tokens_N.tolist()


def test_large_vocabularies_need_four_bytes(tmp_path):
    words = WORDS + [f"w{i}" for i in range(2**16)]
    tokens_N = tokenize(listed([words[-1]]), tokenizer(words), END, tmp_path)
    assert tokens_N.dtype == np.int32 and tokens_N.tolist() == [len(words) - 1, END]


def test_ids_may_have_gaps_and_are_within_the_vocabulary(tmp_path):
    """The number of words says nothing of the largest id."""
    ids = {"<end>": 0, "<unk>": 1, "a": 70_000}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    assert tokenize(listed(["a"]), made, END, tmp_path).tolist() == [70_000, END]
    entry = next(tmp_path.glob("tokens-*/"))
    shutil.rmtree(entry)
    cache.once(entry, lambda made: np.save(made / "tokens.npy", np.int32([70_001])), "")
    with pytest.raises(UserError, match=f"{entry} holds token ids from 70001 to 70001, beyond a v"):
        tokenize(listed(["a"]), made, END, tmp_path)


def test_truncation_and_padding_of_the_tokenizer_do_not_count(tmp_path):
    limited = tokenizer()
    limited.enable_truncation(2)
    limited.enable_padding(length=5)
    tokens_N = tokenize(listed(["a b c d", "a"]), limited, END, tmp_path)
    assert tokens_N.tolist() == [2, 3, 4, 5, END, 2, END]
    assert limited.truncation is not None  # the caller's tokenizer is left alone


def test_cuts_and_slices_are_not_seen(tmp_path, monkeypatch):
    texts = [" a  b\n\nc d" * 7, "ab\n\n\n\n\nc" * 3, "d", "abc" * 9, "a\n" * 5]
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "b"), ("Ġ", "d")]
    vocab = {t: i for i, t in enumerate([*alphabet, *("".join(m) for m in merges)])}
    byte_level.model = models.BPE(vocab, merges)
    for made in (tokenizer(), byte_level):
        whole = tokenize(listed(texts), made, END, tmp_path / "whole").tolist()
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "_PIECE", 3)
            patch.setattr(blocks, "_SLICE", 10)
            cut = tokenize(listed(texts), made, END, tmp_path / "cut").tolist()
        assert cut == whole and len(whole) > 30
    assert len(list(blocks._pieces("a " * blocks._PIECE))) == 2


def test_the_cache_is_found_by_content(tmp_path, monkeypatch):
    def written():
        return len(list(tmp_path.glob("tokens-*/")))

    tokenize(listed(["a b"]), tokenizer(), END, tmp_path)
    monkeypatch.setattr(blocks, "_write", None)  # a second tokenisation would fail
    again = Documents("other name", lambda: iter(["a b"]))
    assert tokenize(again, tokenizer(), END, tmp_path).tolist() == [2, 3, END]
    monkeypatch.undo()
    tokenize(listed(["a c"]), tokenizer(), END, tmp_path)
    assert written() == 2
    tokenize(listed(["a b"]), tokenizer(WORDS[::-1]), END, tmp_path)
    assert written() == 3
    tokenize(listed(["a b"]), tokenizer(), 5, tmp_path)
    assert written() == 4


def test_a_failure_leaves_no_file_behind(tmp_path):
    attempts = []

    def read():
        attempts.append(None)
        yield "a"
        if len(attempts) > 1:  # the first reading makes the fingerprint
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(Documents("broken", read), tokenizer(), END, tmp_path)
    assert not list(tmp_path.glob("*/"))


def test_a_full_disk_names_the_setting(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; set config.data.cache_dir"):
        tokenize(listed(["a"]), tokenizer(), END, tmp_path)
    assert not list(tmp_path.glob("*/"))


def test_the_log_tells_speed_or_hit(tmp_path, caplog):
    with caplog.at_level(std_logging.INFO, logger="kd_jax"):
        tokenize(listed(["a"]), tokenizer(), END, tmp_path)
        tokenize(listed(["a"]), tokenizer(), END, tmp_path)
    assert "tokens/s" in caplog.messages[0] and "cached" in caplog.messages[1]


@pytest.mark.parametrize("count", range(1, 12))
def test_blocks_without_overlap_hold_every_token_once(count):
    tokens_N = np.arange(100, 100 + count)
    for partial, want in ((True, count), (False, count // 4 * 4)):
        cut = Blocks(tokens_N, stride=4, window=4, partial=partial)
        tokens_BW, valid_BW = cut.rows(np.arange(len(cut)))
        assert tokens_BW[valid_BW].tolist() == tokens_N[:want].tolist()
        assert partial or valid_BW.all()


@pytest.mark.parametrize("count", range(1, 12))
def test_overlapping_blocks_predict_every_token_but_the_first_once(count):
    tokens_N = np.arange(100, 100 + count)
    for partial, want in ((True, count - 1), (False, (count - 1) // 4 * 4)):
        cut = Blocks(tokens_N, stride=4, window=5, partial=partial)
        tokens_BW, valid_BW = cut.rows(np.arange(len(cut)))
        assert tokens_BW[:, 1:][valid_BW[:, 1:]].tolist() == tokens_N[1 : 1 + want].tolist()
        assert (tokens_BW[:, 0] == tokens_N[: 4 * len(cut) : 4]).all()
        assert partial or valid_BW.all()
