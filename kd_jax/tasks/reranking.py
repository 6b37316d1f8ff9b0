"""Reranking by a cross-encoder, which reads a query and a document together and gives one score.

config.task: name, seq_len. config.data as in data/splits.py: tables of `query`, and of `positive`
and `negative`, lists of texts (tasks/scored.py). A row is a query with one of its documents, the
label 1 for a positive one and 0 for a negative one. What is held out is whole queries.

Trained on labels, scores go to these numbers; a teacher's may have any scale. Figures are those of
the order alone: MAP and MRR@10.
"""

import numpy as np

from kd_jax.data import source, splits
from kd_jax.data.splits import HELD_OUT_SEED
from kd_jax.metrics import embedding
from kd_jax.ranges import Whole
from kd_jax.tasks.classification import ClassificationTask, Texts
from kd_jax.tasks.scored import reranked
from kd_jax.tasks.task import local

DEFAULTS = dict(name="reranking", seq_len=Whole(least=8, default=256))


class CrossEncoding(ClassificationTask):
    """Scores of pairs of a query and a document; those of one query stand together."""

    labels, regression = ("score",), True
    metrics, primary = embedding.RERANKING, embedding.RERANKING[0]
    defaults = DEFAULTS

    @classmethod
    def smoke(cls, task, data, samples):
        return dict(seq_len=24), local(*[samples / "embedding" / "reranking.jsonl"] * 2)

    def _read(self, key):
        where, spec = self._spec(key)
        table = source.table(spec, where)
        no_prompts = dict(query_prompt="", document_prompt="")
        queries, documents, grades, rows = reranked(table, no_prompts)
        labels_N = np.array(grades, np.float32)
        place = lambda pair: table.place(rows[pair])  # noqa: E731
        return Texts(table.name, queries, documents, labels_N, place, table.commit)

    def _held_out(self, examples):
        return splits.grouped(examples.first, self.data["held_out"], HELD_OUT_SEED)

    def score(self, split, outputs):
        return self.score_predictions(split, self._logits(split, outputs)[:, 0])

    def score_predictions(self, split, predictions):
        examples = self.examples(split)
        rows = list(map(examples.place, range(len(examples))))  # of the table: a query is a row
        new_N = [a != b for a, b in zip(rows, ["", *rows[:-1]], strict=True)]
        return embedding.reranking(np.asarray(predictions), self._labels(split), np.cumsum(new_N))


make = CrossEncoding
