"""Makes the `:smoke` variant of experiments: the same program on tiny models and data, in seconds.

The data are made up, in the layouts in which the real sets are shipped.
"""

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kd_jax import plugins
from kd_jax.data import cache

_BERT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
)
_BOTTLENECKS = dict(embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=2)
TINY = {
    "bert": dict(model_type="bert") | _BERT,
    "roberta": dict(model_type="roberta") | _BERT,
    "mobilebert": dict(model_type="mobilebert") | _BERT | _BOTTLENECKS,
    # What differs from the teacher, a BERT; its feed-forward width has a name of its own.
    "distilbert": dict(model_type="distilbert", num_hidden_layers=1, hidden_dim=64),
    "gpt2": dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=32),
    "llama": dict(model_type="llama", num_key_value_heads=1, tie_word_embeddings=True) | _BERT,
    "qwen2": dict(model_type="qwen2", num_key_value_heads=1, tie_word_embeddings=True) | _BERT,
    "qwen3": dict(model_type="qwen3", num_key_value_heads=1, head_dim=16) | _BERT,
    "phi": dict(model_type="phi", resid_pdrop=0.1) | _BERT,
}


def _tiny(family: str) -> dict:
    """Describes a tiny model of a family; every one takes BERT's names of sizes."""
    return TINY.get(family, dict(model_type=family) | _BERT)


def smoke_finetuning(c: ConfigDict) -> ConfigDict:
    """Shrinks a config of fine-tuning to tiny models and made-up data, for a run of seconds."""

    def tiny(section: ConfigDict, own: bool) -> None:
        kind = section.architecture.get("model_type") or next(
            (name for name in ("distilbert", "mobilebert", "roberta") if name in section.model),
            "bert",
        )
        if own and kind == "bert" and not section.model:  # the teacher with fewer layers
            section.architecture = ConfigDict(dict(num_hidden_layers=1))
            section.layers = "uniform"
        elif own and kind == "distilbert":
            section.architecture = ConfigDict(_tiny(kind))
        else:
            section.architecture = ConfigDict(_tiny(kind) | dict(max_position_embeddings=66))
        if section.init in ("", "model"):
            section.init = "scratch"
        section.model = ""

    for section in (c.teacher, *(c.teachers[name] for name in c.teachers)):
        tiny(section, own=False)
    tiny(c.assistant, own=True)
    tiny(c.student, own=True)
    if "substitution" in c:
        _substitute(c, 0.3)
    task = plugins.load("tasks", c.task.name, "make").make
    changes, data = task.smoke(c.task, c.data, samples())
    c.task.update(changes)
    c.data = ConfigDict(data if "validation" in data else data | dict(held_out=0.2))
    c.tokenizer = ConfigDict(dict(path="", train="wordpiece", vocab_size=256))
    c.batch_size, c.accumulate, c.epochs, c.steps = 16, 1, 1.0, 4
    c.optim.learning_rate = 1e-2  # something to see after four steps
    c.stages = ConfigDict({name: {} for name in c.stages})
    c.eval = ConfigDict(dict(every=2, batch_size=64))
    c.cost.repeats = 5
    c.log.every = 1
    return c


def _substitute(c: ConfigDict, target: float) -> None:
    """Makes both blocks of a tiny teacher compact, one after the other."""
    c.substitution.update(num_heads=1, num_kv_heads=1, ffn_width=24, steps=2, warmup=1)
    c.substitution.update(width=16 if c.substitution.kind == "bottleneck" else 0)
    c.substitution.update(importance_batches=1, fit_steps=min(c.substitution.fit_steps, 2))
    c.substitution.target, c.theseus.group = target, 2
    c.student.architecture = ConfigDict()


