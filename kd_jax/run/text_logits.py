"""Computes and stores logits of training text: a teacher's, or the mean of an ensemble's members.

They are computed once for the rows that will be read, stored (teachers/store.py), and found again
by content: in the next epoch, with another seed, in another run. Adding a member to a mean takes
one pass over the rows, which reads the stored mean of the members before it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from kd_jax import config as defaults
from kd_jax.data import cache
from kd_jax.data.loader import Stream
from kd_jax.errors import UserError
from kd_jax.models import family
from kd_jax.objectives.kl import ForwardKL
from kd_jax.objectives.logits import stored
from kd_jax.objectives.objective import Objective
from kd_jax.ranges import settings
from kd_jax.teachers.ensemble import OTHERS, TEACHER, Stored
from kd_jax.teachers.store import NOT_FINITE, LogitStore, bytes_of, identity, names_of
from kd_jax.train import sharding
from kd_jax.train.passes import ahead, log_probs_step
from kd_jax.train.progress import ProgressBar
from kd_jax.train.sharding import place
from kd_jax.types import Batch, Model, Params, StoredLogits

if TYPE_CHECKING:
    from kd_jax.run.run import Run
    from kd_jax.run.stage import Stage

log = logging.getLogger(__name__)

SAMPLE = 1000  # tokens on which the largest logits are compared with all of them


class TextLogits:
    """The stored logits of the rows in the first batches of a stream."""

    def __init__(
        self,
        run: Run,
        this: Stage,
        rows: Stream,
        steps: int,
        k: Callable[[int], int],
        space: str = "logits",
        drawn: bool = False,
    ):
        """Reads all rows once.

        Args:
            run: whose mesh, types and cache are taken.
            this: the stage that reads them; where its objective looks at every token, so are they.
            rows: their batches.
            steps: how many of them there are.
            k: how many logits of a token are kept, by the number of tokens.
            space: what models are averaged in: logits or probabilities.
            drawn: keeps so many draws of a token's id instead of the largest logits.
        """
        self._run, self._stream, self._steps, self._space = run, rows, steps, space
        self._drawn = drawn
        self._everywhere = this.program.objective.everywhere
        self.vocab_size = vocab_size(run, this)
        self._identities: dict[str, list[str]] = {}  # of models, in the order of their mean
        self._tokens: dict[bytes, int] = {}  # of each row, by its digest
        for batch in map(_to_host, self._batches()):
            for b, digest in _rows(batch):
                self._tokens.setdefault(digest, int((batch.weights[b] > 0).sum()))
        self._folder, tokens = folder(run), sum(self._tokens.values())
        self.k = k(tokens) if drawn else min(k(tokens), self.vocab_size)
        kept = "all logits" if self.k == self.vocab_size else f"the {self.k} largest logits"
        kept = f"{self.k} draws" if drawn else kept
        log.info(
            "%s tokens of %s different rows; %s of each take %s bytes a token, %s bytes in %s",
            *(f"{tokens:,}", f"{len(self._tokens):,}", kept, f"{self._size(1):,}"),
            *(f"{self._size(tokens):,}", self._folder),
        )

    def _size(self, tokens: int) -> int:
        return size_of(tokens, self.k, self.vocab_size, self._drawn)

    def of(
        self, name: str, models: Sequence[Model], others: Sequence[LogitStore] = ()
    ) -> LogitStore:
        """Returns the store with every row's logits of the mean of models that have the shape of
        run.models[name]; computes missing ones.

        Models of an earlier call come first in every later one. Entries of `others` stay on disk.
        Raises UserError if logits do not fit on disk, or are not finite.
        """
        run, known = self._run, self._identities.setdefault(name, [])
        known += [identity_of(run, name, model.params) for model in models[len(known) :]]
        gigabytes, about = cache_settings(run)["max_gb"], (self._space, self.k, self.vocab_size)
        about += ("drawn",) * self._drawn
        open_store = functools.partial(
            LogitStore,
            self._folder,
            max_gb=gigabytes,
            vocab_size=self.vocab_size,
            drawn=self._drawn,
        )
        names = [cache.key(*about, *known[: n + 1]) for n in range(len(models))]
        stores = [open_store(each) for each in names]
        there = len(stores)
        while there and self._missing(stores[there - 1]):
            there -= 1
        for n in range(there, len(models)):
            before = stores[n - 1 : n] if n else []
            who = f"{name} {n + 1}" if len(models) > 1 else name
            # Again where another run has just made room for its own.
            while missing := self._missing(stores[n]):
                if jax.process_count() > 1:  # some may have it, and all compute together
                    stores[n].remove(missing)
                sizes = [(self._tokens[digest], self.k) for digest in missing]
                computed = self._computed(models[n], n, before, {*missing}, who)
                stores[n].write(missing, sizes, computed, [*before, *others])
        if self.k < self.vocab_size and not self._drawn:
            log.info(
                "%s: %d of %d logits are kept: KL(all || kept) %.3g nats a token on %d tokens",
                *(name, self.k, self.vocab_size, *self._error(models, stores[-1])),
            )
        return stores[-1]

    def attach(self, batch: Batch, stores: Mapping[str, LogitStore]) -> Batch:
        """Adds the stored logits of its rows to a batch of NumPy arrays; zeros where not stored."""
        seen, found = self._seen(batch), {}
        rows = [*_rows(seen)]
        for name, store in stores.items():
            found[name] = blank(seen.labels.shape, self.k, self.vocab_size, self._drawn)
            logits = store.read([digest for _, digest in rows])
            for (b, _), row in zip(rows, logits, strict=True):
                if row is None:
                    gone = f"{self._folder}: logits of {name} are gone; run the command again"
                    raise UserError(gone)
                here = b, seen.weights[b] > 0
                for whole, part in zip(*map(jax.tree.leaves, (found[name], row)), strict=True):
                    whole[here] = part
        return batch.replace(stored=found)

    def _batches(self) -> Iterator[Batch]:
        return map(self._seen, itertools.islice(self._stream.batches(), self._steps))

    def _seen(self, batch: Batch) -> Batch:
        """Sets a batch's weights to 1 wherever logits are stored, and 0 elsewhere."""
        if not self._everywhere:
            return batch
        return batch.replace(positions_BP=None, labels=batch.tokens_BT, weights=batch.mask_BT)

    def _missing(self, store: LogitStore) -> list[bytes]:
        """Finds the rows that are missing from the store of any process."""
        missing_N = np.array([row is None for row in store.read([*self._tokens])], bool)
        if jax.process_count() > 1:
            missing_N = multihost_utils.process_allgather(missing_N).any(axis=0)
        return list(itertools.compress(self._tokens, missing_N))

    def _computed(
        self, model: Model, n: int, before: Sequence[LogitStore], missing: set[bytes], who: str
    ) -> Iterator[StoredLogits]:
        """Computes logits of rows: a model's, averaged with the stored mean of the n before it."""
        others, rows = dict(zip([OTHERS], before, strict=False)), len(missing)

        def needed() -> Iterator[tuple[Batch, list[int], Batch]]:
            for batch in self._batches():
                whole, new = _to_host(batch), []
                for b, digest in _rows(whole):
                    if digest in missing:
                        missing.remove(digest)
                        new.append(b)
                if new:
                    yield whole, new, self.attach(batch, others)

        bar = ProgressBar(f"logits of {who}", 0, rows)
        with contextlib.closing(bar):
            step = lambda given: self._step(model, given[-1], n, self.k)  # noqa: E731
            for (whole, new, _), found in ahead(step, needed(), self._run.mesh):
                found = _to_host(found)
                for b in new:
                    here = b, whole.weights[b] > 0
                    row = jax.tree.map(lambda x, here=here: x[here], found)
                    if not _is_finite(row):
                        which = f"{who}: its logits of row {whole.ids_B[b]}"
                        raise UserError(f"{which} are not finite; {NOT_FINITE}")
                    yield row
                bar.update(rows - len(missing), {}, 0.0)

    def _step(self, model: Model, batch: Batch, n: int, k: int) -> StoredLogits:
        run = self._run
        return log_probs_step(
            model,
            place(batch.replace(stored=batch.stored or None), run.mesh),
            sharding.everywhere(np.float32(1.0 / (n + 1)), run.mesh),
            vocab_size=self.vocab_size,
            k=k,
            drawn=self._drawn,
            space=self._space,
            policy=run.policy,
            mesh=run.mesh,
            table=family.PARTITION,
        )

    def _error(self, models: Sequence[Model], store: LogitStore) -> tuple[float, int]:
        """Computes the mean KL(all logits || kept logits) over some tokens, and counts these."""
        batch, exact = self._seen(self._stream[0]), None
        own = slice(jax.process_index() * len(batch.weights), None)  # this process's rows
        for n, model in enumerate(models):
            given = batch.replace(stored=None if exact is None else {OTHERS: exact})
            of_all = _to_host(self._step(model, given, n, self.vocab_size))
            exact = jax.tree.map(lambda x: x[own][: len(batch.weights)], of_all)
        wanted_BP = batch.weights > 0
        exact_MV = exact.values_BPK[wanted_BP][:SAMPLE]
        few = self.attach(batch, {OTHERS: store}).stored[OTHERS]
        few = stored(jax.tree.map(lambda x: x[None, wanted_BP][:, :SAMPLE], few), self.vocab_size)
        near_MV = np.asarray(few.logits(few.rows, self._run.policy))
        gaps_M = (np.exp(exact_MV) * (exact_MV - near_MV)).sum(axis=1, dtype=np.float64)
        return float(gaps_M.mean()), len(gaps_M)


