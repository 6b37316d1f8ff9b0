"""Tokenizes text once into one long row of tokens on disk, and cuts blocks from it.

The tokens of all documents stand one after the other, each document followed by the model's
separator ([SEP], </s>, <|endoftext|>), in a .npy file that is memory-mapped: uint16 where the
vocabulary fits, else int32. It is an entry of the cache (data/cache.py) by the name of a hash of
the text, the tokenizer and the separator; block sizes are not in it, so one file serves every
sequence length.
"""

import dataclasses
import itertools
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from kd_jax.data import arrays, cache, identity
from kd_jax.data.source import Documents

log = logging.getLogger(__name__)

_VERSION = 1  # of the file's contents: raise it when tokenizing changes
_SLICE = 4_000_000  # characters tokenized at a time, on all cores: bounds the memory
_PIECE = 100_000  # longer documents are cut into pieces, so that one document uses all cores too
# A pre-tokenizer splits in front of the last white space before a word, so a cut there is unseen.
_CUT = re.compile(r"\s\S")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Cuts blocks from a row of tokens: block i is tokens[i * stride : i * stride + window].

    With `partial`, the last block is kept although it is not full.
    """

    tokens_N: np.ndarray
    stride: int
    window: int
    partial: bool

    def __len__(self) -> int:
        new = len(self.tokens_N) - (self.window - self.stride)  # tokens that no overlap repeats
        return max(0, -(-new // self.stride) if self.partial else new // self.stride)

    def rows(self, ids_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (tokens, valid) of blocks, both (B, window): int32, and bool, which is False
        behind the end of the text."""
        at_BW = ids_B.astype(np.int64)[:, None] * self.stride + np.arange(self.window)
        valid_BW = at_BW < len(self.tokens_N)
        tokens_BW = self.tokens_N[np.minimum(at_BW, len(self.tokens_N) - 1)]
        return tokens_BW.astype(np.int32), valid_BW


def tokenize(
    documents: Documents, tokenizer: Tokenizer, separator: int, folder: Path
) -> np.ndarray:
    """Tokenizes all documents, each followed by `separator`: a memory-mapped (N,) array.

    Tokenizes at the first call, on all cores, and finds the file in `folder` later. Processes that
    ask for the same file, on all hosts that share the folder, wait for the first; a damaged one is
    made again. Raises UserError where the folder cannot be written, or is full.
    """
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # the caller's keeps its settings
    tokenizer.no_truncation()
    tokenizer.no_padding()
    key = cache.key(_VERSION, documents.digest, tokenizer.to_str(), separator)
    entry = folder / f"tokens-{key}"
    size = 1 + max([separator, *tokenizer.get_vocab().values()])  # ids may have gaps

    def write(made: Path) -> None:
        _write(documents, tokenizer, separator, arrays.type_of_ids(size), made / "tokens.npy")

    if cache.once(entry, write, "config.data.cache_dir"):
        log.info("tokens of %s: cached in %s", documents.name, entry)
    tokens_N = arrays.load(entry / "tokens.npy")
    cache.check_ids(tokens_N, size, entry)
    return tokens_N


def _write(documents: Documents, tokenizer: Tokenizer, separator: int, dtype, file: Path) -> None:
    start = time.perf_counter()
    with arrays.Growing(file, dtype) as tokens:
        for tokens_N in _encode(documents, tokenizer, separator, dtype):
            tokens.append(tokens_N)
    identity.check_unchanged(documents)
    seconds = time.perf_counter() - start
    log.info(
        "tokens of %s: %d in %.1f s (%d tokens/s), kept in %s",
        *(documents.name, tokens.count, seconds, tokens.count / seconds, file.parent.parent),
    )


def _encode(documents, tokenizer, separator, dtype) -> Iterator[np.ndarray]:
    total = documents.identity.count
    watched = identity.watched(documents, f"tokenizing {documents.name}", total)
    pieces = (piece for document in watched for piece in _pieces(document))
    for texts, is_last in _slices(pieces):
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = (
            itertools.chain(encoding.ids, [separator]) if last else encoding.ids
            for encoding, last in zip(encodings, is_last, strict=True)
        )
        yield np.fromiter(itertools.chain.from_iterable(ids), dtype)


def _pieces(document: str) -> Iterator[tuple[str, bool]]:
    """Cuts a document into (piece, whether it is the last)."""
    start = 0
    while cut := _CUT.search(document, start + _PIECE):
        yield document[start : cut.start()], False
        start = cut.start()
    yield document[start:], True


def _slices(pieces) -> Iterator[tuple[list[str], list[bool]]]:
    texts, is_last, size = [], [], 0
    for text, last in pieces:
        texts.append(text)
        is_last.append(last)
        size += len(text)
        if size >= _SLICE:
            yield texts, is_last
            texts, is_last, size = [], [], 0
    if texts:
        yield texts, is_last
