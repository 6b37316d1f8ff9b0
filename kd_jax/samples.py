"""Small made-up data in the layouts in which the real sets are shipped, for `:smoke`."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kd_jax.data import cache

_WORDS = {
    "good": "fine great bright warm happy strong rising clear".split(),
    "bad": "poor weak dark cold sad falling broken dull".split(),
    "plain": "the a market team film chip city match price report day group song house".split(),
}


def folder() -> Path:
    """The folder with all of them, in the user's own cache, made where it is missing; always the
    same content."""
    path = cache.folder(None) / "samples-2"
    cache.once(path, lambda root: _write(root, np.random.default_rng(0)), "HOME")
    return path


def _write(root: Path, rng: np.random.Generator) -> None:
    for name, rows in (("train", 160), ("dev", 48)):
        texts = [_sentence(rng, kind) for kind in rng.choice(["good", "bad"], rows)]
        labels = [int(any(word in text.split() for word in _WORDS["good"])) for text in texts]
        others = [_sentence(rng, "plain") for _ in texts]
        _glue(root, name, texts, others, labels, rng)
    for name, rows in (("train", 160), ("test", 48)):
        lines = []
        for _ in range(rows):
            label = int(rng.integers(4))
            kind = ("good", "bad", "plain", "good")[label]
            lines.append(f'"{label + 1}","{_sentence(rng, kind)}","{_sentence(rng, kind)}"')
        _lines(root / "ag_news" / f"{name}.csv", lines)
    kinds = {"positive": "good", "negative": "bad", "neutral": "plain"}
    for level in ("AllAgree", "50Agree"):
        names = rng.choice(list(kinds), 160)
        lines = [f"{_sentence(rng, kinds[name])} .@{name}" for name in names]
        _lines(root / "financial_phrasebank" / f"Sentences_{level}.txt", lines)
    for name, articles in (("train", 6), ("dev", 2)):
        for version in ("v1.1", "v2.0"):
            text = json.dumps(_squad(rng, name, articles, version))
            _lines(root / "squad" / f"{name}-{version}.json", [text])
    _chats(root / "chats", rng)


def _sentence(rng: np.random.Generator, kind: str) -> str:
    """Three to nine words, one or two of them of the kind."""
    words = list(rng.choice(_WORDS["plain"], rng.integers(2, 8)))
    for word in rng.choice(_WORDS[kind], rng.integers(1, 3)):
        words.insert(int(rng.integers(len(words) + 1)), word)
    return " ".join(words)


# One turn after the other, as ChatML has it.
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _chats(root: Path, rng: np.random.Generator) -> None:
    """Conversations of two to four messages, and a byte-level tokenizer with a chat template."""
    root.mkdir(parents=True)
    lines = []
    for _ in range(200):
        turns = int(rng.integers(1, 3))
        messages = [
            {"role": role, "content": _sentence(rng, kind)}
            for _ in range(turns)
            for role, kind in (("user", "plain"), ("assistant", "good"))
        ]
        lines.append(json.dumps({"messages": messages}))
    _lines(root / "train.jsonl", lines)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(root / "tokenizer")


def _glue(root: Path, name: str, texts, others, labels, rng) -> None:
    rows = list(zip(texts, others, labels, strict=True))
    _lines(root / "SST-2" / f"{name}.tsv", ["sentence\tlabel", *(f"{a}\t{y}" for a, _, y in rows)])
    _lines(root / "CoLA" / f"{name}.tsv", [f"s\t{y}\t\t{a}" for a, _, y in rows])
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    pairs = [f"{y}\t{i}\t{i}\t{a}\t{b}" for i, (a, b, y) in enumerate(rows)]
    _lines(root / "MRPC" / f"{name}.tsv", [header, *pairs])
    header = (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    )
    pairs = [
        f"{i}\tg\tf\ty\t{i}\ts\ts\t{a}\t{b}\t{5 * y * rng.random():.3f}"
        for i, (a, b, y) in enumerate(rows)
    ]
    _lines(root / "STS-B" / f"{name}.tsv", [header, *pairs])


def _squad(rng, split: str, articles: int, version: str) -> dict:
    data = []
    for article in range(articles):
        paragraphs = []
        for part in range(3):
            context = ". ".join(_sentence(rng, "good") for _ in range(6)) + "."
            questions = []
            for number in range(4):
                start = context.index(" ", int(rng.integers(len(context) // 2))) + 1
                answer = {"text": context[start:].split(" ")[0].strip("."), "answer_start": start}
                question = {
                    "id": f"{version}-{split}-{article}-{part}-{number}",
                    "question": f"which {_sentence(rng, 'plain')} ?",
                    "answers": [answer],
                }
                if version == "v2.0":
                    question["is_impossible"] = number == 3
                    question["answers"] = [] if number == 3 else [answer]
                questions.append(question)
            paragraphs.append({"context": context, "qas": questions})
        data.append({"title": f"{split} {article}", "paragraphs": paragraphs})
    return {"version": version, "data": data}


def _lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