def size_of(tokens: int, k: int, vocab_size: int, drawn: bool = False) -> int:
    """Computes the bytes on disk of k logits, or draws, of each token."""
    return bytes_of(tokens, tokens * k, names_of(k, vocab_size, drawn), vocab_size)


def identity_of(run: Run, name: str, params: Params) -> str:
    """Names a model of the run, for `LogitStore`, by everything that its logits depend on. The
    first process reads its parameters, one by one; all call this together."""
    about = run.models[name].about
    if jax.process_count() == 1:
        return identity(params, about)
    first = jax.process_index() == 0
    own = identity(params, about, sharding.whole if first else sharding.take_part)
    digits = multihost_utils.broadcast_one_to_all(np.frombuffer(bytes.fromhex(own), np.uint8))
    return bytes(digits).hex()


def cache_settings(run: Run) -> dict[str, Any]:
    """Reads config.cache."""
    return settings(run.config.get("cache"), defaults.ranges(defaults.SECTIONS["cache"]), "cache")


def folder(run: Run) -> Any:
    """Returns the folder of stored logits; for text, one for each process of a run."""
    root = cache.folder(cache_settings(run)["folder"]) / "teacher_logits"
    if jax.process_count() > 1 and not run.task.of_examples:
        root /= f"process_{jax.process_index()}_of_{jax.process_count()}"
    return root


