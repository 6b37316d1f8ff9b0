"""Chats: language modelling on conversations, of which the assistant's words alone are learnt,
tool calls and thoughts included (data/chats.py).

A row of `seq_len` tokens holds as many whole conversations as fit (`packed`), each with positions
and attention of its own; without packing it holds one. Labels are shifted here: the label of a
token is the one after it, weight 1 where the assistant wrote that. What follows the last learnt
token is left out. A conversation that is longer than a row loses its end; one without any learnt
token within a row is dropped. Both are counted in the run's manifest.

config.task: name, seq_len, turns (all | last: which of the assistant's messages are learnt),
column (of the messages), packed. config.data: as for other texts (tasks/task.py), its sources with
a column of messages; a share `held_out` is of conversations.
"""

import functools
import hashlib
import logging
from collections.abc import Mapping

import numpy as np
from transformers import PreTrainedTokenizerBase

from kd_jax.data import cache, chats, ragged, table
from kd_jax.data.loader import Stream
from kd_jax.data.ragged import Ragged
from kd_jax.data.settings import settings
from kd_jax.errors import UserError
from kd_jax.ranges import Whole
from kd_jax.tasks.task import DATA, HELD_OUT_SEED, label_a_token
from kd_jax.types import Batch

log = logging.getLogger(__name__)

DEFAULTS = dict(
    name="chat",
    seq_len=Whole(least=4, default=1024),
    turns="all",
    column="messages",
    packed=True,
)
_VERSION = 2  # of what is cached: raise it when tokenising changes


def make(
    config: Mapping, data: Mapping | None, tokenizer: PreTrainedTokenizerBase | None
) -> "Chat":
    """The task of config.task and config.data; `tokenizer` may be None for `shapes` alone."""
    return Chat(config, data, tokenizer)


