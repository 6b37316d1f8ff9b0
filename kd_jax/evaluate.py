"""Evaluates a model, a stage of a run, or a file of predictions.

    python -m kd_jax.evaluate --workdir=runs/small_finetune-62cedf5b --out=figures/
    python -m kd_jax.evaluate --model=RUN/export/student --task=glue/sst2 --data=SST-2/dev.tsv
    python -m kd_jax.evaluate --model=HUB_ID --task=squad --data=dev-v1.1.json
    python -m kd_jax.evaluate --model=DIR --task=embedding/retrieval --data=scifact/
    python -m kd_jax.evaluate --predictions=other.tsv --task=agnews --data=ag_news/test.csv
    python -m kd_jax.evaluate --model=distilgpt2 --teacher=gpt2 --task=clm --data=texts/
    python -m kd_jax.evaluate --model=gpt2 --task=hellaswag --out=likelihoods/
    python -m kd_jax.evaluate --model=gpt2 --task=cbt/NE --data=CBTest/data
    python -m kd_jax.evaluate --model=gpt2 --task=perplexity --data=wiki.test.raw --stride=512

Tasks: agnews, glue/TASK, squad, phrasebank/LEVEL (all sentences of the level), text (own files:
--text, --pair, --label name the columns); embedding/sts (--text, --pair and --label name texts and
score), embedding/retrieval and embedding/reranking, of embedders; and mlm, clm and chat on held-out
text. Causal models are also scored by likelihood: hellaswag; cbt (all word classes) or cbt/CN,
cbt/NE, cbt/P, cbt/V; and perplexity, of a text under a sliding window. Without --data the task's
reported split is taken from the hub. --workdir takes the best checkpoint of a stage of a finished
run, on what the run reports or on --data; scored by likelihood, without --stage all stages and the
teacher, with the accuracy that each retains.

Text becomes rows as it did in the model's training (seq_len, separator, columns, ...), which every
export of a run tells in its kd_jax.json, unless flags say otherwise. Of other models nobody knows
what stood before every document: what their tokenizer begins texts with, or else the token of ends,
is taken; --separator is another.

--out=DIR gets predictions.tsv (or .json: SQuAD), the format in which the task's authors want
them, figures by class and the confusion matrix; --json=FILE the figures: fractions, or percent for
SQuAD. --predictions scores a file in that format, whoever wrote it. Language models are measured in
nats a token; with a teacher also KL(teacher || model) and the share of equal first choices.
Scoring by likelihood writes --out=DIR/likelihoods.jsonl, a line for each ending (or window).
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from kd_jax import flags, plugins
from kd_jax.errors import UserError

# Flags that some tasks read.
COLUMNS = ("text", "pair", "label")
PROMPTS = ("query_prompt", "document_prompt")
OF_TASKS = ("separator", "stride", "documents", *PROMPTS)

# What messages of the recipes call what a flag sets: the flag, regex, and its name here.
_NAMES = (
    ("data", r"config\.data\.cache_dir or KD_JAX_CACHE", "KD_JAX_CACHE"),
    ("data", r"(config\.)?data\.(train|validation|test)(\.path)?|config\.data", "--data"),
    ("text", r"config\.task\.column|text=(?= to)", "--text"),
    ("task", r"config\.task\.name='labelled_text'", "--task=text"),
    ("task", r"config\.task\.(name|task|level|classes|scored)", "--task"),
    ("batch_size", r"(config\.)?(eval\.)?batch_size", "--batch_size"),
    ("precision", r"config\.precision", "--precision"),
    *(
        (name, rf"config\.task\.{name}", f"--{name}")
        for name in (*COLUMNS, *OF_TASKS, "labels", "seq_len")
    ),
)


def parser() -> flags.Parser:
    """Makes the command's argument parser."""
    parser = flags.Parser("evaluate", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder of an HF checkpoint, or its id on the HF hub")
    what.add_argument("--workdir", metavar="RUN", help="directory of a finished run")
    what.add_argument(
        "--predictions", metavar="FILE", help="what any system answered; needs --task"
    )
    parser.add_argument("--revision", help="of the hub id: branch, tag or commit")
    parser.add_argument(
        "--stage", help="of the run; by default the one that it is about, such as student"
    )
    parser.add_argument("--task", help="see above; that of the run")
    parser.add_argument("--data", metavar="PATH", help="a local file or folder, not the hub")
    parser.add_argument("--split", choices=("validation", "test"), help="of the run's own data")
    parser.add_argument("--text", help='column of the text, or of a chat\'s messages (as trained, '
                        'else "text", "messages"; embedding/sts: "sentence1")')  # fmt: skip
    parser.add_argument("--pair", help="tasks text, embedding/sts: column of a second text")
    parser.add_argument("--label", help="tasks text, embedding/sts: column of the "
                        "label or score (as trained, else that of the task)")  # fmt: skip
    parser.add_argument("--separator", choices=("eos", "bos"), help="clm, and by likelihood: token "
                        "before every document (as trained, else the tokenizer's)")  # fmt: skip
    parser.add_argument(
        "--labels", type=lambda names: tuple(names.split(",")), help="class names, in the order of "
        "the model's logits, where its config.json has none"
    )  # fmt: skip
    parser.add_argument("--teacher", help="mlm, clm, chat: folder or hub id (the run's, else none)")
    parser.add_argument(
        "--seq_len", type=flags.positive, help="tokens of a row (as trained; mlm, clm, chat: else "
        "512; others: at most); scored by likelihood: that the model reads at once (else all it "
        "can; perplexity: as trained, else at most 2,048)"
    )  # fmt: skip
    parser.add_argument("--stride", type=flags.positive, help="perplexity: tokens from window to "
                        "window (else half a window)")  # fmt: skip
    parser.add_argument("--documents", choices=("joined", "alone"), help="perplexity: one text "
                        "(default), or each for itself")  # fmt: skip
    for of in ("query", "document"):
        help = f"embedding: text before every {of} (as trained, else none)"
        parser.add_argument(f"--{of}_prompt", metavar="TEXT", help=help)
    parser.add_argument(
        "--batch_size",
        type=flags.positive,
        help="rows of a batch, or endings (the run's, else a default)",
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="(the run's, else fp32)")
    parser.add_argument("--json", metavar="FILE", help="where to write every figure to")
    parser.add_argument("--out", metavar="DIR", help="where to write predictions and plots to")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates as `argv` says, prints a table; exits with status 1 and one line at a mistake."""
    args = parser().parse(argv)
    from kd_jax import cli, storage
    from kd_jax.recipes import evaluate
    from kd_jax.report import tables

    with cli.plain_errors(_renamed(args)):
        cli.check_file("--json", args.json)
        cli.check_folder("--out", args.out)
        _check(args)
        cli.start_jax()
        found, made = _evaluate(args)
        if args.json:
            Path(args.json).write_text(json.dumps(storage.finite(found), indent=2) + "\n")
        written = [
            path
            for name, each in made.items()
            if args.out and each
            for path in each.write(Path(args.out) / name)
        ]
    evaluate.table(found).print()
    if "classes" in found:
        tables.by_class(found["task"], [{"stages": {"": found}}]).print()
    if written:
        print("wrote", *written, sep="\n  ")


def _renamed(args: argparse.Namespace) -> dict[str, str]:
    """Maps names of settings in messages of the recipe (regex) to the flags that set them; settings
    of a run without a flag keep their config names."""
    return {was: now for name, was, now in _NAMES if not args.workdir or getattr(args, name)}


def _check(args: argparse.Namespace) -> None:
    """Raises UserError if flags contradict each other, or do not apply to the task."""
    from kd_jax.report import runs
    from kd_jax.tasks import command

    task = args.task
    kind = command.find(task) if task else None
    if args.workdir:
        own = runs.read(args.workdir).config["task"]["name"]
        if not (kind and kind.by_likelihood):
            if task not in (None, own):
                raise UserError(
                    f"{args.workdir} is a run of task {own!r}, not {task!r}: leave --task out"
                )
            task, kind = own, plugins.load("tasks", own, "make").make
    elif not task:
        raise UserError(f"--task is missing; have: {', '.join(command.names())}")
    examples, scored, run = kind.of_examples, kind.by_likelihood, args.workdir
    language, of_task = not (examples or scored), f"task {task}"
    if language and args.model and not args.data:
        raise UserError(f"--model with --task={task} needs --data, the text to evaluate on")
    what = "--model" if args.model else "--predictions"
    how = ("seq_len", "batch_size", "precision")
    unread = [name for name in (*COLUMNS, *OF_TASKS) if not command.reads(kind, name, task)]
    for applies, names, other in (
        (not examples, ("predictions", "labels"), of_task),
        (not language, ("teacher",), of_task),
        (True, unread, of_task),
        (scored, ("split",), of_task),
        (language, ("out",), of_task),
        (examples and kind.head == "embedding", ("out", "predictions"), of_task),
        (args.predictions, ("revision", *how, "out"), what),
        (args.predictions and not command.reads(kind, "labels"), ("labels",), what),
        (not run, ("stage", "split"), what),
        (run, ("revision",), "--workdir"),
        (run and args.data, ("split",), "--data"),
        (run and not args.data and not examples, ("text",), "--workdir without --data"),
        (run, ("separator",), "--workdir, whose config says it"),
        (run and examples, (*COLUMNS, *PROMPTS, "labels", *how), "--workdir, whose config says it"),
    ):
        given = [f"--{name}" for name in names if applies and getattr(args, name) is not None]
        if given:
            raise UserError(f"{', '.join(given)} does not go with {other}; leave it out")


def _evaluate(args: argparse.Namespace) -> tuple[dict, dict]:
    """Evaluates the models that the flags name; returns metrics, and predictions or scores that can
    be written to folders."""
    from kd_jax.recipes import evaluate
    from kd_jax.tasks import command

    names = [each.name for each in dataclasses.fields(evaluate.Options)]
    options = evaluate.Options(**{name: getattr(args, name) for name in names})
    task, data, run = args.task, args.data, args.workdir
    if args.predictions:
        return evaluate.evaluate_predictions(task, data, args.predictions, options), {}
    if run and not args.stage and task and command.find(task).by_likelihood:
        every = evaluate.evaluate_run(run, task, data, options)
        reports = {name: each.report for name, each in every.items()}
        return {"stages": reports}, {name: each.made for name, each in every.items()}
    if run:
        one = evaluate.evaluate_stage(run, args.stage, task, data, args.split, options)
    else:
        one = evaluate.evaluate_checkpoint(args.model, args.revision, task, data, options)
    return one.report, {"": one.made}


if __name__ == "__main__":
    main()
