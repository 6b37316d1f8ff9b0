"""Describes the models of a run, and reads the tokenizers that they read with."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from kd_jax import hub
from kd_jax.data import source, tokenizers
from kd_jax.errors import UserError
from kd_jax.models import blueprint
from kd_jax.models.blueprint import Blueprint
from kd_jax.precision import Policy
from kd_jax.run import workdir
from kd_jax.tasks.task import Task

log = logging.getLogger(__name__)


def describe(
    config: ConfigDict,
    task: Task,
    policy: Policy,
    trained: Sequence[str],
    vocab_size: int | None,
    offline: bool,
) -> dict[str, Blueprint]:
    """Describes the models that the config has sections of, the teachers first.

    Args:
        config: the run's.
        task: without a tokenizer; a model that is trained has its classes.
        policy: types to compute in.
        trained: the names of the models that stages train.
        vocab_size: of the run's own tokenizer, where it trains one.
        offline: describe well-known hub ids from the built-in table, read no data.
    """
    teachers = names_of_teachers(config)
    found: dict[str, Blueprint] = {}
    others = [name for name in ("assistant", "student") if name in trained]
    for name in dict.fromkeys([*teachers, *others]):
        section = section_of(config, name)
        # A teacher that is taken as it is has classes of its own, in its own order.
        given = section.model and name in teachers and name not in trained and not offline
        unknown = offline and task.labels_in_data
        found[name] = blueprint.describe(
            section,
            key_of(config, name),
            task.head,
            policy,
            base=None if name in teachers else found["teacher"].hf_json,
            labels=None if given or unknown else task.labels or None,
            remat=config.remat and name not in teachers,
            vocab_size=vocab_size,
            offline=offline,
        )
    return found


def names_of_teachers(config: ConfigDict) -> tuple[str, ...]:
    """The teachers of a run, `teacher` first."""
    return ("teacher", *config.get("teachers", {}))


def key_of(config: ConfigDict, name: str) -> str:
    """Where the config describes a model."""
    return f"teachers.{name}" if name in config.get("teachers", {}) else name


def section_of(config: ConfigDict, name: str) -> ConfigDict:
    """The section of the config that describes a model."""
    return config.teachers[name] if name in config.get("teachers", {}) else config[name]


def trained_tokenizer(config: ConfigDict, task: Task, folder: epath.Path) -> Any:
    """The run's own tokenizer, trained on its training text where it is not there yet."""
    given, path = config.tokenizer, folder / "tokenizer"
    if "://" in os.fspath(path):
        raise UserError(
            f"tokenizer.train={given.train!r} needs a local --workdir, not {folder}: "
            f"train it there once, and set tokenizer.path to its folder"
        )
    if jax.process_index() == 0 and not path.exists():
        temporary = path.with_name("tokenizer.tmp")
        tokenizers.train_tokenizer(given.train, _texts(config, task)(), given.vocab_size, temporary)
        (temporary / workdir.TRAINED_HERE).touch()
        temporary.rename(path)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("tokenizer")
    try:
        return tokenizers.load_tokenizer(path)
    except Exception as error:  # whatever a damaged file leads to
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is damaged ({reason}): remove it, and it is trained again"
        ) from error


def _texts(config: ConfigDict, task: Task) -> Callable[[], Iterable[str]]:
    if task.of_examples:
        return lambda: task.texts("train")
    return lambda: source.read(config.data.train, "data.train")


def shared_tokenizer(config: ConfigDict, models: Mapping[str, Blueprint]) -> Any:
    """The tokenizer that all models read with: of a folder or hub id, or the teacher's."""
    if named := _named(config):
        return named
    if models["teacher"].folder is None:
        raise UserError("set tokenizer.path, tokenizer.train, or teacher.model")
    return tokenizers.load_tokenizer(models["teacher"].folder)


def own_tokenizers(config: ConfigDict, models: Mapping[str, Blueprint]) -> dict[str, Any]:
    """Each model's tokenizer: its checkpoint's own, the config's, or the teacher's."""
    named, found = _named(config), {}
    for name, model in models.items():
        own = model.folder is not None and tokenizers.has_tokenizer(model.folder)
        found[name] = tokenizers.load_tokenizer(model.folder) if own else named
        if found[name] is None and name not in names_of_teachers(config):
            found[name] = found["teacher"]
        if found[name] is None:
            raise UserError(f"{name} {model.name} has no tokenizer: set tokenizer.path")
    return found


