"""Trains a model on texts that the teacher writes once: sequence-level distillation.

Kim and Rush 2016, "Sequence-Level Knowledge Distillation", arXiv:1606.07947. The teacher continues
prompts of the training text (run/prompts.py); its words, up to the end of the text, are the labels.
By default cross-entropy is all; with terms in config.objective the teacher runs in the step too.

What is written is kept in the cache, by the prompts, the teacher's parameters and the settings, a
thousand prompts at a time: a run that was interrupted goes on there, and other runs find it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from kd_jax.data import cache, encoded
from kd_jax.data.loader import Stream
from kd_jax.data.splits import HELD_OUT_SEED
from kd_jax.errors import UserError
from kd_jax.metrics import flops
from kd_jax.models.generate import Sampling
from kd_jax.ranges import Real, Whole
from kd_jax.run import stage, text_logits
from kd_jax.run.own_text import OwnText
from kd_jax.run.prompts import beginnings
from kd_jax.run.run import Run
from kd_jax.run.sampler import TextWriter
from kd_jax.run.stage import Settings, Stage, StepInputs
from kd_jax.run.teaching import TeacherLogits
from kd_jax.tasks.task import batch_shapes
from kd_jax.train.progress import ProgressBar
from kd_jax.types import Batch

log = logging.getLogger(__name__)

SETTINGS = dict(
    prompts=Whole(least=0, default=0),  # how many are continued; 0: as many as the steps read once
    prompt_tokens=Whole(least=1, default=16),  # of a document; of a chat at most
    samples=Whole(least=1, default=1),  # texts of each prompt
    max_new_tokens=Whole(least=1, default=128),
    temperature=Real(least=0, default=1.0),  # of writing; 0: greedy
    top_k=Whole(least=0, default=0),  # 0: all
    top_p=Real(above=0, most=1, default=1.0),
    seed=Whole(least=0, most=2**32 - 1, default=0),  # of the draws, the same in runs of any seed
    least_tokens=Whole(least=1, default=1),  # shorter texts are left out
    ended_only=False,  # leaves out texts that were cut off at max_new_tokens
)
_VERSION = 2  # of what is kept: raise it when writing changes
_SETTING = "config.cache.folder"
AT_ONCE = 1024  # prompts whose texts are kept together


def make(run: Run, name: str, settings: Settings) -> Stage:
    """Makes the stage that trains on the teacher's texts."""
    own, teacher = settings.own, run.models[run.teachers[0]]
    where = f"config.stages.{name}"
    if run.head != "clm":
        raise UserError(f"{where}: models of task {run.config.task.name!r} write no text")
    if own["samples"] > 1 and not own["temperature"]:
        raise UserError(f"{where}.samples={own['samples']} texts would be the same: temperature=0")
    for model in (teacher, run.models[settings.model]):
        room = model.config.most_written(own["prompt_tokens"])
        if _length(settings) > room:
            raise UserError(
                f"{where}: prompt_tokens + max_new_tokens are {_length(settings)}, but "
                f"{model.name} has positions for {room}; lower one of them"
            )
    # Without terms the teacher's words alone are learned.
    terms = settings.objective if run.config.get(settings.objective) else ""
    found = stage.make(
        run,
        dataclasses.replace(settings, objective=terms),
        batches_of=_batches,
        step_inputs=_step_inputs,
        prompt_tokens=own["prompt_tokens"],
        own_text=OwnText if "rollout" in run.config else None,
        more_training={"training_flops": _flops_of_writing(run, settings)},
    )
    if text_logits.are_kept(run, found):
        raise UserError(f"{where}: config.cache.logits are of the training text; leave it empty")
    return found


def _length(settings: Settings) -> int:
    """Returns the tokens of a row, at most."""
    return settings.own["prompt_tokens"] + settings.own["max_new_tokens"]


def _count(settings: Settings) -> int:
    """Returns how many prompts are continued, at most."""
    return settings.own["prompts"] or -(
        -settings.steps * settings.batch_size // settings.own["samples"]
    )


def _flops_of_writing(run: Run, settings: Settings) -> int:
    own, teacher = settings.own, run.models[run.teachers[0]].counted()
    rows = _count(settings) * own["samples"]
    return flops.forward(teacher, rows, _length(settings), own["max_new_tokens"])


def _step_inputs(run: Run, this: Stage) -> StepInputs:
    whole = stage.with_teacher(run, this)
    return whole._replace(batch=batch_shapes(this.batch_size, _length(this), _length(this)))


