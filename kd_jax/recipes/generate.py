"""Writes after a file of prompts or chats, with a causal model: a checkpoint, or a run's.

Prompts are written after some hundreds at a time, in batches of similar length. What is done is
kept next to the output, in its order, so that the same command continues after an interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd_jax import storage
from kd_jax.data import tokenizers
from kd_jax.data.chats import Template
from kd_jax.errors import UserError
from kd_jax.models.generate import Sampling
from kd_jax.ranges import Whole
from kd_jax.report import runs
from kd_jax.run import endings, provenance, subject
from kd_jax.run.run import build
from kd_jax.run.sampler import Text, TextWriter
from kd_jax.run.subject import Subject
from kd_jax.tasks import prediction
from kd_jax.tasks.prediction import Input
from kd_jax.train.progress import ProgressBar

AT_ONCE = 16  # batches, of prompts that are sorted by length and then kept


@dataclasses.dataclass(frozen=True)
class Options:
    """Optional settings; None takes the default."""

    text: str | None = None  # column of the prompt: "text"
    messages: str | None = None  # column of a chat: "messages", where there is one
    delimiter: str | None = None  # of a .csv or .tsv: see data/source.py
    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    samples: int = 1  # of each prompt
    seed: int = 0
    batch_size: int | None = None  # rows over all devices: 32
    precision: str | None = None  # fp32 | bf16: fp32, or the run's


class Prompts(NamedTuple):
    """The tokens of the prompts, and what ends what is written after them."""

    tokens: list[np.ndarray]  # int32
    place: Callable[[int], str]  # where prompt i stands, for messages
    stop: tuple[int, ...]
    ids: list | None  # of the column "id"


def generate_file(
    open_model: Callable[[], tuple[Subject, Mapping[str, Any]]],
    source: str,
    target: str,
    options: Options,
) -> dict[str, Any]:
    """Generates a continuation of each prompt of the file `source`, and writes them to the file
    `target`, JSON lines.

    Args:
        open_model: opens a causal model, as `checkpoint` or `stage_of` does.
        source: a file as `prediction.prompts` reads it.
        target: a .jsonl. A row has `index`, the number of the prompt from 0, `id` if the input has
            ids, `sample` if there are several of a prompt, `text`, `tokens` (how many), `ended`
            (by a stop token, not by the limit), and `logp`, the log-probability in nats.

    Returns {"model", "commit", "rows", "tokens" (written by this call), "seconds", "output"}.
    Raises UserError for mistakes before anything is computed or written.
    """
    began = time.perf_counter()
    read, written = Path(source).expanduser(), Path(target).expanduser()
    prediction.check_output(written, read, ("", ".jsonl"))
    Whole(least=1).check(options.samples, "--samples")
    Whole(least=0, most=2**32 - 1).check(options.seed, "--seed")
    rows = subject.rows(options.batch_size)
    own, trained = open_model()
    prompts = _read(read, own, options, trained)
    sampling = _sampling(options, prompts.stop)
    _check_lengths(prompts, own, options.max_new_tokens)
    model, mesh = own.frozen
    about = dict(
        model=own.digest,
        prompts=[tokens.tolist() for tokens in prompts.tokens],
        settings=[repr(sampling), options.samples, options.seed, prompts.ids],
    )
    rows = subject.rows_for(len(prompts.tokens) * options.samples, rows)
    lines = storage.Lines(written, about, options.samples)
    writer = TextWriter(model, mesh, sampling, options.seed, rows)
    numbers, tokens = np.arange(len(prompts.tokens) * options.samples), 0
    step = -(-rows * AT_ONCE // options.samples) * options.samples
    with contextlib.closing(ProgressBar("generate", lines.count, len(numbers))) as bar:
        for start in range(lines.count, len(numbers), step):
            chosen = numbers[start : start + step]
            each = [prompts.tokens[number // options.samples] for number in chosen]
            texts = writer.write(each, chosen)
            lines.append(_rows(chosen, texts, own.tokenizer, prompts, options))
            tokens += sum(len(text.tokens_N) for text in texts)
            bar.update(int(chosen[-1]) + 1, {}, tokens / (time.perf_counter() - began))
    lines.finish()
    return {
        "model": own.described.name,
        "commit": own.described.commit,
        "rows": len(numbers),
        "tokens": tokens,
        "seconds": round(time.perf_counter() - began, 1),
        "output": str(written),
    }


def checkpoint(
    model: str, revision: str | None, precision: str | None
) -> tuple[Subject, dict[str, Any]]:
    """Opens an HF checkpoint of a causal model: (it, config.task of its training, if known)."""
    own = subject.of_checkpoint(model, revision, "clm", precision)
    return own, provenance.trained(own.described.folder)


def stage_of(
    folder: str, stage: str | None, precision: str | None
) -> tuple[Subject, dict[str, Any]]:
    """Opens the model of a finished run's stage, or a teacher that the run loaded, by default the
    run's student: as `checkpoint`. Raises UserError if the run's models are not causal."""
    made = runs.read(folder)
    config = subject.for_these_devices(made.config, made.config["eval"]["batch_size"], precision)
    run = build(config, made.workdir)
    if run.head != "clm":
        raise UserError(f"{folder} is a run of task {config.task.name!r}, whose models write none")
    stage = stage or run.principal.name
    trained = [each.name for each in run.stages if each.name in made.stages]
    if stage not in trained and stage not in set(run.teachers) - set(run.trained):
        raise made.no_stage(stage, trained)
    return subject.of_run(run, stage), config.task.to_dict()


def _sampling(options: Options, stop: tuple[int, ...]) -> Sampling:
    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    found = Sampling(**{name: getattr(options, name) for name in names}, stop=stop)
    found.check("--")
    if options.samples > 1 and not found.temperature:
        raise UserError(
            f"--samples={options.samples} of a prompt would be the same: set --temperature above 0"
        )
    return found


def _read(path: Path, own: Subject, options: Options, trained: Mapping[str, Any]) -> Prompts:
    found, place, ids = prediction.prompts(path, options.text, options.messages, options.delimiter)
    stop = _stop(own, trained)
    if isinstance(found, Input):
        tokenizer = tokenizers.begun_by(own.tokenizer, trained.get("separator"))
        encoded = tokenizer(found.examples.first, verbose=False)["input_ids"]
        if tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
            encoded = [row[:-1] or row for row in encoded]  # by which the text would have ended
        return Prompts([np.array(row, np.int32) for row in encoded], place, stop, ids)
    template = Template(own.tokenizer)
    some = template.encode(found, template.prompt)
    tokens = [row.ids_N.astype(np.int32) for rows in some for row in rows]
    return Prompts(tokens, place, tuple({*stop, template.end_of_turn}), ids)


def _stop(own: Subject, trained: Mapping[str, Any]) -> tuple[int, ...]:
    """Finds the tokens that end a text: of the checkpoint's files, and of the tokenizer."""
    found = {own.tokenizer.eos_token_id} | endings.declared(own.described)
    if (trained.get("separator") or tokenizers.own_separator(own.tokenizer)) == "bos":
        found.add(own.tokenizer.bos_token_id)  # which begins the next text
    return tuple(sorted(found - {None}))