def or_smoke(c: ConfigDict, arg: str | None, family: str = "bert") -> ConfigDict:
    """Returns the config, shrunk to tiny models and generated text if `arg` is "smoke".

    `family` is the teacher's, and the student's unless its architecture names another.
    """
    if arg not in (None, "", "smoke"):
        raise ValueError(f"unknown variant {arg!r}; have: smoke")
    if not arg:
        return c
    if "substitution" in c:
        _substitute(c, 0.3 if family == "gpt2" else 0.2)
    if "rollout" in c:  # prompts of made-up chats have some 50 tokens
        c.rollout.update(prompt_tokens=96 if c.task.name == "chat" else 8, max_new_tokens=8)
        c.rollout.update(held_out=16, samples=2)
    if "ensemble" in c:
        c.rounds, c.student.init, c.ensemble.rows = 2, "scratch", 64
        c.cache.max_gb = 0.1
    c.mesh.update(fsdp=1, model=1)
    student = c.student.architecture.get("model_type")
    c.teacher.model, c.teacher.architecture = "", ConfigDict(_tiny(family))
    c.teacher.init = "scratch"
    c.student.model = ""
    if c.student.init == "model":
        c.student.init = "teacher"
    if not {"substitution", "pruning"} & {*c}:
        c.student.architecture = ConfigDict(
            _tiny(student) if student else dict(num_hidden_layers=1)
        )
    if not isinstance(c.student.layers, str):
        c.student.layers = "first"
    task = plugins.load("tasks", c.task.name, "make").make
    changes, data = task.smoke(c.task, c.data, samples())
    c.task.update(changes)
    c.data = ConfigDict(data)
    if task.of_chats:
        tokenizer = samples() / "chats" / "tokenizer"
        c.tokenizer = ConfigDict(dict(path=str(tokenizer), train="", vocab_size=512))
        c.teacher.architecture.update(vocab_size=512, max_position_embeddings=128)
    else:
        kind = "bpe" if task.head == "clm" else "wordpiece"
        c.tokenizer = ConfigDict(dict(path="", train=kind, vocab_size=512))
    c.batch_size, c.accumulate, c.steps = 16, 1, 4
    kept = {name: ("kind",) if "kind" in own else () for name, own in c.stages.items()}
    c.stages = ConfigDict({n: {key: c.stages[n][key] for key in keys} for n, keys in kept.items()})
    c.eval = ConfigDict(dict(every=2, batch_size=64))
    c.checkpoint = ConfigDict(dict(every=2, keep=2))
    c.log.every = 1
    return c


_WORDS = {
    "good": "fine great bright warm happy strong rising clear".split(),
    "bad": "poor weak dark cold sad falling broken dull".split(),
    "plain": "the a market team film chip city match price report day group song house".split(),
}


def samples() -> Path:
    """Returns the user's folder of made-up data; makes it if missing, always alike."""
    path = cache.folder(None) / "samples-3"
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
    _embedding(root / "embedding", rng)


def _sentence(rng: np.random.Generator, kind: str) -> str:
    """Makes a sentence of three to nine words, one or two of them of a kind (its class)."""
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
    """Writes conversations of two to four messages, and a byte-level tokenizer for chats."""
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


def _embedding(root: Path, rng: np.random.Generator) -> None:
    """Writes texts, and sets in which texts of one kind, good or bad, belong together."""

    def pair() -> tuple[str, str, str]:
        kinds = rng.permutation(["good", "bad"])
        return tuple(_sentence(rng, kind) for kind in (kinds[0], *kinds))

    _lines(root / "train.txt", [_sentence(rng, kind) for kind in rng.choice(["good", "bad"], 160)])
    columns = ("query", "positive", "negative")
    rows = [dict(zip(columns, pair(), strict=True)) for _ in range(160)]
    _lines(root / "train.jsonl", [json.dumps(row) for row in rows])
    rows = [
        dict(sentence1=text, sentence2=other, score=score + round(rng.random(), 3))
        for text, *others in (pair() for _ in range(24))
        for other, score in zip(others, (4, 0), strict=True)
    ]
    _lines(root / "sts.jsonl", [json.dumps(row) for row in rows])
    rows = [(text, [near], [far]) for text, near, far in (pair() for _ in range(24))]
    lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
    _lines(root / "reranking.jsonl", lines)
    texts = {f"d{i}": text for i, text in enumerate(t for _, *each in rows for t in sum(each, []))}
    corpus = [json.dumps(dict(_id=key, title="", text=text)) for key, text in texts.items()]
    queries = [json.dumps(dict(_id=f"q{i}", text=text)) for i, (text, *_) in enumerate(rows)]
    judged = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{2 * i}\t1" for i in range(len(rows)))]
    _lines(root / "retrieval" / "corpus.jsonl", corpus)
    _lines(root / "retrieval" / "queries.jsonl", queries)
    for split in ("dev", "test"):
        _lines(root / "retrieval" / "qrels" / f"{split}.tsv", judged)


def _lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
