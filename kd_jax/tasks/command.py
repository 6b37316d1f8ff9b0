"""Finds tasks by their names on command lines: "squad", "glue/sst2", "text".

A task's class defines the names by its `alias` and `variants`, and its settings by `defaults`. A
new task needs nothing but its module in kd_jax/tasks.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from kd_jax import plugins
from kd_jax.errors import UserError
from kd_jax.tasks.likelihood import LikelihoodTask
from kd_jax.tasks.task import Task

TaskClass = type[Task] | type[LikelihoodTask]


def tasks() -> dict[str, TaskClass]:
    """Lists all task classes by name: tasks on examples, language modelling, and tasks that are
    scored by likelihood."""
    found = []
    for mark in ("make", "scoring"):
        for module in plugins.names("tasks", mark):
            task = getattr(plugins.load("tasks", module, mark), mark)
            found.append((task.alias or module, task))
    kinds = [lambda t: t.of_examples, lambda t: not t.by_likelihood, lambda t: True]
    return dict(sorted(found, key=lambda each: [kind(each[1]) for kind in kinds].index(True)))


def names(variants: bool = False) -> list[str]:
    """Lists the names of all tasks: "glue/TASK", or with `variants` "glue/sst2" and the others."""
    found = []
    for name, task in tasks().items():
        if not task.variants or _of_several(task):
            found.append(name)
        if task.variants:
            ends = task.variants if variants else [task.variant.upper()]
            found += [f"{name}/{end}" for end in ends]
    return found


def find(name: str) -> TaskClass:
    """Finds the class of a task by its name. UserError suggests names similar to an unknown one."""
    known = names(variants=True)
    kind = name.partition("/")[0]
    if name in known:
        return tasks()[kind]
    wanted = re.sub("[-_ ]", "", name.lower())
    meant = [each for each in known if wanted in each.lower().split("/")]
    ends = {each.rpartition("/")[2].lower(): each for each in known}
    meant = meant or [ends[end] for end in difflib.get_close_matches(wanted, ends)]
    meant = meant or difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {' or '.join(meant)}?)" if meant else ""
    have = [each for each in known if "/" in name and each.startswith(f"{kind}/")] or names()
    raise UserError(f"--task={name}: no such task{hint}; have: {', '.join(have)}")


def reads(task: TaskClass, flag: str, name: str = "") -> bool:
    """Tells whether a task, by a name with or without a variant, reads a command-line flag."""
    if flag == "seq_len":  # of examples, a row may be shorter than in training
        return not task.of_examples
    column = flag == "text" and (task.of_text or "column" in task.defaults)
    unread = task.unread.get(name.partition("/")[2], ())
    return (column or flag in task.defaults) and flag not in unread


def config(name: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Makes config.task of a task from the flags that are given and that the task reads."""
    task, part = find(name), name.partition("/")[2]
    found = {"name": task.defaults["name"]}
    if part:
        found[task.variant] = (part,) if _of_several(task) else part
    # Flags that only some tasks know are passed to all, which refuse them; likelihoods get the
    # separator from elsewhere.
    strict = {"stride", "documents"} | ({"separator"} if not task.by_likelihood else set())
    given = {
        key: value
        for key, value in flags.items()
        if value is not None and (key in strict or reads(task, key))
    }
    if task.of_text or "column" in task.defaults:
        text = given.pop("text", None)
        given |= {"column": text} if text and not task.of_text else {}
    return found | given


def source(task: TaskClass, data: str, text: str | None) -> dict[str, str]:
    """Makes a source of a local file, folder or glob."""
    column = {"text": text} if text and task.of_text else {}
    return {"source": "files", "path": data} | column


def build(
    name: str, config: Mapping[str, Any], data: Mapping[str, Any] | None, tokenizer: Any = None
) -> Any:
    """Makes the task called `name`, on one split, config.data.test; None: the split that the task
    reports by default.

    Raises UserError for settings that the task does not have, and if it needs `data`.
    """
    task = find(name)
    if task.by_likelihood:
        return task(config, {"test": data})
    if data is None and task.own_data is None and task.of_examples:
        raise UserError(f"--task={name} needs --data, a local file or folder")
    given = None if data is None else {"test": data}
    config = task.evaluated | {key: value for key, value in config.items() if value is not None}
    made = task(config, given, tokenizer)
    if given and made.labels_in_data:  # the classes are those that occur
        return task(config, given | {"train": data}, tokenizer)
    return made


def _of_several(task: TaskClass) -> bool:
    """Tells whether a task can run several variants at once (all of them if none is named)."""
    return bool(task.variants) and isinstance(task.defaults[task.variant], tuple)
