"""A task by the name that command lines give it (glue/sst2, text, perplexity), and its flags."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from kd_jax import plugins
from kd_jax.errors import UserError
from kd_jax.report import runs
from kd_jax.run import provenance
from kd_jax.tasks import cbt, glue, phrasebank

LANGUAGE = ("mlm", "clm", "chat")
EXAMPLES = ("glue/NAME", "squad", "agnews", "phrasebank/LEVEL", "text")
LIKELIHOOD = ("perplexity", "cbt", "cbt/CLASS", "hellaswag")
PARTS = {"glue": "task", "phrasebank": "level", "cbt": "classes"}  # what the name's end sets
TASKS = (*EXAMPLES, *LANGUAGE, *LIKELIHOOD)
# Flags that only one of the kinds of task reads.
OF_LANGUAGE = ("teacher",)
OF_EXAMPLES = ("predictions", "pair", "label", "labels")
OF_WINDOWS = ("stride", "documents")

# What messages of the recipes call what a flag sets: the flag, regex, and its name here.
_NAMES = (
    ("data", r"config\.data\.cache_dir or KD_JAX_CACHE", "KD_JAX_CACHE"),
    ("data", r"(config\.)?data\.(train|validation|test)(\.path)?|config\.data", "--data"),
    ("text", r"config\.task\.column|text=(?= to)", "--text"),
    ("task", r"config\.task\.name='labelled_text'", "--task=text"),
    ("task", r"config\.task\.(name|task|level|classes)", "--task"),
    ("batch_size", r"(config\.)?(eval\.)?batch_size", "--batch_size"),
    ("precision", r"config\.precision", "--precision"),
    *(
        (name, rf"config\.task\.{name}", f"--{name}")
        for name in (*OF_EXAMPLES[1:], *OF_WINDOWS, "text", "seq_len", "separator")
    ),
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
    """Whether a task, as command lines call it, is scored by likelihood."""
    return task.partition("/")[0] in LIKELIHOOD


def task_config(name: str, options: Options) -> dict[str, Any]:
    """config.task of a task as command lines call it, with those options that it reads."""
    kind, _, part = name.partition("/")
    if part and kind not in PARTS or name in ("glue", "phrasebank"):
        have = LIKELIHOOD if by_likelihood(name) else (*EXAMPLES, *LANGUAGE)
        raise UserError(f"--task={name}: have {', '.join(have)}")
    config: dict[str, Any] = {"name": "labelled_text" if kind == "text" else kind}
    if part:
        config[PARTS[kind]] = (part,) if kind == "cbt" else part
    of_examples = any(kind == each.partition("/")[0] for each in EXAMPLES)
    read = [] if of_examples else ["seq_len"]  # of examples, a row may be shorter than in training
    read += ["text", "pair", "label", "labels"] if kind == "text" else []
    read += ["separator"] if kind in LANGUAGE else []
    read += ["stride", "documents"] if by_likelihood(name) else []
    config |= {key: getattr(options, key) for key in read}
    config |= {"column": options.text} if kind == "chat" else {}
    return {key: value for key, value in config.items() if value is not None}


def make_task(
    name: str,
    data: str | None,
    options: Options,
    tokenizer: PreTrainedTokenizerBase | None = None,
    folder: Path | None = None,
    **defaults: Any,
) -> Any:
    """The task that command lines call `name`, on a local file or folder, or where `data` is None
    on its own reported split; with a tokenizer it is read as in the training of the model in
    `folder`, where that says how, and else with `defaults` of config.task.

    Raises UserError for a task that there is not, and settings that it does not have.
    """
    config = task_config(name, options)
    source = None if data is None else source_of(config["name"], data, options)
    if by_likelihood(name):
        return plugins.load("tasks", config["name"], "scoring").scoring(config, {"test": source})
    if tokenizer is not None:
        config = defaults | provenance.task_of(folder, config.pop("name"), config, tokenizer)
    if name == "squad" and config.get("null_threshold") is None:
        config["null_threshold"] = 0.0  # no validation split to tune it on
    given = None if data is None else {"test": source}
    if config["name"] == "labelled_text" and config.get("labels") is None and given:
        given["train"] = given["test"]  # the classes are those that occur
    if data is None and config["name"] in ("labelled_text", "phrasebank"):
        raise UserError(f"--task={name} needs --data, a local file or folder")
    return plugins.load("tasks", config["name"], "make").make(config, given, tokenizer)


def source_of(task: str, data: str, options: Options) -> dict[str, str]:
    """The file, folder or glob as a source; which column is a setting of chats and of labelled
    texts themselves."""
    column = {} if task in ("chat", "labelled_text") or not options.text else {"text": options.text}
    return {"source": "files", "path": data} | column


def renamed(args: argparse.Namespace) -> dict[str, str]:
    """Maps what messages of the recipes call a setting, a regex, to the flag that sets it; of a
    run, the config says what no flag does."""
    return {was: now for name, was, now in _NAMES if not args.workdir or getattr(args, name)}


def check(args: argparse.Namespace) -> None:
    """Raises UserError where flags do not go together."""
    task = args.task
    _check_task(task)
    scored = task is not None and by_likelihood(task)
    if args.workdir:
        own = runs.read(args.workdir).config["task"]["name"]
        if not scored and task not in (None, own):
            raise UserError(f"{args.workdir} is a run of task {own!r}, not {task!r}")
        task = task if scored else own
    elif not task:
        raise UserError(f"--task is missing; have: {', '.join(TASKS)}")
    language = task in LANGUAGE
    if language and args.model and not args.data:
        raise UserError(f"--model with --task={task} needs --data, the text to evaluate on")
    examples, run, of_task = not (language or scored), args.workdir, f"task {task}"
    what = "--model" if args.model else "--predictions"
    columns, how = ("text", "pair", "label"), ("seq_len", "batch_size", "precision")
    for applies, names, other in (
        (not examples, OF_EXAMPLES, of_task),
        (not language, OF_LANGUAGE, of_task),
        (task != "perplexity", OF_WINDOWS, of_task),
        (scored, ("split",), of_task),
        (language, ("out",), of_task),
        (not scored and task != "clm", ("separator",), of_task),
        (scored and task != "perplexity", ("text",), of_task),
        (examples and task != "text", columns, of_task),
        (args.predictions, ("revision", *how, "out"), what),
        (args.predictions and task != "text", ("labels",), what),
        (not run, ("stage", "split"), what),
        (run, ("revision",), "--workdir"),
        (run and args.data, ("split",), "--data"),
        (run and not args.data and not examples, ("text",), "--workdir without --data"),
        (run, ("separator",), "--workdir, whose config says it"),
        (run and examples, (*columns, "labels", *how), "--workdir, whose config says it"),
    ):
        given = [f"--{name}" for name in names if applies and getattr(args, name) is not None]
        if given:
            raise UserError(f"{', '.join(given)} does not go with {other}; leave it out")


def _check_task(task: str | None) -> None:
    """Raises UserError for a task that there is not, and names those that may be meant."""
    known = [
        *(f"glue/{name}" for name in glue.TASKS),
        *(f"phrasebank/{level}" for level in phrasebank.LEVELS),
        *("squad", "agnews", "text", *LANGUAGE, "perplexity", "hellaswag", "cbt"),
        *(f"cbt/{name}" for name in cbt.CLASSES),
    ]
    if task is None or task in known:
        return
    wanted = re.sub("[-_ ]", "", task.lower())
    meant = [name for name in known if wanted in (name.lower().split("/"))]
    ends = {name.rpartition("/")[2].lower(): name for name in known}
    meant = meant or [ends[end] for end in difflib.get_close_matches(wanted, ends)]
    meant = meant or difflib.get_close_matches(task, known, n=1)
    hint = f" (did you mean {' or '.join(meant)}?)" if meant else ""
    kind, part, _ = task.partition("/")
    have = [name for name in known if part and name.startswith(f"{kind}/")] or TASKS
    raise UserError(f"--task={task}: no such task{hint}; have: {', '.join(have)}")
