"""Describes the models of a run, and loads their tokenizers."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection, Mapping, Sequence
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
from kd_jax.objectives.objective import Objective
from kd_jax.objectives.pairwise import Pairwise
from kd_jax.objectives.vectors import NEGATIVE, POSITIVE
from kd_jax.precision import Policy
from kd_jax.tasks.task import Task

log = logging.getLogger(__name__)

TRAINED_HERE = "trained_here.txt"  # in the folder of a tokenizer that a run trained


def read(
    config: ConfigDict,
    folder: epath.Path | None,
    task: Task,
    policy: Policy,
    trained: Collection[str],
) -> tuple[dict[str, Blueprint], dict[str, Any]]:
    """Describes the models that have sections in the config, teachers first, and loads their
    tokenizers.

    Args:
        config: the run's config.
        folder: the run directory; None: well-known hub ids are described from the built-in table,
            no data is read, and there are no tokenizers.
        task: the task, without a tokenizer; trained models have its classes.
        policy: types to compute in.
        trained: the names of the models that stages train.
    """
    own, parts = config.tokenizer, config.mesh.fsdp * config.mesh.model

    def described(vocab_size: int | None) -> dict[str, Blueprint]:
        found = _describe(config, folder is None, task, policy, trained, vocab_size)
        # In all models alike, so that devices have parts of the same ids.
        rows = max(model.config.vocab_size for model in found.values())
        rows = -(-rows // parts) * parts if parts > 1 else 0
        return {name: dataclasses.replace(one, table_rows=rows) for name, one in found.items()}

    found = described(own.vocab_size if own.train else None)
    if folder is None:
        return found, {}
    if own.train:
        tokenizer = _trained_tokenizer(config, task, folder)
        found = described(len(tokenizer))
        tokenizers = dict.fromkeys(found, tokenizer)
    else:
        tokenizers = _tokenizers(config, found, task.of_examples)
    if task.of_examples:
        for name, model in found.items():
            check_vocabulary(name, model, tokenizers[name])
    else:
        check_shared(tokenizers["teacher"], found)
    return found, tokenizers


def _describe(
    config: ConfigDict,
    offline: bool,
    task: Task,
    policy: Policy,
    trained: Collection[str],
    vocab_size: int | None,
) -> dict[str, Blueprint]:
    teachers, found = names_of_teachers(config), {}
    others = [name for name in ("assistant", "student") if name in trained]
    for name in dict.fromkeys([*teachers, *others]):
        section = section_of(config, name)
        if name in teachers and name in trained and section.get("labels"):
            raise UserError(
                f"config.{key_of(config, name)}.labels: a stage trains {name}, on the task's own "
                f"classes; leave them out"
            )
        # A teacher that is not trained here keeps its classes, in its order.
        given = section.model and name in teachers and name not in trained and not offline
        unknown = offline and task.labels_in_data
        found[name] = blueprint.describe(
            section,
            key_of(config, name),
            task.head,
            policy,
            base=None if name in teachers else found["teacher"].hf_json,
            like=None if name in teachers else found["teacher"].config,
            labels=None if given or unknown else task.labels or None,
            execution=execution(config) | ({"remat": False} if name in teachers else {}),
            vocab_size=vocab_size,
            offline=offline,
        )
        if name in trained:
            own = task.noted_in(found[name].config)
            found[name] = dataclasses.replace(found[name], config=own)
    return found


def execution(config: ConfigDict) -> dict[str, Any]:
    """Reads how blocks run: remat, remat_keeps and scan of `ModelConfig`."""
    parts = config.mesh.fsdp * config.mesh.model
    scan = config.scan == "always" or (config.scan == "auto" and parts > 1)
    return {"remat": config.remat, "remat_keeps": config.remat_keeps, "scan": scan}


def names_of_teachers(config: ConfigDict) -> tuple[str, ...]:
    """Names the teachers of a run, `teacher` first."""
    return ("teacher", *config.get("teachers", {}))


def key_of(config: ConfigDict, name: str) -> str:
    """Returns the key of the section of the config that describes a model."""
    return f"teachers.{name}" if name in config.get("teachers", {}) else name


def section_of(config: ConfigDict, name: str) -> ConfigDict:
    """Finds the section of the config that describes a model."""
    return config.teachers[name] if name in config.get("teachers", {}) else config[name]


def _trained_tokenizer(config: ConfigDict, task: Task, folder: epath.Path) -> Any:
    """Loads the tokenizer that the run trains on its training text; trains it first if needed."""
    given, path = config.tokenizer, folder / "tokenizer"
    if "://" in os.fspath(path):
        raise UserError(
            f"tokenizer.train={given.train!r} needs a local --workdir, not {folder}: "
            f"train it there once, and set tokenizer.path to its folder"
        )
    if jax.process_index() == 0 and not path.exists():
        temporary = path.with_name("tokenizer.tmp")
        text = config.data.train
        texts = task.texts("train") if task.of_examples else source.read(text, "data.train")
        tokenizers.train_tokenizer(given.train, texts, given.vocab_size, temporary)
        (temporary / TRAINED_HERE).touch()
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


def _tokenizers(
    config: ConfigDict, models: Mapping[str, Blueprint], each_its_own: bool
) -> dict[str, Any]:
    """Loads each model's tokenizer: of config.tokenizer.path, else the teacher's; if models need
    not share one, that of the model's checkpoint."""
    named, path = None, config.tokenizer.path
    if path:
        where = Path(path).expanduser()
        named = tokenizers.load_tokenizer(
            where if where.is_dir() else hub.resolve(path, None, "tokenizer.path").path
        )
    if not each_its_own:
        folder = models["teacher"].folder
        if named is None and folder is None:
            raise UserError("set tokenizer.path, tokenizer.train, or teacher.model")
        return dict.fromkeys(models, named or tokenizers.load_tokenizer(folder))
    found: dict[str, Any] = {}
    for name, model in models.items():
        has_own = model.folder is not None and tokenizers.has_tokenizer(model.folder)
        found[name] = tokenizers.load_tokenizer(model.folder) if has_own else named
        if found[name] is None and name not in names_of_teachers(config):
            found[name] = found["teacher"]
        if found[name] is None:
            raise UserError(f"{name} {model.name} has no tokenizer: set tokenizer.path")
    return found


