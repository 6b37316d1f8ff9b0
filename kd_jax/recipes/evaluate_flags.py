"""Carries out the flags of `evaluate`: whether they go together, the figures, their table."""

import argparse
import dataclasses
import difflib
import re
from pathlib import Path

from kd_jax.errors import UserError
from kd_jax.recipes.evaluate import (
    EXAMPLES,
    LANGUAGE,
    LIKELIHOOD,
    Options,
    by_likelihood,
    evaluate_checkpoint,
    evaluate_predictions,
    evaluate_run,
    evaluate_stage,
)
from kd_jax.report import runs, tables
from kd_jax.report.table import Table, of_runs
from kd_jax.tasks import cbt, glue, phrasebank

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


def renamed(args: argparse.Namespace) -> dict[str, str]:
    """Maps what messages of the recipes call a setting, a regex, to the flag that sets it; of a
    run, the config says what no flag does."""
    return {was: now for name, was, now in _NAMES if not args.workdir or getattr(args, name)}


def evaluate(args: argparse.Namespace) -> tuple[dict, list[str]]:
    """Evaluates what the flags ask for; returns the figures, and the files that were written."""
    names = [field.name for field in dataclasses.fields(Options)]
    options = Options(**{name: getattr(args, name) for name in names})
    task, data = args.task, args.data
    if args.predictions:
        return evaluate_predictions(task, data, args.predictions, options), []
    if args.workdir and not args.stage and task and by_likelihood(task):
        every = evaluate_run(args.workdir, task, data, options)
        found = {"stages": {name: each.report for name, each in every.items()}}
    else:
        if args.workdir:
            each = evaluate_stage(args.workdir, args.stage, task, data, args.split, options)
        else:
            each = evaluate_checkpoint(args.model, args.revision, task, data, options)
        every, found = {"": each}, each.report
    made = {name: each.made for name, each in every.items() if args.out and each.made}
    return found, [path for name in made for path in made[name].write(Path(args.out) / name)]


def table(found: dict) -> Table:
    """The figures for people."""
    first = next(iter(found.get("stages", {"": found}).values()))
    about = [first["data"]["name"], first["task"]]
    if "stride" in first:
        about += [f"windows of {first['seq_len']} tokens, stride {first['stride']}"]
        about += [f"documents {first['documents']}"]
    elif "seq_len" in first:
        about += [f"rows of {first['seq_len']} tokens"]
    about += [f"joined by {first['separator']}"] if "separator" in first else []
    about += [first["precision"]] if "precision" in first else []
    about += [f"beside {first['teacher']}"] if first.get("teacher") else []
    if "stages" in found:
        return tables.scores_of_models(found["stages"], ", ".join(about))
    name = found.get("stage") or Path(found.get("model") or found["predictions"]).name
    if by_likelihood(found["task"]):
        return tables.scores(found, name, ", ".join(about))
    return of_runs([{name: found}], ", ".join(about))


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
