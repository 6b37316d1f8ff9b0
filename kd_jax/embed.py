"""Computes the vectors of a file of texts, with a sentence embedder.

    python -m kd_jax.embed --model=RUN/export/student --input=texts.txt --output=vectors.npy
    python -m kd_jax.embed --model=HUB_ID --input=passages.parquet --text=passage \
        --prompt_name=document --dimensions=256 --output=vectors.parquet

The model is a folder of sentence-transformers, or any checkpoint of a family that kd_jax knows:
then hidden states are averaged and normalized. The input is a .txt, one text a line, or a column of
a .csv, .tsv, .jsonl, .json or .parquet. A row without text ends the program before anything is
computed, or with --keep_empty has a vector of NaN.

A .npy holds the vectors, float32, in the order of the input; a .parquet has the columns `index`
(from 0), `id` where the input has it, and `vector`. The file gets its name when all is done; the
same command continues after an interruption.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from kd_jax import flags


def parser() -> flags.Parser:
    """Makes the command's argument parser."""
    parser = flags.Parser("embed", __doc__)
    parser.add_argument(
        "--model", required=True, help="folder of an embedder, or its id on the HF hub"
    )
    parser.add_files("the texts", empty="a vector of NaN")
    parser.add_argument(
        "--prompt_name",
        help="which of the model's prompts texts begin with, such as query or document (default: "
        "the one that the model names, mostly none)",
    )
    parser.add_argument("--prompt", help="what texts begin with, in place of the model's prompts")
    parser.add_argument(
        "--dimensions",
        type=flags.positive,
        help="of a vector, the first ones, not normalized again (default: the model's)",
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default fp32")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Embeds as `argv` says, prints the path; exits with status 1 and one line at a mistake."""
    args = vars(parser().parse(argv))
    from kd_jax import cli
    from kd_jax.recipes import embed

    model, revision, source, target = map(args.pop, ("model", "revision", "input", "output"))
    with cli.plain_errors():
        cli.check_folder("--output", str(Path(target).parent))
        cli.start_jax()
        options = embed.Options(**args)
        open_model = partial(embed.checkpoint, model, revision, options.precision)
        done = embed.embed_file(open_model, source, target, options)
    size = f"{done['rows']:,} vectors of {done['dimensions']} dimensions"
    print(f"wrote {done['output']}: {size} in {done['seconds']} s")


if __name__ == "__main__":
    main()
