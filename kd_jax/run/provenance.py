"""Records a model's training data, and how its text became rows, in kd_jax.json in its folder.

    task      config.task of the run with every default: name, seq_len, separator, columns, ...
    template  digest of the chat template, for chats
    data      split -> name, digest, commit and size of its text

Every export of a run has one, and `evaluate` turns text into rows in the same way.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from kd_jax import plugins, storage
from kd_jax.data import tokenizers
from kd_jax.errors import UserError
from kd_jax.ranges import settings
from kd_jax.tasks.task import Task

log = logging.getLogger(__name__)

FILE = "kd_jax.json"

Provenance = dict[str, Any]  # see above


def of_run(config: Mapping, results: Mapping, tokenizer: PreTrainedTokenizerBase) -> Provenance:
    """Describes the training text of a run, from its config.json and results.json."""
    task, data = _complete(config["task"]), config["data"]

    def public(split: str, about: Mapping) -> dict[str, Any]:
        source = data.get(split) or data.get("train") or {"source": "hub"}  # a task's own data
        if source.get("source", "files") != "files":
            return dict(about)
        # Files without the folders in which they lie on this machine.
        return {**about, "name": re.sub(r"[^\s,]*/", "", about["name"])}

    found = {"task": task, "data": {k: public(k, v) for k, v in results["data"].items()}}
    of_chats = _class_of(task).of_chats
    return found | ({"template": _digest(tokenizer)} if of_chats else {})


def read(folder: Path | None) -> Provenance | None:
    """Reads the kd_jax.json of a model's folder; None if there is none.

    Raises UserError if the file is damaged, or names a task or settings that kd_jax lacks.
    """
    file = Path(folder or "", FILE)
    if folder is None or not file.exists():
        return None
    found = storage.read_json(file)
    try:
        if not isinstance(found, dict) or not isinstance(found.get("task"), dict):
            raise UserError("no object `task` in it")
        return found | {"task": _complete(found["task"])}
    except UserError as error:
        raise UserError(
            f"{file}: {error}; restore or remove it, then flags say how text becomes rows"
        ) from None


def task_of(
    folder: Path | None, name: str, given: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Chooses config.task to evaluate the model in `folder`: keys of `given` that are not None,
    else those of the model's training, if on the same task. Logs which."""
    found = read(folder) or {}
    own = found["task"] if found and found["task"]["name"] == name else {}
    given = {key: value for key, value in given.items() if value is not None}
    if own:
        log.info("text becomes rows as in the model's training: %s", sentence(own | given))
    if "template" in found and own and found["template"] != _digest(tokenizer):
        log.warning("the tokenizer's chat template is not the one of the model's training")
    if "separator" in _class_of({"name": name}).defaults and "separator" not in own | given:
        given["separator"] = tokenizers.own_separator(tokenizer)
        begins = given["separator"] == "bos"
        why = "with which the tokenizer begins texts" if begins else "which ends texts"
        log.info(
            "documents are joined by %s, %s: nothing says what the model was trained with. "
            "--separator=eos or bos chooses",
            *(getattr(tokenizer, f"{given['separator']}_token"), why),
        )
    return own | {"name": name} | given


def trained(folder: Path | None) -> dict[str, Any]:
    """Reads config.task of the training of the model in `folder`; {} if it is unknown."""
    return (read(folder) or {"task": {}})["task"]


def sentence(task: Mapping[str, Any]) -> str:
    """Describes in a sentence how a task turns text into rows."""
    return ", ".join(f"{key} {value}" for key, value in task.items() if value is not None)


def _complete(task: Mapping[str, Any]) -> dict[str, Any]:
    return settings(task, _class_of(task).defaults, "task")


def _class_of(task: Mapping[str, Any]) -> type[Task]:
    return plugins.load("tasks", str(task.get("name")), "make").make


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    template = str(tokenizer.chat_template).encode()
    return hashlib.blake2b(template, digest_size=8).hexdigest()
