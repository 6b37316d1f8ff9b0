"""Checks combinations of `evaluate`'s flags, and translates recipe messages into flag names."""

import argparse

from kd_jax import plugins
from kd_jax.errors import UserError
from kd_jax.report import runs
from kd_jax.tasks import command

# Flags that some tasks read.
COLUMNS = ("text", "pair", "label")
OF_TASKS = ("separator", "stride", "documents")

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
        for name in (*COLUMNS, *OF_TASKS, "labels", "seq_len")
    ),
)


def renamed(args: argparse.Namespace) -> dict[str, str]:
    """Maps names of settings in messages of the recipe (regex) to the flags that set them; settings
    of a run without a flag keep their config names."""
    return {was: now for name, was, now in _NAMES if not args.workdir or getattr(args, name)}


def check(args: argparse.Namespace) -> None:
    """Raises UserError if flags contradict each other, or do not apply to the task."""
    task = args.task
    kind = command.find(task) if task else None
    if args.workdir:
        own = runs.read(args.workdir).config["task"]["name"]
        if not (kind and kind.by_likelihood):
            if task not in (None, own):
                raise UserError(f"{args.workdir} is a run of task {own!r}, not {task!r}")
            task, kind = own, plugins.load("tasks", own, "make").make
    elif not task:
        raise UserError(f"--task is missing; have: {', '.join(command.names())}")
    examples, scored, run, of_task = (
        kind.of_examples,
        kind.by_likelihood,
        args.workdir,
        f"task {task}",
    )
    language = not (examples or scored)
    if language and args.model and not args.data:
        raise UserError(f"--model with --task={task} needs --data, the text to evaluate on")
    what = "--model" if args.model else "--predictions"
    how = ("seq_len", "batch_size", "precision")
    unread = [name for name in (*COLUMNS, *OF_TASKS) if not command.reads(kind, name)]
    for applies, names, other in (
        (not examples, ("predictions", "labels"), of_task),
        (not language, ("teacher",), of_task),
        (True, unread, of_task),
        (scored, ("split",), of_task),
        (language, ("out",), of_task),
        (args.predictions, ("revision", *how, "out"), what),
        (args.predictions and not command.reads(kind, "labels"), ("labels",), what),
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
