"""Language modelling on conversations: only the assistant's tokens are learned, tool calls and
thoughts included (data/chats.py).

A row of `seq_len` tokens holds as many whole conversations as fit (`packed`), each with separate
positions and attention; without packing it holds one. Labels are shifted here: the label of a
token is the next token, with weight 1 if the assistant wrote that. Tokens after the last learned
one are left out. A conversation that is longer than a row loses its end; one without any learned
token within a row is dropped. Both are counted in the run's manifest.

config.task: name, seq_len, turns (all | last: which of the assistant's messages are learned),
column (of the messages), packed. config.data: as in tasks/language.py, with a column of messages
in each source; `held_out` is a share of the conversations.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kd_jax.data import arrays, cache, chats, encoded, identity, messages, source, splits
from kd_jax.data.encoded import Beginnings, Marked
from kd_jax.data.loader import Stream
from kd_jax.data.splits import HELD_OUT_SEED
from kd_jax.errors import UserError
from kd_jax.ranges import Choice, Whole
from kd_jax.tasks.language import Text
from kd_jax.tasks.task import batch_shapes, local
from kd_jax.types import Batch

log = logging.getLogger(__name__)

DEFAULTS = dict(
    name="chat",
    seq_len=Whole(least=4, default=1024),
    turns=Choice("all", "last"),
    column="messages",
    packed=True,
)
_VERSION = 3  # of what is cached: raise it when tokenizing changes


@dataclasses.dataclass(frozen=True)
class Conversations:
    """A selection of a source's tokenized conversations."""

    name: str
    commit: str | None  # of a hub repository
    digest: str  # of the whole source
    tokens: Marked
    chosen_N: np.ndarray  # their numbers in the source

    def part(self, chosen_N: np.ndarray, name: str) -> "Conversations":
        return dataclasses.replace(self, name=name, chosen_N=self.chosen_N[chosen_N])


class Chat(Text):
    """Conversations as a task: batches have a label and a weight for every token, (B, T), and
    segments if packed."""

    head, defaults, of_chats = "clm", DEFAULTS, True

    def __init__(self, config, data, tokenizer) -> None:
        super().__init__(config, data, tokenizer)
        turns, self.packed = self.config["turns"], self.config["packed"]
        self._template = None if tokenizer is None else chats.Template(tokenizer, turns)
        self._rows = functools.cache(self._cut)

    @classmethod
    def smoke(cls, task, data, samples):
        return dict(seq_len=128), local(samples / "chats" / "train.jsonl") | dict(held_out=0.1)

    @property
    def end_of_text(self):
        return self._template.end_of_turn

    def shapes(self, batch_size):
        segments = {"segments_BT": self.seq_len} if self.packed else {}
        return batch_shapes(batch_size, self.seq_len, self.seq_len, **segments)

    def _stream(self, split, batch_size, seed=None, **processes):
        rows = self._rows(split)
        return Stream(len(rows), rows.batch, batch_size, seed=seed, **processes)

    def beginnings(self, split, most):
        """Finds what comes before the last learned message of each conversation; longer ones than
        `most` tokens are left out."""
        part = self.examples(split)
        tokens, chosen_N = part.tokens, part.chosen_N[part.tokens.counts_N[part.chosen_N] > 0]
        lengths_N = tokens.last_spans_N2[chosen_N, 0].astype(np.int64)
        kept_N = (0 < lengths_N) & (lengths_N <= most)
        return Beginnings(tokens.tokens_F, tokens.starts_N[chosen_N[kept_N]], lengths_N[kept_N])

    def _about(self, split):
        """Counts a split's conversations, cut ones, dropped ones, rows, tokens, learned tokens, and
        the tokens of the longest conversation."""
        about, name = self._rows(split).about, self.examples(split).name
        if about["cut"] or about["dropped"]:
            log.info(
                "%s: of %d conversations %d are longer than %d tokens and cut, %d of them so early "
                "that nothing of an answer is left: dropped",
                *(name, about["conversations"], about["cut"], self.seq_len, about["dropped"]),
            )
        return about

    def _cut(self, split: str) -> "Rows":
        return Rows(self.examples(split), self.seq_len, self.packed)

    def _held_out(self, whole):
        return splits.random_share(len(whole.tokens), self.data["held_out"], HELD_OUT_SEED)

    def _read(self, key) -> Conversations:
        """Opens the conversations of a source, which are tokenized once."""
        column, template = self.config["column"], self._template
        found = source.records(self.data[key], f"data.{key}", column, "tools")
        root, setting = cache.folder(self.data["cache_dir"]), "config.task.column"

        def rows(doing: str, total: int | None = None) -> Iterator[messages.Row]:
            watched = identity.watched(found, f"{doing} {found.name}", total)
            return messages.read(watched, column, setting)

        digest, count = identity.remembered(
            found, f"chats in {column}", lambda: messages.identity(rows("reading")), root
        )
        if not count:
            raise UserError(f"{found.name} (config.data.{key}) holds no rows")
        tokenizer = self.tokenizer
        rules = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, self.config["turns"]
        entry = root / f"chats-{cache.key(_VERSION, digest, *rules)}"

        size = 1 + max(tokenizer.get_vocab().values())

        def write(folder: Path) -> None:
            ids = arrays.type_of_ids(size)
            Marked.write(folder, template.encode(rows("tokenizing", count)), ids)
            identity.check_unchanged(found)

        cached = cache.once(entry, write, "config.data.cache_dir")
        log.info("tokens of %s: %s %s", found.name, "cached in" if cached else "kept in", entry)
        tokens = Marked.load(entry)
        cache.check_ids(tokens.tokens_F, size, entry)
        return Conversations(found.name, found.commit, digest, tokens, np.arange(len(tokens)))