def _named(config: ConfigDict) -> Any:
    """The tokenizer of config.tokenizer.path, None where there is none."""
    if not config.tokenizer.path:
        return None
    where = Path(config.tokenizer.path).expanduser()
    if not where.is_dir():
        where = hub.resolve(config.tokenizer.path, None, "tokenizer.path").path
    return tokenizers.load_tokenizer(where)


def check_shared(tokenizer: Any, models: Mapping[str, Blueprint]) -> None:
    """Raises UserError where the models cannot read with one tokenizer: their vocabularies may
    differ in padding rows only."""
    size = max(tokenizer.get_vocab().values()) + 1
    for key, model in models.items():
        if model.config.vocab_size < size:
            raise UserError(
                f"{key} {model.name} has a vocabulary of {model.config.vocab_size}, the "
                f"tokenizer has ids up to {size - 1}: teacher and student must share the "
                f"tokenizer; set tokenizer.path to that of {model.name}, or choose another"
            )
    for key, model in models.items():
        if model.folder is None or not tokenizers.has_tokenizer(model.folder):
            continue
        theirs = tokenizers.load_tokenizer(model.folder)
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"{key} {model.name} was trained with another tokenizer than the run's: the "
                f"same ids would mean other words; choose teacher and student of one vocabulary"
            )
        compare_rules(f"{key} {model.name}", theirs, tokenizer, "the run's")


def compare_rules(name: str, theirs: Any, tokenizer: Any, whose: str) -> None:
    """Warns where a model's own tokenizer cuts texts otherwise than the one it is to read with."""
    if not tokenizers.same_rules(theirs, tokenizer):
        log.warning("%s was trained on texts that its tokenizer cut otherwise than %s", name, whose)


def check_vocabulary(name: str, model: Blueprint, tokenizer: Any) -> None:
    """Raises UserError where a model has fewer tokens than the tokenizer that it reads with."""
    size = max(tokenizer.get_vocab().values()) + 1
    if model.config.vocab_size < size:
        raise UserError(
            f"{name} {model.name} has a vocabulary of {model.config.vocab_size}, its tokenizer "
            f"has ids up to {size - 1}: they do not belong together; check the tokenizer files "
            f"in its folder, or tokenizer.path"
        )


def check_types(name: str, model: Blueprint, tokenizer: Any, texts: Sequence[str]) -> None:
    """Raises UserError where the tokenizer gives a row of `texts`, a text or a pair, token types
    that the model has no embeddings for."""
    have = getattr(model.config, "num_types", 0)  # 0: the family does not look at them
    most = max(tokenizer(*texts, verbose=False).get("token_type_ids", [0]))
    if 0 < have <= most:
        raise UserError(
            f"{name} {model.name} has {have} token types (type_vocab_size), its tokenizer gives "
            f"pairs of texts the types 0 to {most}: they do not belong together; check the "
            f"tokenizer files in its folder, or tokenizer.path"
        )


def class_order(
    model: str,
    stated: Sequence[str] | None,
    labels: Sequence[str],
    task: Sequence[str],
    where: str,
) -> tuple[int, ...] | None:
    """Where each of the task's classes stands among a model's; None where they agree.

    Args:
        model: its name, for messages.
        stated: names that the user gives to the model's classes, in its own order.
        labels: the names that its config.json has.
        task: the task's classes.
        where: the setting of `stated`, for messages.

    Raises UserError where the classes are not the same, or have no names (LABEL_0).
    """
    theirs = tuple(stated or labels)
    if not len(theirs) == len(labels) == len(task):
        raise UserError(
            f"{model} has {len(labels)} classes ({', '.join(labels)}), the task {len(task)} "
            f"({', '.join(task)}){f', {where} {len(theirs)}' if stated else ''}"
        )
    if theirs == tuple(task):
        return None
    folded = [name.casefold() for name in theirs]
    if {name.casefold() for name in task} != set(folded):
        raise UserError(
            f"{model} calls its classes {', '.join(theirs)}, the task {', '.join(task)}: give the "
            f"model's class names, in its own order, in {where}"
        )
    return tuple(folded.index(name.casefold()) for name in task)
