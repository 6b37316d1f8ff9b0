"""Text embedding: one vector a text. Trains on lone texts, pairs of texts, or pairs with negatives;
is selected and reported by sets with scores (tasks/scored.py).

config.task:
    name             "embedding"
    columns          of training: () for lone texts, the documents of data/source.py; or columns of
                     a table: a query and its positive, and as many negatives as there are more
    scored           what validation and test are: sts | retrieval | reranking
    text             sts: column of a text
    pair             sts: column of the other one
    label            sts: column of their score
    query_prompt     stands before queries, lone texts and the texts of sts
    document_prompt  stands before positives, negatives and documents
    seq_len          tokens of a text

config.data: train, validation, test, as in data/splits.py; train may be several sources, each by a
name. Nothing is held out of it, since it has no scores: give a validation. For retrieval a source
is a folder in BEIR's layout, or SQuAD's .json (data/retrieval.py).

A row is one text, and equal texts are one row. In a batch the texts of an example stand together,
its anchor first; `labels` are their roles: 0 the anchor (a query, or a lone text), 1 its positive,
2, 3, ... its negatives. `batch_size` counts examples.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from kd_jax.data import encoded, source
from kd_jax.data.loader import BucketStream, lengths_of
from kd_jax.data.source import blank
from kd_jax.errors import UserError
from kd_jax.models.model_config import Texts
from kd_jax.ranges import Choice, Whole
from kd_jax.tasks.scored import KINDS, Collection, once, texts
from kd_jax.tasks.task import ExampleTask
from kd_jax.types import Batch

DEFAULTS = dict(
    name="embedding",
    columns=(),
    scored=Choice(*KINDS),
    text="sentence1",
    pair="sentence2",
    label="score",
    query_prompt="",
    document_prompt="",
    seq_len=Whole(least=8, default=256),
)


class Examples(NamedTuple):
    """What texts are for in training: the rows of G texts an example, the anchor first."""

    rows_NG: np.ndarray


class Embedding(ExampleTask):
    """Embedding of texts. What a model computes of a row is its vector, (D,)."""

    head = "embedding"
    defaults = DEFAULTS
    data_defaults = dict(train=None, validation=None, test=None)
    variant, variants = "scored", tuple(KINDS)
    unread = {name: kind.unread for name, kind in KINDS.items()}

    def __init__(self, config, data, tokenizer) -> None:
        super().__init__(config, data, tokenizer)
        self.metrics = KINDS[self.config["scored"]].figures
        self.primary = self.metrics[0]

    @classmethod
    def smoke(cls, task, data, samples):
        folder, kind = samples / "embedding", task.get("scored", "sts")
        columns = ("query", "positive", *["negative"] * 8)[: len(task.get("columns", ()))]
        train = folder / ("train.jsonl" if columns else "train.txt")
        scored = {"sts": "sts.jsonl", "retrieval": "retrieval", "reranking": "reranking.jsonl"}
        paths = dict(train=train, validation=folder / scored[kind], test=folder / scored[kind])
        names = {key: DEFAULTS[key] for key in ("text", "pair", "label")}
        data = {key: dict(source="files", path=str(path)) for key, path in paths.items()}
        return dict(columns=columns, seq_len=16) | names, data

    @classmethod
    def settings_of(cls, config, name):
        stated = config.texts
        prompts, found = dict(stated.prompts), {}
        usual = prompts.get(stated.default_prompt, "")
        if not name.endswith("/sts"):  # whose texts are no queries, and read as any text is
            found["document_prompt"] = prompts.get("document", prompts.get("passage", usual))
            usual = prompts.get("query", usual)
        length = {"seq_len": stated.max_tokens} if stated.max_tokens else {}
        return found | {"query_prompt": usual} | length

    def noted_in(self, config):
        prompts = {of: self.config[f"{of}_prompt"] for of in ("document", "query")}
        stated = tuple((of, prompt) for of, prompt in prompts.items() if prompt)
        texts = Texts(stated, None, config.texts.similarity, self.seq_len)
        return dataclasses.replace(config, texts=texts)

    @property
    def labels_only(self) -> dict[str, Any]:
        if len(self.config["columns"]) < 2:
            raise UserError(
                "lone texts say nothing without a teacher: give the stage an objective that has "
                "one, or name the columns of pairs in config.task.columns"
            )
        return {"contrastive": {"weight": 1.0}}

    def _read(self, key):
        if key != "train":
            where, spec = self._spec(key)
            return KINDS[self.config["scored"]].read(spec, where, self.config)
        given, where = self.data["train"], "data.train"
        several = [*getattr(given, "items", tuple)()]
        if not several or not all(hasattr(each, "items") for _, each in several):
            read = [self._examples(given, where)]
        else:
            read = [
                self._examples({"split": "train"} | dict(each), f"{where}.{name}")
                for name, each in several
            ]
        names, commits, columns = zip(*read, strict=True)
        rows, numbers = once(*(itertools.chain(*column) for column in zip(*columns, strict=True)))
        commit = commits[0] if len(commits) == 1 else None
        return Collection(", ".join(names), rows, Examples(np.stack(numbers, axis=1)), commit)

    def _examples(self, spec: Mapping, where: str) -> tuple[str, str | None, list[list[str]]]:
        """Reads a source of training: its name, the hub's commit, and the texts by their roles."""
        columns, query = self.config["columns"], self.config["query_prompt"]
        if columns:
            found = source.table(spec, where)
            prompts = [query] + [self.config["document_prompt"]] * (len(columns) - 1)
            pairs = zip(columns, prompts, strict=True)
            read = [texts(found, name, "config.task.columns", prompt) for name, prompt in pairs]
        else:
            found = source.read(spec, where)
            read = [[query + text for text in found]]
            for number, text in enumerate(read[0], 1):
                if blank(text[len(query) :]):
                    raise UserError(f"{found.name}, text {number} is empty; remove it")
        return found.name, found.commit, read

    def examples(self, split):
        if split != "test" and self.data["validation"] is None:
            raise UserError(
                "config.data.validation is not set: texts alone select no checkpoint; give it a "
                "set with scores, as config.task.scored says"
            )
        return super().examples(split)

    def _about(self, split):
        found = super()._about(split)
        found.pop("rows", None)
        return found | dict(texts=len(self.examples(split).texts))

    def _encode(self, split):
        found = self.examples(split).texts
        none_N1 = np.zeros((len(found), 1), np.int32)
        return encoded.encode(self.tokenizer, found, None, none_N1, self.seq_len)

    @property
    def _lengths_N(self) -> np.ndarray:
        """Finds the tokens of the longest text of each example of training."""
        return self.rows("train").lengths_N[self.examples("train").known.rows_NG].max(axis=1)

    @property
    def buckets(self):
        return lengths_of(self._lengths_N, self.seq_len)

    def _stream(self, split, batch_size, seed=None, **processes):
        if seed is None:
            return super()._stream(split, batch_size, **processes)
        rows, rows_NG = self.rows(split), self.examples(split).known.rows_NG

        def make(ids_B: np.ndarray, length: int) -> Batch:
            batch = rows.batch(rows_NG[ids_B].reshape(-1), length)
            roles_B = np.arange(len(batch.ids_B), dtype=np.int32) % rows_NG.shape[1]
            return batch.replace(labels=roles_B[:, None])

        lengths_N = self._lengths_N
        return BucketStream(lengths_N, self.buckets, make, batch_size, seed=seed, **processes)

    def shapes(self, batch_size, length=None):
        return super().shapes(batch_size * max(1, len(self.config["columns"])), length)

    def score(self, split, outputs):
        """Computes the figures of `scored` from vectors, one (D,) for each row."""
        found = self.examples(split)
        if len(outputs) != len(found.texts):
            raise ValueError(f"{len(outputs)} vectors of {len(found.texts)} texts")
        return found.known.figures(np.stack(outputs))


make = Embedding
