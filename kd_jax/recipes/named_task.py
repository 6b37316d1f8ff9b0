"""A task by the name that command lines give it (glue/sst2, text, perplexity), and its flags.

The module of the task says all: its DEFAULTS are the settings that flags may set, and where it has
NAMED = (key, values), KIND/VALUE sets that key.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedTokenizerBase

from kd_jax import plugins
from kd_jax.errors import UserError
from kd_jax.report import runs
from kd_jax.run import provenance

# Flags that set what config.task calls by the same name, where the task has it.
SETTINGS = ("pair", "label", "labels", "separator", "seq_len", "stride", "documents")
COLUMNS = ("text", "pair", "label")

# What messages of the recipes call what a flag sets: the flag, regex, and its name here.
_NAMES = (
    ("data", r"config\.data\.cache_dir or KD_JAX_CACHE", "KD_JAX_CACHE"),
    ("data", r"(config\.)?data\.(train|validation|test)(\.path)?|config\.data", "--data"),
    ("text", r"config\.task\.column|text=(?= to)", "--text"),
    ("task", r"config\.task\.name='labelled_text'", "--task=text"),
    ("task", r"config\.task\.(name|task|level|classes)", "--task"),
    ("batch_size", r"(config\.)?(eval\.)?batch_size", "--batch_size"),
    ("precision", r"config\.precision", "--precision"),
    *((name, rf"config\.task\.{name}", f"--{name}") for name in (*SETTINGS, "text")),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be left (None) to the run, to what is known of the model's training, or else to a
    default."""

    teacher: str | None = None  # language modelling: folder or hub id; the run's, else none
    text: str | None = None  # column of the text, or of the messages of chats
    pair: str | None = None  # task "text": column of a second text
    label: str | None = None  # task "text": column of the label
    labels: tuple[str, ...] | None = None  # classes in the order of the logits: config.json's
    separator: str | None = None  # eos | bos, before every text: clm, and by likelihood
    seq_len: int | None = None  # tokens of a row; by likelihood: that the model reads at once, else
    # all that it can, of a text (perplexity) as many as a row of its training had
    stride: int | None = None  # perplexity: half of seq_len
    documents: str | None = None  # perplexity: joined | alone: joined
    batch_size: int | None = None  # rows over all devices
    precision: str | None = None  # fp32 | bf16: the run's, else fp32


def options(args: argparse.Namespace) -> Options:
    """Reads the flags that are options."""
    return Options(**{each.name: getattr(args, each.name) for each in dataclasses.fields(Options)})


def by_likelihood(task: str) -> bool:
    """Tells whether a task is scored by likelihood."""
    return task.partition("/")[0] in plugins.names("tasks", "scoring")


def module_of(task: str) -> ModuleType:
    """Finds the module of a task."""
    kind = task.partition("/")[0]
    kind = "labelled_text" if kind == "text" else kind
    return plugins.load("tasks", kind, "scoring" if by_likelihood(task) else "make")


def all_names(whole: bool = True) -> list[str]:
    """Lists the names of all tasks, such as glue/sst2; or not `whole`, glue/TASK."""
    found = []
    for mark in ("make", "scoring"):
        for kind in plugins.names("tasks", mark):
            module = plugins.load("tasks", kind, mark)
            key, values = getattr(module, "NAMED", ("", ()))
            if not key or isinstance(module.DEFAULTS[key], tuple):  # by default all of them
                found.append("text" if kind == "labelled_text" else kind)
            found += [f"{kind}/{each}" for each in (values if whole else [key.upper()]) if each]
    return found


def check_name(task: str) -> None:
    """Raises UserError for a task that there is not, and names those that may be meant."""
    known = all_names()
    if task in known:
        return
    wanted = re.sub("[-_ ]", "", task.lower())
    meant = [name for name in known if wanted in (name.lower().split("/"))]
    ends = {name.rpartition("/")[2].lower(): name for name in known}
    meant = meant or [ends[end] for end in difflib.get_close_matches(wanted, ends)]
    meant = meant or difflib.get_close_matches(task, known, n=1)
    hint = f" (did you mean {' or '.join(meant)}?)" if meant else ""
    kind, part, _ = task.partition("/")
    have = [name for name in known if part and name.startswith(f"{kind}/")] or all_names(False)
    raise UserError(f"--task={task}: no such task{hint}; have: {', '.join(have)}")


def unread(task: str) -> list[str]:
    """Lists the flags that a task does not read."""
    module, scored = module_of(task), by_likelihood(task)
    examples = not scored and module.make.of_examples
    read = {*module.DEFAULTS, *(("separator",) if scored else ())}
    read |= {"seq_len", "labels", "predictions"} if examples else set()
    if not (scored or examples):
        read |= {"text", "teacher"}  # the column of a source
    if "documents" in read:
        read |= {"text"}
    return [each for each in ("predictions", "teacher", "text", *SETTINGS) if each not in read]