def check_terms(objective: Objective, whose: str) -> None:
    """Raises UserError if a term reads more of the teacher than its probabilities; `whose` names
    the logits in the message."""
    if objective.needs_teacher_states:
        names = ", ".join(name for name, _ in objective.state_terms)
        raise UserError(f"config.objective.{names}: {whose} has logits alone; leave it out")
    for term in objective.row_terms:
        if term.divergence.needs_teacher and not term.divergence.of_probabilities:
            raise UserError(
                f"config.objective.{term.name} compares logits themselves, and {whose} has "
                f"probabilities alone; take a divergence such as kl"
            )


def check_kept(run: Run, objective: Objective) -> None:
    """Raises UserError if a term makes no sense with what config.cache.logits keeps."""
    own = cache_settings(run)
    for term in objective.row_terms:
        key = f"config.objective.{term.name}"
        if not term.divergence.needs_teacher:
            continue
        plain = isinstance(term.divergence, ForwardKL) and term.temperature == 1.0
        if own["logits"] == "rskd" and not plain:
            raise UserError(
                f"{key}: draws of the teacher (config.cache.logits='rskd') are for kl at "
                f"temperature 1; take it, or set config.cache.logits='top_k'"
            )
        renormalised = own["logits"] == "top_k" and own["tail"] == "renormalised"
        if renormalised and term.divergence.needs_all_ids:
            raise UserError(
                f"{key} is infinite where the teacher gives an id no probability; set "
                f"config.cache.tail to uniform or bucket"
            )


