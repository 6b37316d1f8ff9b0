"""Tokenised rows of one split, kept ragged, and the padded batches that are cut from them."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from kd_jax.types import Batch, Encoding


@dataclasses.dataclass(frozen=True)
class Encoded:
    """N rows: row i is tokens_F[starts_N[i] : starts_N[i] + lengths_N[i]] of the flat arrays."""

    tokens_F: np.ndarray  # int32, all rows one after another
    types_F: np.ndarray | None  # int32 token types; None where the tokenizer has none
    lengths_N: np.ndarray  # int64
    labels_NP: np.ndarray  # int32 classes or positions; float32 for a regression
    pad_id: int

    def __len__(self) -> int:
        return len(self.lengths_N)

    @functools.cached_property
    def starts_N(self) -> np.ndarray:
        return np.cumsum(self.lengths_N) - self.lengths_N

    @functools.cached_property
    def digests(self) -> np.ndarray:
        """uint8 (N, 16): blake2b of what a model reads of a row; labels are not in it."""
        digests_N = np.empty((len(self), 16), np.uint8)
        for row, start, length in zip(digests_N, self.starts_N, self.lengths_N, strict=True):
            digest = hashlib.blake2b(self.tokens_F[start : start + length], digest_size=16)
            if self.types_F is not None:
                digest.update(b"types")
                digest.update(self.types_F[start : start + length])
            row[:] = np.frombuffer(digest.digest(), np.uint8)
        return digests_N

    def batch(self, ids_B: np.ndarray, length: int) -> Batch:
        """Rows padded to `length`, NumPy arrays; ValueError where a row is longer."""
        tokens_BT, mask_BT, types_BT = self._padded(ids_B, length)
        labels_BP = self.labels_NP[ids_B]
        return Batch(
            ids_B=np.asarray(ids_B, np.int32),
            tokens_BT=tokens_BT,
            mask_BT=mask_BT,
            labels=labels_BP,
            weights=np.ones(labels_BP.shape, np.float32),
            types_BT=types_BT,
        )

    def encoding(self, ids_B: np.ndarray, length: int) -> Encoding:
        """The same without labels, for a teacher that has a tokenizer of its own."""
        tokens_BT, mask_BT, types_BT = self._padded(ids_B, length)
        return Encoding(tokens_BT=tokens_BT, mask_BT=mask_BT, types_BT=types_BT)

    def _padded(self, ids_B, length):
        lengths_B1 = self.lengths_N[ids_B][:, None]
        if lengths_B1.max() > length:
            raise ValueError(f"a row of {lengths_B1.max()} tokens does not fit into {length}")
        valid_BT = np.arange(length) < lengths_B1
        index_BT = np.where(valid_BT, self.starts_N[ids_B][:, None] + np.arange(length), 0)
        tokens_BT = np.where(valid_BT, self.tokens_F[index_BT], np.int32(self.pad_id))
        types_BT = None
        if self.types_F is not None:
            types_BT = np.where(valid_BT, self.types_F[index_BT], np.int32(0))
        return tokens_BT, valid_BT.astype(np.float32), types_BT


def encode(
    tokenizer: PreTrainedTokenizerBase,
    first: Sequence[str],
    second: Sequence[str] | None,
    labels_NP: np.ndarray,
    seq_len: int,
) -> Encoded:
    """Tokenises texts, or pairs of texts, with the tokenizer's special tokens. Rows longer than
    `seq_len` lose tokens at the end, pairs at the end of their longer text."""
    rows = tokenizer(
        list(first),
        None if second is None else list(second),
        truncation="longest_first",
        max_length=seq_len,
        return_attention_mask=False,
    )
    return join(rows["input_ids"], rows.get("token_type_ids"), labels_NP, pad_id(tokenizer))


def join(
    tokens: Sequence[Sequence[int]],
    types: Sequence[Sequence[int]] | None,
    labels_NP: np.ndarray,
    pad: int,
) -> Encoded:
    """Encoded rows of lists of token ids and, where there are any, token types."""
    return Encoded(
        tokens_F=_flat(tokens),
        types_F=None if types is None else _flat(types),
        lengths_N=np.array([len(row) for row in tokens], np.int64),
        labels_NP=labels_NP,
        pad_id=pad,
    )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token's id; 0 where there is none, since the mask hides padding anyway."""
    return 0 if tokenizer.pad_token is None else tokenizer.pad_token_id


def _flat(rows) -> np.ndarray:
    return np.concatenate([np.asarray(row, np.int32) for row in rows] or [np.zeros(0, np.int32)])
