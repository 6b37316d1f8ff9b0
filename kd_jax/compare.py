"""Compares finished runs: a report with tables over runs and stages, and curves over each other.

    python -m kd_jax.compare RUN [RUN ...] [--out=DIR]

Runs that differ only in their seed share a row, as mean ± standard deviation; differences
student - baseline are paired by seed. Tables go to the screen; DIR/report.html is one page with
everything in it, for a browser or to print; DIR/report.md says the same in Markdown and shows the
pictures DIR/*.png.
"""

from collections.abc import Sequence
from pathlib import Path

from kd_jax import flags


def parser() -> flags.Parser:
    """Makes the command's argument parser."""
    parser = flags.Parser("compare", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory of kd_jax.main")
    parser.add_argument(
        "--out", metavar="DIR", help="default: RUN/plots for one run, runs/comparison for several"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Compares the runs named in `argv` and prints tables; exits with status 1 at a mistake."""
    args = parser().parse(argv)
    from kd_jax import cli
    from kd_jax.recipes.compare import compare

    one = f"{args.runs[0].rstrip('/')}/plots"
    out = args.out or (one if len(args.runs) == 1 else str(Path("runs", "comparison")))
    with cli.plain_errors():
        cli.check_folder("--out", out)
        tables, written = compare(args.runs, out)
    for table in tables:
        table.print()
    print("wrote", *written, sep="\n  ")


if __name__ == "__main__":
    main()
