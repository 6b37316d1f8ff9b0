"""Measures the perplexity of a text: a window slides over it, and every token is predicted once
("perplexity of fixed-length models" in HF's documentation).

A window that begins at token b reads `seq_len` tokens and predicts [b + 1, b + seq_len + 1); the
next one begins `stride` tokens later, and scores only the tokens that no earlier window predicted.
So every token of a text but the first is scored exactly once, after at least seq_len - stride + 1
tokens, or all that precede it. (HF's guide leaves the last token's prediction unused: its windows
have one token less of context.)

config.task:
    name       "perplexity"
    seq_len    tokens that a window reads; None: as many as the model takes, at most 2,048
    stride     tokens from one window to the next; None: half of seq_len
    documents  joined: everything is one text. Text files (.txt, .raw) stay as they are; other
               documents (rows of tables, several files) have a blank line between them. A
               tokenizer that begins texts with a token of its own does so once
               alone: each document (data/source.py) is a separate text that begins with the
               tokenizer's beginning-of-text token, or else end-of-text token, so that its first
               word is scored too

config.data as in tasks/likelihood.py; there is no default.

Figures: nats a token and its exponential, the perplexity a token; and the perplexity a word,
exp(nats of all scored tokens / words), words being what white space separates in the raw text,
which can be compared between tokenizers.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.data import continuations, files, source, splits
from kd_jax.data.continuations import Rows
from kd_jax.data.source import Documents
from kd_jax.errors import UserError
from kd_jax.ranges import Choice, settings
from kd_jax.tasks.likelihood import POSITIONS, LikelihoodTask, Scored

DEFAULTS = dict(
    name="perplexity",
    seq_len=POSITIONS,
    stride=POSITIONS,
    documents=Choice("joined", "alone"),
)
MOST = 2048  # tokens of a window by default, if the model takes as many


class Perplexity(LikelihoodTask):
    """The perplexity of a text; a stretch holds the tokens that one window scores."""

    defaults = DEFAULTS
    of_text = as_trained = True

    def __init__(self, config, data) -> None:
        super().__init__(config, data)
        self.stride, self.documents = self.config["stride"], self.config["documents"]
        if self.data["test"] is None:
            raise UserError("perplexity needs a text: set config.data.test to a source")

    def _read(self) -> Documents:
        """Reads the documents, joined into one text unless they are scored alone."""
        given = self.data["test"]
        found = source.read(given, "data.test")
        if self.documents == "alone":
            return found
        whole = self._raw(settings(given, source.DEFAULTS, "data.test")) or "\n\n".join(found)
        return Documents(found.name, lambda: iter([whole]), found.commit)

    @staticmethod
    def _raw(given: dict[str, Any]) -> str:
        """Reads a text file unchanged; "" if the source is not a text file."""
        path = given["path"]
        if given["source"] != "files" or not isinstance(path, str | Path):
            return ""
        file = Path(os.path.expanduser(path))
        text = file.suffix in (".txt", ".raw") and file.is_file()
        return "".join(files.lines(file)) if text else ""

    def manifest(self):
        return splits.about(self.scored) | dict(examples=self.scored.identity.count)

    def encoded(self, tokenizer, max_tokens):
        """Lays windows over all texts. UserError if the stride is longer than a window, and if
        there is nothing to predict."""
        window = self.seq_len or min(max_tokens, MOST)
        stride = self.stride or max(1, window // 2)
        if stride > window:
            raise UserError(
                f"config.task.stride={stride} is more than the {window} tokens of a window: some "
                f"tokens would never be predicted"
            )
        return ScoredText(self.scored, tokenizer, window, stride, self.documents)


class ScoredText(Scored):
    """A text tokenized into windows."""

    def __init__(self, texts, tokenizer, window, stride, documents):
        everything = list(texts)
        tokens = continuations.begun(tokenizer, everything)
        if documents == "alone":
            begin = continuations.beginning(tokenizer)
            tokens = [ids if ids[:1] == [begin] else [begin, *ids] for ids in tokens]
        self._stretches = continuations.sliding(tokens, window, stride)
        if not len(self._stretches):
            raise UserError(f"{texts.name}: one token in all, nothing to predict")
        self.rows = Rows(self._stretches, window)
        self._words = sum(len(text.split()) for text in everything)
        self._stated = {"seq_len": window, "stride": stride, "documents": documents}

    def figures(self, log_likelihoods_N):
        """Computes {"loss" (nats a token), "perplexity" (a token), "word_perplexity", "tokens"
        (scored), "words", "windows", "seq_len", "stride", "documents"}."""
        nats, tokens = -float(log_likelihoods_N.sum()), int(self._stretches.counts_N.sum())
        return {
            "loss": nats / tokens,
            "perplexity": _exp(nats / tokens),
            "word_perplexity": _exp(nats / self._words),
            "tokens": tokens,
            "words": self._words,
            "windows": len(self._stretches),
        } | self._stated

    def records(self, log_likelihoods_N) -> Iterator[dict[str, Any]]:
        """Yields {"window" (its number from 0), "tokens" (that it scores), "log_likelihood" (nats)}
        of each window."""
        counts_N = self._stretches.counts_N
        for n, value in enumerate(np.asarray(log_likelihoods_N, np.float64).tolist()):
            yield {"window": n, "tokens": int(counts_N[n]), "log_likelihood": value}


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))


scoring = Perplexity
