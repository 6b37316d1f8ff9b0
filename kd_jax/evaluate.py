"""Evaluates a model, a stage of a run, or a file of predictions.

    python -m kd_jax.evaluate --workdir=runs/small_finetune-62cedf5b --out=figures/
    python -m kd_jax.evaluate --model=RUN/export/student --task=glue/sst2 --data=SST-2/dev.tsv
    python -m kd_jax.evaluate --model=HUB_ID --task=squad --json=figures.json
    python -m kd_jax.evaluate --predictions=other.tsv --task=agnews --data=ag_news/test.csv
    python -m kd_jax.evaluate --model=distilgpt2 --teacher=gpt2 --task=clm --data=texts/
    python -m kd_jax.evaluate --model=gpt2 --task=hellaswag --out=likelihoods/
    python -m kd_jax.evaluate --model=gpt2 --task=cbt/NE --data=CBTest/data
    python -m kd_jax.evaluate --model=gpt2 --task=perplexity --data=wiki.test.raw --stride=512

Tasks: glue/NAME, squad, agnews, phrasebank/LEVEL (all sentences of the level), text (own files:
--text, --pair, --label name the columns); and mlm, clm and chat, held-out text. Causal models are
also scored by likelihood: hellaswag; cbt (all word classes) or cbt/CN, cbt/NE, cbt/P, cbt/V; and
perplexity, of a text under a sliding window. Without --data the task's reported split is taken
from the hub. --workdir takes the best checkpoint of a stage of a finished run, on what the run
reports or on --data; scored by likelihood, without --stage all stages beside the teacher, with what
each keeps of its answers.

Text becomes rows as it did in the model's training (seq_len, separator, columns, ...), which every
export of a run tells in its kd_jax.json, unless flags say otherwise. Of other models nobody knows
what stood before every document: what their tokenizer begins texts with, or else the token of ends,
is taken; --separator is another.

--out=DIR gets predictions.tsv (or .json: SQuAD), the format in which the task's authors want
them, figures by class and the confusion matrix; --json=FILE the figures: fractions, or percent for
SQuAD. --predictions scores a file in that format, whoever wrote it. Language models are measured in
nats a token; beside a teacher also KL(teacher || model) and the share of equal first choices.
Scoring by likelihood writes --out=DIR/likelihoods.jsonl, a line for each ending (or window).
"""

import argparse
import difflib
import json
import re
from collections.abc import Callable
from pathlib import Path

from kd_jax import cli
from kd_jax.errors import UserError
from kd_jax.evals import runs, tables
from kd_jax.evals.table import Table, of_runs
from kd_jax.recipes import judge, score
from kd_jax.recipes.evaluate import Options, evaluate_checkpoint, evaluate_stage
from kd_jax.tasks import cbt, glue, phrasebank

LANGUAGE = ("mlm", "clm", "chat")
TASKS = (*judge.TASKS, *LANGUAGE, *score.TASKS)
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


def table(found: dict) -> Table:
    """The figures for people."""
    if "stages" in found:
        return tables.scores_of_models(
            found["stages"], _about(next(iter(found["stages"].values())))
        )
    name = found.get("stage") or Path(found.get("model") or found["predictions"]).name
    if _kind(found["task"]) in score.KINDS:
        return tables.scores(found, name, _about(found))
    about = [found["data"]["name"], found["task"]]
    if "seq_len" in found:
        about.append(f"rows of {found['seq_len']} tokens")
    if "separator" in found:
        about.append(f"joined by {found['separator']}")
    about += [found["precision"]] if "precision" in found else []
    beside = f", beside {found['teacher']}" if found.get("teacher") else ""
    return of_runs([{name: found}], f"{', '.join(about)}{beside}")


def _about(found: dict) -> str:
    """What a model was scored on."""
    about = [found["data"]["name"], found["task"]]
    if "stride" in found:
        about += [f"windows of {found['seq_len']} tokens, stride {found['stride']}"]
        about += [f"documents {found['documents']}"]
    return ", ".join([*about, found["precision"]])