class Chat:
    """Batches have a label and a weight for every token, (B, T), and segments where packed."""

    head = "clm"

    def __init__(self, config, data, tokenizer) -> None:
        config = settings(config, DEFAULTS, "task")
        self.data = settings(data, DATA, "data")
        self.seq_len, self.packed = config["seq_len"], config["packed"]
        self.column, self.turns = config["column"], config["turns"]
        self.tokenizer = tokenizer
        self._template = None if tokenizer is None else chats.Template(tokenizer, self.turns)
        self._encoded = functools.cache(self._encode)
        self._rows = functools.cache(self._cut)

    def shapes(self, batch_size: int) -> Batch:
        """A batch of jax.ShapeDtypeStruct, for compiling before any data is read."""
        batch = label_a_token(batch_size, self.seq_len)
        return batch.replace(segments_BT=batch.tokens_BT) if self.packed else batch

    def train(
        self, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
    ) -> Stream:
        """Endless, shuffled stream of global batches of `batch_size` rows of training text."""
        rows = self._rows("train")
        processes = dict(process_index=process_index, process_count=process_count)
        return Stream(len(rows), rows.batch, batch_size, seed=seed, **processes)

    def held_out(
        self, split: str, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> Stream:
        """One pass over "validation" or "test", always the same."""
        rows = self._rows(split)
        processes = dict(process_index=process_index, process_count=process_count)
        return Stream(len(rows), rows.batch, batch_size, **processes)

    def prepare(self) -> dict[str, dict]:
        """Reads and tokenises every split of the config now. Returns for the run's manifest:
        split -> name, commit, digest, conversations, cut, dropped, rows, tokens, learnt."""
        manifest = {}
        for split in ("train", "validation", "test"):
            if self.data[split] is None and not (split == "validation" and self.data["train"]):
                continue
            rows = self._rows(split)
            manifest[split] = rows.about
            if rows.about["cut"] or rows.about["dropped"]:
                log.info(
                    "%s: of %d conversations %d are longer than %d tokens and cut, %d of them so "
                    "early that nothing of an answer is left: dropped",
                    *(rows.about["name"], rows.about["conversations"], rows.about["cut"]),
                    *(self.seq_len, rows.about["dropped"]),
                )
        return manifest

    def _source(self, split: str) -> str:
        """The config key that a split is taken from."""
        if split not in ("train", "validation", "test"):
            raise UserError(f"unknown split {split!r}; have: train, validation, test")
        from_train = self.data["validation"] is None and split == "validation"
        key = "train" if from_train else split
        if self.data[key] is None:
            raise UserError(f"config.data.{key} is not set: give it a source, such as a file")
        return key

    def _cut(self, split: str) -> "Rows":
        key = self._source(split)
        about, tokens = self._encoded(key)
        chosen_N = np.ones(len(tokens), bool)
        if self.data["validation"] is None and key == "train":
            if len(tokens) < 2:
                raise UserError(
                    f"{about['name']} (config.data.train) holds one conversation, of which nothing "
                    f"can be held out: set config.data.validation to a source"
                )
            held_N = _held(len(tokens), self.data["held_out"])
            chosen_N = held_N if split == "validation" else ~held_N
        return Rows(tokens, np.flatnonzero(chosen_N), self.seq_len, self.packed, about)

    def _encode(self, key: str) -> tuple[dict, Ragged]:
        """A source's name, commit and digest, and all of its conversations, tokenised once."""
        found = table.read(self.data[key], f"data.{key}")
        messages = chats.read(found, self.column, "config.task.column")
        tools = chats.tools(found)
        digest = chats.digest(messages, tools)
        tokenizer, hashed = self.tokenizer, hashlib.blake2b(digest_size=16)
        template = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, self.turns
        for part in (_VERSION, digest, *template):
            hashed.update(f"{part}\0".encode())
        entry = cache.folder(self.data["cache_dir"]) / f"chats-{hashed.hexdigest()}"

        def write(path):
            encoded = self._template.encode(messages, found.place, tools)
            Ragged.of([each.ids_N for each in encoded], [e.learnt_N for e in encoded]).save(path)

        cached = cache.once(entry, write, "config.data.cache_dir")
        log.info("tokens of %s: %s %s", found.name, "cached in" if cached else "kept in", entry)
        tokens = Ragged.load(entry)
        cache.check_ids(tokens.tokens_F, 1 + max(tokenizer.get_vocab().values()), entry)
        return dict(name=found.name, commit=found.commit, digest=digest), tokens


def _held(count: int, share: float) -> np.ndarray:
    """bool (count,): a random share, at least one."""
    order = np.random.Generator(np.random.Philox(HELD_OUT_SEED)).permutation(count)
    held = np.zeros(count, bool)
    held[order[: min(count - 1, max(1, round(share * count)))]] = True
    return held


class Rows:
    """Conversations cut to length and put into rows."""

    def __init__(self, tokens: Ragged, chosen: np.ndarray, seq_len: int, packed: bool, about: dict):
        self.tokens, self.seq_len, self.packed = tokens, seq_len, packed
        lengths = []  # of what a model reads: up to the token before the last learnt one
        learnt = cut = 0
        for number in chosen:
            _, learnt_N = tokens[number]
            ends = np.flatnonzero(learnt_N[1 : seq_len + 1])
            lengths.append(ends[-1] + 1 if len(ends) else 0)
            learnt += len(ends)
            cut += bool(learnt_N[seq_len + 1 :].any())
        lengths = np.array(lengths)
        self.lengths = dict(zip(chosen.tolist(), lengths.tolist(), strict=True))
        kept = chosen[lengths > 0]
        if not len(kept):
            raise UserError(
                f"{about['name']}: no conversation has a word of the assistant within "
                f"config.task.seq_len={seq_len} tokens; lengthen the rows"
            )
        bins = ragged.pack(lengths[lengths > 0].tolist(), seq_len) if packed else None
        self.rows = [kept[each].tolist() for each in bins] if packed else kept[:, None].tolist()
        self.about = about | dict(
            conversations=len(chosen),
            cut=cut,
            dropped=int((lengths == 0).sum()),
            rows=len(self.rows),
            tokens=int(lengths.sum()),
            learnt=learnt,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, ids_B: np.ndarray, epochs_B: np.ndarray) -> Batch:
        """The rows of one batch, whatever the epoch."""
        shape = len(ids_B), self.seq_len
        tokens_BT, labels_BT, segments_BT = (np.zeros(shape, np.int32) for _ in range(3))
        mask_BT, weights_BT = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for row, number in enumerate(ids_B):
            start = 0
            for segment, conversation in enumerate(self.rows[number], 1):
                length = self.lengths[conversation]
                ids_N, learnt_N = self.tokens[conversation]
                here = row, slice(start, start + length)
                tokens_BT[here] = ids_N[:length]
                labels_BT[here] = ids_N[1 : length + 1]
                weights_BT[here] = learnt_N[1 : length + 1]
                mask_BT[here] = 1.0
                segments_BT[here] = segment
                start += length
        return Batch(
            ids_B=np.asarray(ids_B, np.int32),
            tokens_BT=tokens_BT,
            mask_BT=mask_BT,
            labels=labels_BT,
            weights=weights_BT,
            segments_BT=segments_BT if self.packed else None,
        )