class Rows:
    """Rows of conversations, cut to length and packed."""

    def __init__(self, part: Conversations, seq_len: int, packed: bool) -> None:
        self.tokens, self.seq_len, self.packed = part.tokens, seq_len, packed
        chosen_N = part.chosen_N
        learned_N, ends_N, cut_N = part.tokens.within(1, seq_len + 1)
        # Of the model's input: up to the token before the last learned one.
        self.lengths_N = np.maximum(ends_N - 1, 0)
        lengths_N = self.lengths_N[chosen_N]
        kept_N = chosen_N[lengths_N > 0]
        if not len(kept_N):
            raise UserError(
                f"{part.name}: no conversation has a word of the assistant within "
                f"config.task.seq_len={seq_len} tokens; lengthen the rows"
            )
        if packed:
            bins = encoded.pack(self.lengths_N[kept_N], seq_len)
        else:
            bins = encoded.Bins(np.arange(len(kept_N)), np.arange(len(kept_N) + 1))
        self.rows = dataclasses.replace(bins, items_N=kept_N[bins.items_N])
        self.about = dict(
            conversations=len(chosen_N),
            cut=int(cut_N[chosen_N].sum()),
            dropped=int((lengths_N == 0).sum()),
            rows=len(self.rows),
            tokens=int(lengths_N.sum()),
            learnt=int(learned_N[chosen_N].sum()),
            longest=int(part.tokens.lengths_N[chosen_N].max()),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, ids_B: np.ndarray, epochs_B: np.ndarray) -> Batch:
        """Makes the rows of one batch; they are the same in every epoch."""
        rows = (map(self._piece, itertools.count(1), self.rows[number]) for number in ids_B)
        return encoded.batch(ids_B, rows, self.seq_len, self.packed)

    def _piece(self, segment: int, conversation: int) -> tuple:
        (ids_N, learned_N), length = self.tokens[conversation], self.lengths_N[conversation]
        return ids_N[:length], ids_N[1 : length + 1], learned_N[1 : length + 1], segment


make = Chat
