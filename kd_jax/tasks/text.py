"""Tokenizers: loading one, training one, and what the tasks ask of it."""

import collections
import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

from kd_jax.data.masking import Vocabulary
from kd_jax.errors import UserError

_FILES = "tokenizer.json, or vocab.txt, or vocab.json with merges.txt"


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    names = ("tokenizer.json", "vocab.txt", "vocab.json")
    return any((Path(folder) / name).exists() for name in names)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder in HF's layout. Raises UserError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"tokenizer folder {folder} does not exist")
    if not has_tokenizer(folder):
        raise UserError(f"{folder} holds no tokenizer: it needs {_FILES}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"cannot load the tokenizer in {folder}: {_line(error)}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{folder}: {type(tokenizer).__name__} is no fast tokenizer; add tokenizer.json"
        )
    return tokenizer


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def token_id(tokenizer: PreTrainedTokenizerBase, name: str, need: str) -> int:
    """Id of a special token, such as "mask_token". UserError where the tokenizer has none."""
    if getattr(tokenizer, name) is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r} has no {name}, which {need} needs")
    return getattr(tokenizer, f"{name}_id")


def own_separator(tokenizer: PreTrainedTokenizerBase) -> str:
    """Tells "bos" where the tokenizer begins texts with it (or has no other), else "eos"."""
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    return "bos" if begins or tokenizer.eos_token is None else "eos"


def begun_by(tokenizer: PreTrainedTokenizerBase, separator: str | None) -> PreTrainedTokenizerBase:
    """Makes texts begin as documents did in a model's training: with its `separator`, eos or bos
    (None: unknown). A tokenizer that would begin them with another token is changed."""
    if separator != "eos" or tokenizer.bos_token in (None, tokenizer.eos_token):
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    if own_separator(tokenizer) == "bos":
        end = tokenizer.eos_token
        changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=[end, "$A"], special_tokens=[(end, tokenizer.eos_token_id)]
        )
    changed.bos_token = None
    return changed


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """What masking must know. Word starts are told by the vocabulary's own marks: "##" in front
    of continuations (WordPiece), "Ġ" (byte-level BPE) or "▁" (SentencePiece) in front of words;
    without such marks every token is a word."""
    ids = tokenizer.get_vocab()
    size = max(ids.values()) + 1
    maskable_V, starts_V = np.zeros(size, bool), np.ones(size, bool)
    maskable_V[list(ids.values())] = True  # ids that no token has are not drawn either
    maskable_V[tokenizer.all_special_ids] = False
    mark = next((m for m in ("##", "Ġ", "▁") if any(t.startswith(m) for t in ids)), None)
    for token, index in ids.items():
        if mark == "##":
            starts_V[index] = not token.startswith("##")
        elif mark is not None:
            starts_V[index] = token.startswith((mark, "Ċ"))  # Ċ is the newline of byte-level BPE
    return Vocabulary(
        token_id(tokenizer, "mask_token", "masked language modelling"), maskable_V, starts_V
    )


def train_tokenizer(
    kind: str, documents: Iterable[str], vocab_size: int, folder: str | Path
) -> PreTrainedTokenizerBase:
    """Trains a tokenizer on `documents` and writes it to `folder`, for AutoTokenizer to load.

    kind: "wordpiece" (BERT's, lower case) or "bpe" (GPT-2's, byte-level). `vocab_size` counts the
    special tokens; little text gives fewer. The documents are read twice; the same documents give
    the same tokenizer.
    """
    if kind == "wordpiece":
        tokenizer = BertTokenizer(vocab=_word_pieces(documents, vocab_size))
    elif kind == "bpe":
        tokenizer = GPT2Tokenizer(**_byte_pairs(documents, vocab_size))
    else:
        raise UserError(f"unknown tokenizer kind {kind!r}; have: wordpiece, bpe")
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


def _word_pieces(documents: Iterable[str], vocab_size: int) -> dict[str, int]:
    backend = BertTokenizer().backend_tokenizer
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    counts = collections.Counter()
    for document in documents:
        counts.update(learner.normalizer.normalize_str(document))
    ranked = sorted((char for char in counts if not char.isspace()), key=lambda c: (-counts[c], c))
    alphabet = sorted(ranked[:1000])
    # The trainer numbers continuations in the order of a hash map, which differs from run to run
    # and decides ties between pairs. Naming them as special tokens numbers them first.
    first = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    first += alphabet + [f"##{char}" for char in alphabet]
    if vocab_size < len(first):
        raise UserError(
            f"vocab_size={vocab_size} is too small: special tokens and single characters of this "
            f"text take {len(first)}"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=first,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(documents, trainer)
    return json.loads(learner.to_str())["model"]["vocab"]


def _byte_pairs(documents: Iterable[str], vocab_size: int) -> dict[str, Any]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise UserError(f"vocab_size={vocab_size} is too small: single bytes take 257")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learner.train_from_iterator(documents, trainer)
    model = json.loads(learner.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}
