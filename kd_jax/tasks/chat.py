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

import numpy as np

from kd_jax.data import cache, chats, encoded, source, splits
from kd_jax.data.encoded import Marked
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
_VERSION = 2  # of what is cached: raise it when tokenizing changes


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

    def shapes(self, batch_size):
        segments = {"segments_BT": self.seq_len} if self.packed else {}
        return batch_shapes(batch_size, self.seq_len, self.seq_len, **segments)

    def _stream(self, split, batch_size, seed=None, **processes):
        rows = self._rows(split)
        return Stream(len(rows), rows.batch, batch_size, seed=seed, **processes)

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
        """Reads the conversations of a source, and tokenizes them once."""
        found = source.table(self.data[key], f"data.{key}")
        messages = chats.read(found, self.config["column"], "config.task.column")
        tools = chats.tools(found)
        digest = chats.digest(messages, tools)
        tokenizer = self.tokenizer
        template = tokenizer.chat_template, self.config["turns"]
        key = cache.key(_VERSION, digest, tokenizer.backend_tokenizer.to_str(), *template)
        entry = cache.folder(self.data["cache_dir"]) / f"chats-{key}"

        def write(path):
            rows = self._template.encode(messages, found.place, tools)
            Marked.of([each.ids_N for each in rows], [e.learned_N for e in rows]).save(path)

        cached = cache.once(entry, write, "config.data.cache_dir")
        log.info("tokens of %s: %s %s", found.name, "cached in" if cached else "kept in", entry)
        tokens = Marked.load(entry)
        cache.check_ids(tokens.tokens_F, 1 + max(tokenizer.get_vocab().values()), entry)
        return Conversations(found.name, found.commit, digest, tokens, np.arange(len(tokens)))


class Rows:
    """Rows of conversations, cut to length and packed."""

    def __init__(self, part: Conversations, seq_len: int, packed: bool) -> None:
        self.tokens, self.seq_len, self.packed = part.tokens, seq_len, packed
        chosen = part.chosen_N
        lengths = []  # of the model's input: up to the token before the last learned one
        learned = cut = 0
        for number in chosen:
            _, learned_N = part.tokens[number]
            ends = np.flatnonzero(learned_N[1 : seq_len + 1])
            lengths.append(ends[-1] + 1 if len(ends) else 0)
            learned += len(ends)
            cut += bool(learned_N[seq_len + 1 :].any())
        lengths = np.array(lengths)
        self.lengths = dict(zip(chosen.tolist(), lengths.tolist(), strict=True))
        kept = chosen[lengths > 0]
        if not len(kept):
            raise UserError(
                f"{part.name}: no conversation has a word of the assistant within "
                f"config.task.seq_len={seq_len} tokens; lengthen the rows"
            )
        bins = encoded.pack(lengths[lengths > 0].tolist(), seq_len) if packed else None
        self.rows = [kept[each].tolist() for each in bins] if packed else kept[:, None].tolist()
        self.about = dict(
            conversations=len(chosen),
            cut=cut,
            dropped=int((lengths == 0).sum()),
            rows=len(self.rows),
            tokens=int(lengths.sum()),
            learnt=learned,
            longest=int(part.tokens.lengths_N[chosen].max()),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, ids_B: np.ndarray, epochs_B: np.ndarray) -> Batch:
        """Makes the rows of one batch; they are the same in every epoch."""
        rows = (map(self._piece, itertools.count(1), self.rows[number]) for number in ids_B)
        return encoded.batch(ids_B, rows, self.seq_len, self.packed)

    def _piece(self, segment: int, conversation: int) -> tuple:
        (ids_N, learned_N), length = self.tokens[conversation], self.lengths[conversation]
        return ids_N[:length], ids_N[1 : length + 1], learned_N[1 : length + 1], segment


make = Chat