def _batches(run: Run, this: Stage, logits: TeacherLogits) -> tuple[Any, Stream]:
    """Returns the teacher, where the objective needs it, and batches of the texts."""
    texts = _kept(written(run, this, logits), this)
    stream = Stream(
        len(texts.prompts),
        lambda ids_B, _: texts.batch(ids_B, _length(this)),
        this.batch_size,
        seed=run.config.seed,
        **run.processes,
    )
    return (logits.model(this.teachers[0]) if this.learns else None), stream


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts that a model wrote, and the prompts before them."""

    prompts: list[np.ndarray]  # int32
    tokens: list[np.ndarray]  # int32, with the token that ended each
    ended_N: np.ndarray  # bool: whether one did

    def batch(self, ids_B: np.ndarray, length: int) -> Batch:
        """Makes rows: what was written has weight 1, the prompts have none."""

        rows = ([encoded.continued(self.prompts[i], self.tokens[i])] for i in ids_B)
        return encoded.batch(ids_B, rows, length, several=False)


def written(run: Run, this: Stage, logits: TeacherLogits) -> Texts:
    """Returns the teacher's texts, from the cache, or written now; all processes get all."""
    own, name = this.own, this.teachers[0]
    prompts = beginnings(run, this, own["prompt_tokens"], "train")
    # One order for all seeds and lengths of training, so that runs find each other's texts.
    order_N = np.random.Generator(np.random.Philox(HELD_OUT_SEED)).permutation(len(prompts))
    tokens_NT, lengths_N = prompts.padded(order_N[: _count(this)], own["prompt_tokens"])
    rows = [row[:length] for row, length in zip(tokens_NT, lengths_N, strict=True)]
    stop = {run.task.end_of_text, run.tokenizers[name].eos_token_id} - {None}
    how = {key: own[key] for key in ("max_new_tokens", "temperature", "top_k", "top_p")}
    sampling = Sampling(**how, stop=tuple(sorted(stop)))

    @functools.cache
    def writer() -> TextWriter:  # only where there is something to write
        rows = run.config.eval.batch_size
        return TextWriter(logits.model(name), run.mesh, sampling, own["seed"], rows)

    about = text_logits.identity_of(run, name, logits.given[name]), sampling, own["samples"]
    before = collections.Counter()  # how often a prompt has come
    texts: list[tuple[np.ndarray, int]] = []
    for row in rows:
        texts += [(row, before[row.tobytes()] + sample) for sample in range(own["samples"])]
        before[row.tobytes()] += own["samples"]
    found: list[list[np.ndarray]] = []
    ids = 1 + max(run.task.tokenizer.get_vocab().values())
    bar = ProgressBar(f"texts of {name}", 0, len(rows), quiet=jax.process_index() > 0)
    with contextlib.closing(bar):
        for start in range(0, len(rows), AT_ONCE):
            part = texts[start * own["samples"] : (start + AT_ONCE) * own["samples"]]
            key = cache.key(
                _VERSION, *about, own["seed"], *((p.tobytes().hex(), n) for p, n in part)
            )
            entry = _folder(run) / f"texts-{key}"
            found.append(_once(entry, functools.partial(_write, writer, part, ids), ids))
            bar.update(min(start + AT_ONCE, len(rows)), {}, 0.0)
    tokens_F, counts_N, ended_N = map(np.concatenate, zip(*found, strict=True))
    tokens = np.split(tokens_F, np.cumsum(counts_N)[:-1])
    return Texts([prompt for prompt, _ in texts], tokens, ended_N)


def _folder(run: Run) -> Path:
    root = cache.folder(text_logits.cache_settings(run)["folder"]) / "texts"
    if jax.process_count() > 1:
        root /= f"process_{jax.process_index()}_of_{jax.process_count()}"
    return root


def _write(
    writer: Callable[[], TextWriter], texts: list[tuple[np.ndarray, int]], ids: int, entry: Path
) -> None:
    """Writes after prompts, of which equal ones have other numbers, into a folder. A text is cut
    off at a token that the tokenizer lacks, from `ids` on: a teacher may have rows for more."""
    prompts = [prompt for prompt, _ in texts]
    found = writer().write(prompts, [_number(*each) for each in texts])
    known = [int(np.argmax([*text.tokens_N, ids] >= np.int32(ids))) for text in found]
    ended = [text.ended and n == len(text.tokens_N) for text, n in zip(found, known, strict=True)]
    tokens = [text.tokens_N[:n] for text, n in zip(found, known, strict=True)]
    np.save(entry / "tokens.npy", np.concatenate(tokens))
    np.save(entry / "counts.npy", np.array(known))
    np.save(entry / "ended.npy", np.array(ended))


def _number(prompt: np.ndarray, sample: int) -> int:
    """Numbers a text for its draws by what it continues, and as which of the texts of such prompts,
    and not by its place among others."""
    digest = hashlib.blake2b(prompt.tobytes() + sample.to_bytes(4, "little"), digest_size=4)
    return int.from_bytes(digest.digest(), "little") >> 1


def _once(entry: Path, write: Callable[[Path], None], ids: int) -> list[np.ndarray]:
    """Reads an entry of the cache, written now unless it is there: tokens below `ids`, counts,
    ends."""
    if jax.process_count() > 1:  # each has its own entries, and all write together
        if not multihost_utils.process_allgather(np.array(cache.whole(entry))).all():
            cache.remove(entry, _SETTING)
    cache.once(entry, write, _SETTING)
    tokens_F, *others = (np.load(entry / f"{name}.npy") for name in ("tokens", "counts", "ended"))
    cache.check_ids(tokens_F, ids, entry)
    return [tokens_F, *others]


def _kept(texts: Texts, this: Stage) -> Texts:
    """Leaves out texts that are too short or were cut off, as the settings say."""
    own, ended_N = this.own, texts.ended_N
    lengths_N = np.array([len(row) for row in texts.tokens])
    kept_N = (lengths_N >= own["least_tokens"]) & (ended_N | (not own["ended_only"]))
    log.info(
        "%s: %s texts of %s have %.1f tokens on average, %.1f%% of them end within %d; %s are "
        "learned",
        *(this.name, f"{len(ended_N):,}", this.teachers[0], lengths_N.mean()),
        *(100 * ended_N.mean(), own["max_new_tokens"], f"{kept_N.sum():,}"),
    )
    if not kept_N.any():
        raise UserError(
            f"config.stages.{this.name}: no text has {own['least_tokens']} tokens"
            f"{' and an end' if own['ended_only'] else ''}; raise max_new_tokens, or change "
            f"least_tokens or ended_only"
        )
    some = np.flatnonzero(kept_N)
    rows = ([each[row] for row in some] for each in (texts.prompts, texts.tokens))
    return Texts(*rows, ended_N[some])