def task_config(task: str, given: Options) -> dict[str, Any]:
    """Makes config.task of a task, with those options that it reads."""
    check_name(task)
    kind, _, part = task.partition("/")
    module = module_of(task)
    config: dict[str, Any] = {"name": "labelled_text" if kind == "text" else kind}
    if part:
        key = module.NAMED[0]
        config[key] = (part,) if isinstance(module.DEFAULTS[key], tuple) else part
    for each in unread(task):
        if getattr(given, each, None) is not None:
            raise UserError(f"--{each} does not go with task {task}; leave it out")
    read = {*COLUMNS, *SETTINGS} & {*module.DEFAULTS}
    if not by_likelihood(task) and module.make.of_examples:
        read -= {"seq_len"}  # a row may be shorter than in training
    config |= {key: getattr(given, key) for key in sorted(read)}
    config |= {"column": given.text} if "column" in module.DEFAULTS else {}
    return {key: value for key, value in config.items() if value is not None}


def make_task(
    name: str,
    data: str | None,
    given: Options,
    tokenizer: PreTrainedTokenizerBase | None = None,
    folder: Path | None = None,
    **defaults: Any,
) -> Any:
    """Makes the task of that name, on a local file or folder, or where `data` is None on the split
    that it reports; with a tokenizer it is read as in the training of the model in `folder`, where
    that says how, and else with `defaults` of config.task.

    Raises UserError for a task that there is not, and settings that it does not have.
    """
    config = task_config(name, given)
    module, source = module_of(name), None
    if data is not None:
        source = source_of(config["name"], data, given)
    if by_likelihood(name):
        return module.scoring(config, {"test": source})
    if tokenizer is not None:
        config = defaults | provenance.task_of(folder, config.pop("name"), config, tokenizer)
    if "null_threshold" in module.DEFAULTS and config.get("null_threshold") is None:
        config["null_threshold"] = 0.0  # no validation split to tune it on
    sources = None if data is None else {"test": source}
    if config["name"] == "labelled_text" and config.get("labels") is None and sources:
        sources["train"] = sources["test"]  # the classes are those that occur
    if data is None and config["name"] in ("labelled_text", "phrasebank"):
        raise UserError(f"--task={name} needs --data, a local file or folder")
    return module.make(config, sources, tokenizer)


def source_of(task: str, data: str, given: Options) -> dict[str, str]:
    """Describes a file, folder or glob as a source; which column is a setting of chats and of
    labelled texts themselves."""
    column = {} if task in ("chat", "labelled_text") or not given.text else {"text": given.text}
    return {"source": "files", "path": data} | column


def renamed(args: argparse.Namespace) -> dict[str, str]:
    """Maps what messages of the recipes call a setting, a regex, to the flag that sets it; of a
    run, the config says what no flag does."""
    return {was: now for name, was, now in _NAMES if not args.workdir or getattr(args, name)}


def check(args: argparse.Namespace) -> None:
    """Raises UserError where flags do not go together."""
    task, run, what = args.task, args.workdir, "--model" if args.model else "--predictions"
    if task:
        check_name(task)
    if run and not (task and by_likelihood(task)):
        own = runs.read(run).config["task"]["name"]
        if task not in (None, own):
            raise UserError(f"{run} is a run of task {own!r}, not {task!r}")
        task = own
    if not task:
        raise UserError(f"--task is missing; have: {', '.join(all_names(False))}")
    scored = by_likelihood(task)
    examples = not scored and module_of(task).make.of_examples
    language = not (scored or examples)
    if language and args.model and not args.data:
        raise UserError(f"--model with --task={task} needs --data, the text to evaluate on")
    how = ("seq_len", "batch_size", "precision")
    of_task = [*unread(task), *(["split"] if scored else []), *(["out"] if language else [])]
    for applies, names, other in (
        (True, of_task, f"task {task}"),
        (args.predictions, ("revision", *how, "out"), what),
        (args.predictions and "labels" not in module_of(task).DEFAULTS, ("labels",), what),
        (not run, ("stage", "split"), what),
        (run, ("revision",), "--workdir"),
        (run and args.data, ("split",), "--data"),
        (run and not args.data and not examples, ("text",), "--workdir without --data"),
        (run, ("separator",), "--workdir, whose config says it"),
        (run and examples, (*COLUMNS, "labels", *how), "--workdir, whose config says it"),
    ):
        given = [f"--{name}" for name in names if applies and getattr(args, name) is not None]
        if given:
            raise UserError(f"{', '.join(given)} does not go with {other}; leave it out")
