"""Writes texts after a file of prompts or chats, with a causal language model.

    python -m kd_jax.generate --model=FOLDER_OR_HUB_ID --input=prompts.txt --output=written.jsonl
    python -m kd_jax.generate --workdir=RUN --input=chats.jsonl --output=answers.jsonl \
        --temperature=0.7 --top_p=0.9 --samples=4

The input is a .txt, one prompt a line, or a .csv, .tsv, .jsonl, .json or .parquet with a column of
prompts (--text), or of chats (--messages, with the column `tools` if there is one), to which the
tokenizer's chat template is applied; an answer at the end of a chat is left out, since it is what
is written. A column "id" is copied.

The output, JSON lines in the order of the input: `index` (from 0), `text`, `tokens` (how many),
`ended` (the model ended the text, and not the limit), `logp` (log-probability, nats). It gets its
name when all is done; the same command continues after an interruption, and a row's text does not
depend on that, nor on the batches or devices.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from kd_jax import flags


def parser() -> flags.Parser:
    """Makes the command's argument parser."""
    parser = flags.Parser("generate", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder of an HF checkpoint, or its id on the HF hub")
    what.add_argument("--workdir", metavar="RUN", help="directory of a finished run")
    parser.add_argument("--stage", help="of the run; by default the one that it is about")
    parser.add_files("what to write after", "the prompts")
    parser.add_argument(
        "--messages", help='column of the chats (default "messages", where there is one)'
    )
    parser.add_argument(
        "--max_new_tokens", type=flags.positive, default=128, help="of a text (default 128)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of the draws; 0 (default): greedy"
    )
    parser.add_argument(
        "--top_k", type=int, default=0, help="most probable tokens to draw from (default 0: all)"
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="of their probability, in sum (default 1: all)"
    )
    parser.add_argument(
        "--samples", type=flags.positive, default=1, help="texts of each prompt (default 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="(the run's, else fp32)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Writes as `argv` says, prints the path; exits with status 1 and one line at a mistake."""
    args = vars(parser().parse(argv))
    from kd_jax import cli
    from kd_jax.errors import UserError
    from kd_jax.recipes import generate

    model, revision, workdir, stage = map(args.pop, ("model", "revision", "workdir", "stage"))
    source, target = map(args.pop, ("input", "output"))
    options = generate.Options(**args)
    with cli.plain_errors():
        if workdir and revision or model and stage:
            raise UserError("--revision goes with --model, and --stage with --workdir")
        cli.check_folder("--output", str(Path(target).parent))
        cli.start_jax()
        about = (workdir, stage) if workdir else (model, revision)
        opening = generate.stage_of if workdir else generate.checkpoint
        open_model = partial(opening, *about, options.precision)
        done = generate.generate_file(open_model, source, target, options)
    print(f"wrote {done['output']}: {done['rows']:,} texts in {done['seconds']} s")


if __name__ == "__main__":
    main()
