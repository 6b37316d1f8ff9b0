"""Labels a file of texts, or answers questions, with a trained model.

    python -m kd_jax.predict --model=RUN/export/student --input=reviews.txt --output=labels.jsonl
    python -m kd_jax.predict --model=HUB_ID --input=pairs.csv --text=premise --pair=hypothesis \
        --output=labels.csv
    python -m kd_jax.predict --model=HUB_ID --input=questions.json --output=answers.jsonl

The model's own head decides, by the `architectures` of its config.json. A classifier or regression
reads a .txt, one text a line, or the columns of a .csv, .tsv, .jsonl, .json or .parquet. A model
that answers questions reads SQuAD's .json, or a table with the columns question and context. A
column "id" is copied. A row without text ends the program before anything is computed, or with
--keep_empty has an empty answer.

The output's suffix says how it is written: .jsonl, .csv or .tsv, one row for each text, in the
order of the input: `index` (from 0) and `label`, its `probability`, and that of every class; or
`score`; or `answer`, `probability`, `start` and `end` (characters), and `no_answer`, the
probability that there is none, among the 20 best spans.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from kd_jax import flags


def parser() -> flags.Parser:
    """Makes the command's argument parser."""
    parser = flags.Parser("predict", __doc__)
    parser.add_argument(
        "--model", required=True, help="folder of an HF checkpoint, or its id on the HF hub"
    )
    parser.add_files("what to label", empty="an empty answer")
    parser.add_argument("--pair", help="column of a second text (default none)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default fp32")
    parser.add_argument(
        "--null_threshold",
        type=float,
        help="leave a question unanswered where no answer scores more than this above the best "
        "answer, such as 0.0 (default: always answer)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Predicts as `argv` says, prints the path; exits with status 1 and one line at a mistake."""
    args = vars(parser().parse(argv))
    from kd_jax import cli
    from kd_jax.recipes import predict

    model, revision, source, target = map(args.pop, ("model", "revision", "input", "output"))
    with cli.plain_errors():
        cli.check_folder("--output", str(Path(target).parent))
        cli.start_jax()
        options = predict.Options(**args)
        open_model = partial(predict.checkpoint, model, revision, options.precision)
        done = predict.predict_file(open_model, source, target, options)
    print(f"wrote {done['output']}: {done['rows']:,} rows in {done['seconds']} s")


if __name__ == "__main__":
    main()
