"""Loads, trains and saves tokenizers, and looks up their special tokens and word boundaries."""

import collections
import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

from kd_jax.data.masking import Vocabulary
from kd_jax.errors import UserError
from kd_jax.plugins import without_torch

_FILES = "tokenizer.json, or vocab.txt, or vocab.json with merges.txt"

# What `from_pretrained` notes of itself and of this machine, and of the last text's truncation.
_OF_LOADING = (
    *("local_files_only", "is_local", "trust_remote_code", "name_or_path", "_commit_hash"),
    *("tokenizer_file", "vocab_file", "merges_file"),
    *("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"),
)


def has_tokenizer(folder: str | Path) -> bool:
    """Tells whether a folder holds the files of a tokenizer."""
    names = ("tokenizer.json", "vocab.txt", "vocab.json")
    return any((Path(folder) / name).exists() for name in names)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a local folder in HF's layout; a tokenizer.json takes precedence.
    Raises UserError where there is no tokenizer, or where it needs custom code."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"tokenizer folder {folder} does not exist")
    if not has_tokenizer(folder):
        raise UserError(f"{folder} holds no tokenizer: it needs {_FILES}")
    try:
        tokenizer = _load("AutoTokenizer", folder)
        if not _as_in_file(tokenizer, folder):
            tokenizer = _load("PreTrainedTokenizerFast", folder)
    except Exception as error:  # a damaged tokenizer.json raises no other class
        code = "trust_remote_code" in str(error)
        reason = "it needs code of its own (auto_map), which is never run" if code else _line(error)
        raise UserError(f"cannot load the tokenizer in {folder}: {reason}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{folder}: {type(tokenizer).__name__} is no fast tokenizer; add tokenizer.json"
        )
    for key in _OF_LOADING:
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def _load(kind: str, folder: Path) -> PreTrainedTokenizerBase:
    with without_torch():  # which transformers needs for models alone
        of_kind = getattr(transformers, kind)
        return of_kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _as_in_file(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Tells whether a loaded tokenizer follows the rules of its tokenizer.json, if there is one:
    transformers 5 replaces some by the rules of the class that config.json's model_type names."""
    file = folder / "tokenizer.json"
    if not file.exists() or not getattr(tokenizer, "is_fast", False):
        return True
    return _rules(tokenizer.backend_tokenizer) == _rules(Tokenizer.from_file(str(file)))


def _rules(backend: Tokenizer) -> dict[str, Any]:
    """Returns the rules of encoding and decoding, without special tokens."""
    parts = json.loads(backend.to_str())
    return {name: parts[name] for name in ("normalizer", "pre_tokenizer", "model", "decoder")}


def same_rules(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Tells whether two tokenizers encode every text alike, special tokens aside."""
    return _rules(one.backend_tokenizer) == _rules(other.backend_tokenizer)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes a tokenizer to a folder, without the truncation and padding that were last set, and
    with a class that every version of transformers knows."""
    backend, folder = tokenizer.backend_tokenizer, Path(folder)
    backend.no_truncation()
    backend.no_padding()
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    stated = json.loads(file.read_text(encoding="utf-8"))
    stated = {key: value for key, value in stated.items() if key not in _OF_LOADING}
    if stated.get("tokenizer_class") == "TokenizersBackend":  # which is its name in version 5
        stated["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(stated, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def reader_of(folder: str | Path) -> str:
    """Names the class of transformers that loads the tokenizer of a folder as kd_jax does."""
    faithful = _as_in_file(_load("AutoTokenizer", Path(folder)), Path(folder))
    return "AutoTokenizer" if faithful else "PreTrainedTokenizerFast"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def token_id(tokenizer: PreTrainedTokenizerBase, name: str, need: str) -> int:
    """Returns the id of a special token, such as "mask_token". UserError where the tokenizer has
    none."""
    if getattr(tokenizer, name) is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r} has no {name}, which {need} needs")
    return getattr(tokenizer, f"{name}_id")


def own_separator(tokenizer: PreTrainedTokenizerBase) -> str:
    """Chooses the separator of documents: "bos" where the tokenizer begins texts with it or has no
    eos, else "eos"."""
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    return "bos" if begins or tokenizer.eos_token is None else "eos"


def begun_by(tokenizer: PreTrainedTokenizerBase, separator: str | None) -> PreTrainedTokenizerBase:
    """Makes a tokenizer begin texts with the separator of the model's training documents.

    `separator` is "eos", "bos" or None (unknown). Returns the tokenizer, or a changed copy.
    """
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
    """Collects the special tokens and word starts that masking needs. Word starts are found by the
    vocabulary's marks: "##" in front of continuations (WordPiece), "Ġ" (byte-level BPE) or "▁"
    (SentencePiece) in front of words; without such marks every token is a word."""
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
    save_tokenizer(tokenizer, folder)
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