def are_kept(run: Run, this: Stage) -> bool:
    """Tells whether a stage uses stored logits of its teacher instead of running it in the step."""
    return this.learns and not run.task.of_examples and bool(cache_settings(run)["logits"])


def vocab_size(run: Run, this: Stage) -> int:
    """Counts the ids that a stage's model shares with its teacher; those beyond are padding."""
    return min(run.models[name].config.vocab_size for name in (this.teachers[0], this.model))


def top_k(run: Run, this: Stage) -> int:
    """Counts the logits, or draws, of a token that are kept of a stage's teacher."""
    own, size = cache_settings(run), vocab_size(run, this)
    if are_drawn(run):
        return own["draws"]
    return size if own["logits"] == "all" else min(own["top_k"], size)


def are_drawn(run: Run) -> bool:
    """Tells whether draws of tokens are kept instead of logits."""
    return cache_settings(run)["logits"] == "rskd"


def teacher(run: Run, size: int) -> Stored:
    """Makes the teacher of a stage whose logits over `size` ids come with the batch."""
    return Stored(size, cache_settings(run)["tail"])


def steps_of_new_rows(run: Run, this: Stage) -> int:
    """Counts the steps of a stage before its rows repeat; masks are new in every epoch."""
    if run.task.redraws or run.folder is None:
        return this.steps
    rows = run.task.train(this.batch_size, run.config.seed).size
    return min(this.steps, -(-rows // this.batch_size))


def described(run: Run, this: Stage, batch: Batch) -> tuple[Stored, Batch]:
    """Describes a teacher with stored logits, and adds their shapes to an abstract batch."""
    size, everywhere = vocab_size(run, this), this.program.objective.everywhere
    shape = (batch.tokens_BT if everywhere else batch.labels).shape
    logits = abstract(shape, top_k(run, this), size, are_drawn(run))
    return teacher(run, size), batch.replace(stored={TEACHER: logits})


def blank(
    shape: tuple[int, int], k: int, vocab_size: int, drawn: bool = False, xp: Any = np
) -> StoredLogits:
    """Makes stored logits of zeros, k at each of (B, P) places; `xp` is numpy or jax.numpy."""
    if drawn:
        return StoredLogits(None, xp.zeros((*shape, k), xp.int32))
    values_BPK = xp.zeros((*shape, k), xp.float32)
    if k == vocab_size:
        return StoredLogits(values_BPK)
    # Each id once, so that none is set twice.
    ids_BPK = xp.tile(xp.arange(k, dtype=xp.int32), (*shape, 1))
    return StoredLogits(values_BPK, ids_BPK, xp.zeros(shape, xp.float32))


def abstract(shape: tuple[int, int], k: int, vocab_size: int, drawn: bool = False) -> StoredLogits:
    """Describes the shapes of k stored logits at each of (B, P) places."""
    return jax.eval_shape(lambda: blank(shape, k, vocab_size, drawn, jnp))


def _is_finite(row: StoredLogits) -> bool:
    """Tells whether a row's logits were numbers; draws from others are -1."""
    if row.values_BPK is None:
        return bool((row.ids_BPK >= 0).all())
    return bool(np.isfinite(row.values_BPK).all())


def _rows(batch: Batch) -> Iterator[tuple[int, bytes]]:
    """Yields the index of each row, except those that fill a batch up, and a hash (16 bytes) of its
    model input and of the positions whose logits are stored."""
    read = batch.tokens_BT, batch.mask_BT, batch.types_BT, batch.positions_BP, batch.segments_BT
    arrays = [x for x in (*read, batch.weights > 0) if x is not None]
    for b in np.flatnonzero(batch.ids_B >= 0):
        row = b"".join(x[b].tobytes() for x in arrays)
        yield int(b), hashlib.blake2b(row, digest_size=16).digest()


def _to_host(tree: Any) -> Any:
    """Gathers all processes' rows of arrays as NumPy arrays."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, jax.device_get(tree))