def _check_lengths(prompts: Prompts, own: Subject, new: int) -> None:
    """Raises UserError for a prompt that is empty, or after which so many new tokens do not fit."""
    for index, row in enumerate(prompts.tokens):
        if not len(row):
            where = prompts.place(index)
            raise UserError(f"{where}: the prompt has no tokens; it may begin with bos_token")
        most = own.described.config.most_written(len(row))
        if len(row) + new - 1 > most:  # nothing comes after the last one
            raise UserError(
                f"{prompts.place(index)}: the prompt has {len(row)} tokens, and --max_new_tokens="
                f"{new} more do not fit into the {most} positions of the model; shorten it, or "
                "write fewer"
            )


def _rows(
    numbers: np.ndarray,
    texts: Sequence[Text],
    tokenizer: Any,
    prompts: Prompts,
    options: Options,
) -> list[dict[str, Any]]:
    found = []
    for number, text in zip(numbers.tolist(), texts, strict=True):
        index, sample = divmod(number, options.samples)
        said = _said(tokenizer, prompts.tokens[index], text.tokens_N)
        row = {"index": index} | ({} if prompts.ids is None else {"id": prompts.ids[index]})
        row |= {"sample": sample} if options.samples > 1 else {}
        row |= {"text": said, "tokens": len(text.tokens_N), "ended": text.ended}
        found.append(row | {"logp": round(text.logp, 4)})
    return found


def _said(tokenizer: Any, prompt: np.ndarray, tokens_N: np.ndarray) -> str:
    """Decodes what stands after a prompt; alone, it might lose the space at its beginning."""
    both = [np.concatenate([prompt, tokens_N]), prompt, tokens_N]
    whole, asked, alone = tokenizer.batch_decode(both, skip_special_tokens=True)
    return whole[len(asked) :] if whole.startswith(asked) else alone