def check_shared(tokenizer: Any, models: Mapping[str, Blueprint]) -> None:
    """Raises UserError if models cannot share a tokenizer: their vocabularies may differ only in
    unused ids at the end."""
    for key, model in models.items():
        check_vocabulary(key, model, tokenizer, shared=True)
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
    """Warns if a model's original tokenizer encodes texts differently from the one it will use."""
    if not tokenizers.same_rules(theirs, tokenizer):
        log.warning("%s was trained on texts that its tokenizer cut otherwise than %s", name, whose)


def check_vocabulary(name: str, model: Blueprint, tokenizer: Any, shared: bool = False) -> None:
    """Raises UserError if a model's vocabulary is smaller than that of its tokenizer, which may be
    shared by all models."""
    size, own = max(tokenizer.get_vocab().values()) + 1, model.config.vocab_size
    if own >= size:
        return
    about = f"{name} {model.name} has a vocabulary of {own}, "
    if shared:
        raise UserError(
            f"{about}the tokenizer has ids up to {size - 1}: teacher and student must share the "
            f"tokenizer; set tokenizer.path to that of {model.name}, or choose another"
        )
    raise UserError(
        f"{about}its tokenizer has ids up to {size - 1}: they do not belong together; check the "
        f"tokenizer files in its folder, or tokenizer.path"
    )


def check_heads(name: str, model: Blueprint, parts: int) -> None:
    """Raises UserError if mesh.model does not divide what it splits."""
    for layer in range(model.config.num_layers):
        shape = model.config.shape(layer)
        sizes = {"key/value heads": shape.num_kv_heads, "FFN columns": shape.ffn_width}
        for what, size in sizes.items():
            if size % parts:
                raise UserError(
                    f"config.mesh.model={parts} does not divide the {size} {what} of {name} "
                    f"{model.name}; lower it"
                )


def check_terms(objective: Objective, key: str, parts: int, task: Task) -> None:
    """Raises UserError if a term compares attention heads, and mesh.model splits them, or needs
    more texts of an example than the task has."""
    for name, term in objective.vector_terms:
        if term.texts > task.shapes(1).labels.shape[0]:
            what = {POSITIVE: "positives", NEGATIVE: "negatives"}[term.texts - 1]
            raise UserError(
                f"config.{key}.{name} needs {what}, and the training texts have none; name their "
                f"column in config.task.columns, or leave the term out"
            )
    for name, term in objective.state_terms if parts > 1 else ():
        if isinstance(term, Pairwise):
            raise UserError(
                f"config.{key}.{name} compares attention heads, which mesh.model={parts} splits; "
                f"leave it out, or take mesh.fsdp"
            )


def check_types(name: str, model: Blueprint, tokenizer: Any, texts: Sequence[str]) -> None:
    """Raises UserError if the tokenizer gives `texts` (a text or a pair) token types for which the
    model has no embeddings."""
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
    """Finds the index of each of the task's classes among a model's; None if the orders agree.

    Args:
        model: name of the model, for messages.
        stated: names of the model's classes according to the user, in the model's order.
        labels: names of the model's classes in its config.json.
        task: the task's classes.
        where: the setting of `stated`, for messages.

    Raises UserError if the classes are not the same, or have no names (LABEL_0).
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
