"""Finds the tokens that end what a model writes, and checks that models of a run agree on them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from kd_jax.errors import UserError
from kd_jax.models.blueprint import Blueprint
from kd_jax.storage import read_json

if TYPE_CHECKING:
    from kd_jax.run.run import Run

log = logging.getLogger(__name__)

_FILES = ("config.json", "generation_config.json")  # that may name tokens that end a text


def of(run: Run, model: str, teacher: str) -> tuple[int, ...]:
    """Lists the ids of tokens that end a completion of `model`: the end of the data's turns or
    documents, the model's own ends, and those of config.rollout.stop.

    Raises UserError if the chat template ends a turn with a token that the teacher, by its own
    files, does not end its turns with, unless the run trains it, and config.rollout.stop is empty:
    it would find every end improbable, and the student would learn never to stop.
    """
    tokenizer, stop = run.tokenizers[model], run.task.end_of_text
    extra = [_token(tokenizer, name) for name in run.config.rollout.stop]
    theirs = set() if teacher in run.trained else declared(run.models[teacher])
    if run.task.of_chats and not extra and theirs and stop not in theirs:
        end, own = (tokenizer.convert_ids_to_tokens(each) for each in (stop, min(theirs)))
        raise UserError(
            f"the chat template ends a turn with {end!r}, {teacher} {run.models[teacher].name} "
            f"with {own!r}: it would teach the student never to stop; take a teacher that was "
            f"trained on this template, or name all tokens that end a turn in config.rollout.stop"
        )
    return tuple(sorted({stop, *extra, *declared(run.models[model])}))


def _token(tokenizer, name: str) -> int:
    if name not in (vocabulary := tokenizer.get_vocab()):
        raise UserError(f"config.rollout.stop: {name!r} is no token of the tokenizer")
    return vocabulary[name]


def declared(model: Blueprint) -> set[int]:
    """Reads the ids that a checkpoint declares as ends of its texts: eos_token_id."""
    found: set[int] = set()
    for name in _FILES if model.folder else ():
        file = Path(model.folder) / name
        ids = read_json(file).get("eos_token_id") if file.exists() else None
        found |= set(ids if isinstance(ids, list) else [ids]) - {None}
    return {number for number in found if number < model.config.vocab_size}


def warn_of_new_template(run: Run, model: str, follows: str) -> None:
    """Warns where a model is to write chats whose template it has never seen; `follows`: the stage
    that it goes on from, if any."""
    folder, init = run.models[model].folder, run.section(model).init
    if not run.task.of_chats or follows:
        return
    if init == "scratch":
        why = "begins as random numbers"
    elif init == "model" and folder and not _has_template(Path(folder)):
        why = "comes without a chat template"
    else:
        return
    log.warning(
        "%s %s, so what it writes in the template is no answer at first: train it on the data's "
        "answers before (a stage of the kind plain, and `after`), or raise rollout.lambda from 0",
        *(model, why),
    )


def _has_template(folder: Path) -> bool:
    file = folder / "tokenizer_config.json"
    given = read_json(file) if file.exists() else {}
    return bool(given.get("chat_template")) or (folder / "chat_template.jinja").exists()