def _kind(task: str) -> str:
    return task.partition("/")[0]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kd_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder of an HF checkpoint, or its id on the HF hub")
    what.add_argument("--workdir", metavar="RUN", help="directory of a finished run")
    what.add_argument(
        "--predictions", metavar="FILE", help="what any system answered; needs --task"
    )
    parser.add_argument("--revision", help="of the hub id: branch, tag or commit")
    parser.add_argument("--stage", help="of the run: teacher, baseline, student (default)")
    parser.add_argument("--task", help="see above; that of the run")
    parser.add_argument("--data", metavar="PATH", help="a local file or folder, not the hub")
    parser.add_argument("--split", choices=("validation", "test"), help="of the run's own data")
    parser.add_argument("--text", help='column of the text, or of a chat\'s messages (as trained, '
                        'else "text", "messages")')  # fmt: skip
    parser.add_argument("--pair", help="task text: column of a second text")
    parser.add_argument("--label", help='task text: column of the label (as trained, else "label")')
    parser.add_argument("--separator", choices=("eos", "bos"), help="clm, and by likelihood: token "
                        "before every document (as trained, else the tokenizer's)")  # fmt: skip
    parser.add_argument(
        "--labels", type=lambda names: tuple(names.split(",")), help="class names, in the order of "
        "the model's logits, where its config.json has none"
    )  # fmt: skip
    parser.add_argument("--teacher", help="mlm, clm, chat: folder or hub id (the run's, else none)")
    parser.add_argument(
        "--seq_len", type=cli.positive, help="tokens of a row (as trained; mlm, clm, chat: else "
        "512; others: at most); scored by likelihood: that the model reads at once (else all it "
        "can; perplexity: as trained, else at most 2,048)"
    )  # fmt: skip
    parser.add_argument("--stride", type=cli.positive, help="perplexity: tokens from window to "
                        "window (else half a window)")  # fmt: skip
    parser.add_argument("--documents", choices=("joined", "alone"), help="perplexity: one text "
                        "(default), or each for itself")  # fmt: skip
    parser.add_argument(
        "--batch_size",
        type=cli.positive,
        help="rows of a batch, or endings (the run's, else a default)",
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="(the run's, else fp32)")
    parser.add_argument("--json", metavar="FILE", help="where to write every figure to")
    parser.add_argument("--out", metavar="DIR", help="where to write predictions and plots to")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parses `argv`, evaluates, prints a table. Exits with status 1 and one line at a mistake."""
    args = parser().parse_args(argv)
    # Of a run, the config says what no flag does.
    names = {was: now for name, was, now in _NAMES if not args.workdir or getattr(args, name)}
    with cli.plain_errors(names):
        evaluate = _check(args)
        cli.start_jax()
        found, written = evaluate(args)
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
    table(found).print()
    if "classes" in found:
        judge.by_class(found).print()
    if written:
        print("wrote", *written, sep="\n  ")


Found = tuple[dict, list[str]]  # figures, and the files that were written


def _language(args: argparse.Namespace) -> Found:
    options = Options(
        args.teacher, args.text, args.separator, args.seq_len, args.batch_size, args.precision
    )
    if args.workdir:
        stage = args.stage or "student"
        return evaluate_stage(args.workdir, stage, args.task, args.data, args.split, options), []
    return evaluate_checkpoint(args.model, args.revision, args.task, args.data, options), []


def _scored(args: argparse.Namespace) -> Found:
    options = score.Options(
        args.seq_len,
        args.text,
        args.separator,
        args.stride,
        args.documents,
        args.batch_size,
        args.precision,
    )
    if args.workdir and not args.stage:
        every = score.of_run(args.workdir, args.task, args.data, options)
        found = {"stages": {name: report for name, (_, report) in every.items()}}
        return found, _kept({f"{name}/": made for name, (made, _) in every.items()}, args.out)
    if args.workdir:
        made, found = score.of_stage(args.workdir, args.stage, args.task, args.data, options)
    else:
        made, found = score.of_checkpoint(args.model, args.revision, args.task, args.data, options)
    return found, _kept({"": made}, args.out)


def _kept(made: dict[str, score.Scores], out: str | None) -> list[str]:
    """Writes OUT/NAMElikelihoods.jsonl of each; the paths."""
    paths = [Path(out) / f"{name}likelihoods.jsonl" for name in made] if out else []
    for path, each in zip(paths, made.values(), strict=bool(out)):
        each.write(path)
    return [str(path) for path in paths]


def _examples(args: argparse.Namespace) -> Found:
    given = {"text": args.text, "pair": args.pair, "label": args.label}
    columns = {name: value for name, value in given.items() if value is not None}
    if args.predictions:
        columns |= {"labels": args.labels} if args.labels and args.task == "text" else {}
        return judge.of_predictions(args.task, columns, args.data, args.predictions), []
    if args.workdir:
        stage = args.stage or "student"
        task, outputs, found = judge.of_stage(args.workdir, stage, args.data, args.split)
    else:
        task, outputs, found = judge.of_checkpoint(
            args.model,
            args.revision,
            args.task,
            columns,
            args.data,
            args.labels,
            args.seq_len,
            args.batch_size,
            args.precision,
        )
    return found, judge.write_files(task, outputs, found, args.out) if args.out else []


def _check(args: argparse.Namespace) -> Callable[[argparse.Namespace], Found]:
    """What evaluates the task. Raises UserError where flags do not go together."""
    cli.check_given(args)
    cli.check_file("--json", args.json)
    cli.check_folder("--out", args.out)
    task = args.task
    _check_task(task)
    scored = task is not None and _kind(task) in score.KINDS
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
    foreign = dict.fromkeys(_unread(task, language, scored), f"task {task}")
    if args.predictions:
        unread = ("revision", "seq_len", "batch_size", "precision", "out")
        foreign |= dict.fromkeys(unread if task == "text" else (*unread, "labels"), "--predictions")
    what = "--model" if args.model else "--predictions"
    foreign |= dict.fromkeys(() if args.workdir else ("stage", "split"), what)
    if args.workdir:
        foreign |= {"revision": "--workdir"} | ({"split": "--data"} if args.data else {})
        if not language and not scored:
            reason = "--workdir, whose config says it"
            foreign |= dict.fromkeys(
                ("text", "pair", "label", "labels", "seq_len", "batch_size", "precision"), reason
            )
        elif not args.data:
            foreign |= {"text": "--workdir without --data"}
        foreign |= {"separator": "--workdir, whose config says it"}
    given = [name for name in foreign if getattr(args, name) is not None]
    if given:
        named = ", ".join(f"--{name}" for name in given)
        raise UserError(f"{named} does not go with {foreign[given[0]]}; leave it out")
    return _scored if scored else _language if language else _examples


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


def _unread(task: str, language: bool, scored: bool) -> tuple[str, ...]:
    """The flags that a task does not read."""
    if scored:
        windows = () if task == "perplexity" else ("text", *OF_WINDOWS)
        return (*OF_EXAMPLES, *OF_LANGUAGE, "split", *windows)
    if language:
        separator = () if task == "clm" else ("separator",)
        return (*OF_EXAMPLES, "out", *separator, *OF_WINDOWS)
    columns = () if task == "text" else ("text", "pair", "label")
    return (*OF_LANGUAGE, "separator", *OF_WINDOWS, *columns)


if __name__ == "__main__":
    main()
