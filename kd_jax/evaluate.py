"""Evaluates a model on held-out text: loss in nats a token, perplexity, accuracy.

    python -m kd_jax.evaluate --workdir=runs/quickstart-62cedf5b --stage=baseline
    python -m kd_jax.evaluate --workdir=RUN --data=other.txt --json=figures.json
    python -m kd_jax.evaluate --model=RUN/export/student --task=mlm --data=wiki.test.raw
    python -m kd_jax.evaluate --model=distilgpt2 --teacher=gpt2 --task=clm --data=texts/

--workdir takes the best checkpoint of a stage of a finished run, on the run's own test split (or
validation split, where it has no other) or on --data, beside the run's teacher. --model takes any
HF checkpoint with its own tokenizer. Beside a teacher there are two figures more: KL(teacher ||
model) at temperature 1, in nats a token, and the share of tokens where both have the same first
choice. Masks of masked language modelling are those of every run's held-out text.
"""

import argparse
import json
from pathlib import Path

from kd_jax import cli
from kd_jax.errors import UserError
from kd_jax.evals.table import Table, of_runs
from kd_jax.recipes.evaluate import Options, Report, evaluate_checkpoint, evaluate_stage


def table(found: Report) -> Table:
    """The figures for people."""
    name = found.get("stage", Path(found["model"]).name)
    rows = f"rows of {found['seq_len']} tokens, {found['precision']}"
    beside = f", beside {found['teacher']}" if found["teacher"] else ""
    title = f"{found['data']['name']}, {found['task']}, {rows}{beside}"
    return of_runs([{name: found}], title)


def main(argv: list[str] | None = None) -> None:
    """Parses `argv`, evaluates, prints a table. Exits with status 1 and one line at a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m kd_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder of an HF checkpoint, or its id on the HF hub")
    what.add_argument("--workdir", metavar="RUN", help="directory of a finished run")
    parser.add_argument("--revision", help="of the hub id: branch, tag or commit")
    parser.add_argument("--stage", help="of the run: teacher, baseline, student (default)")
    parser.add_argument("--task", help="mlm or clm; that of the run")
    parser.add_argument("--data", metavar="PATH", help="text: a file, a folder or a glob")
    parser.add_argument("--split", choices=("validation", "test"), help="of the run's own data")
    parser.add_argument("--teacher", help="folder or hub id (the run's, else none)")
    parser.add_argument("--seq_len", type=int, help="tokens of a row (the run's, else 512)")
    parser.add_argument("--batch_size", type=int, help="rows of a batch (the run's, else 32)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="(the run's, else fp32)")
    parser.add_argument("--json", metavar="FILE", help="where to write every figure to")
    args = parser.parse_args(argv)
    with cli.plain_errors():
        _check(args)
        cli.start_jax()
        options = Options(args.teacher, args.seq_len, args.batch_size, args.precision)
        if args.workdir:
            stage = args.stage or "student"
            text = args.data, args.split
            found = evaluate_stage(args.workdir, stage, args.task, *text, options)
        else:
            found = evaluate_checkpoint(args.model, args.revision, args.task, args.data, options)
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
    table(found).print()


def _check(args: argparse.Namespace) -> None:
    """Raises UserError where flags do not go together."""
    if args.model:
        if not args.task or not args.data:
            raise UserError("--model needs --task (mlm or clm) and --data, the text to evaluate on")
        foreign = {"--stage": args.stage, "--split": args.split}
    else:
        foreign = {"--revision": args.revision, "--split": args.data and args.split}
    given = [name for name, value in foreign.items() if value is not None]
    if given:
        other = "--model" if args.model else "--workdir with --data" if args.data else "--workdir"
        raise UserError(f"{', '.join(given)} does not go with {other}; leave it out")


if __name__ == "__main__":
    main()
