"""A loss over a vocabulary, side by side: kd_jax's engine and TRL's chunked kernels, both compared
with float64.

    pip install --no-deps trl accelerate     # or pip install -e '.[bench]', which may change others
    python benchmarks/loss.py --json=loss.json

A row is one loss at one precision: its value, the mean over the rows of features, and its gradients
with respect to the student's features and unembedding (loss_case.py has shapes and inputs, and the
same in float64). Every row runs in a process of its own; rounds go through the rows in turn
(rounds.py), and a row's figure is the median over rounds of its median. TRL runs with and without
kd_jax's settings of the allocator, and the better of both counts. With --json the same command
continues after an interruption.

Errors are ||found - exact|| / ||exact||. In bf16 both systems have float32 parameters that
bfloat16 holds exactly, multiply in bfloat16 and return float32. Peak memory is the process's.

Keep the machine idle: "others" is the share of it that other processes took meanwhile.
"""

import argparse
import pathlib
import statistics
import tempfile
from collections.abc import Mapping

import rich.progress
from loss_case import LOSSES, PRECISIONS
from pretrain_step import launch, seconds_of
from rounds import Rounds, measured, print_table, times

SYSTEMS = {"kd_jax": "loss_kd_jax.py", "pytorch-trl": "loss_trl.py"}
PARTS = ("value", "features", "unembedding")

Row = tuple[str, str, str]  # loss, precision, system


def measure(rows: list[Row], args: argparse.Namespace) -> Rounds:
    with tempfile.TemporaryDirectory() as folder, rich.progress.Progress() as progress:
        cache, tiny = pathlib.Path(folder), ["--tiny"] * args.tiny
        bar = progress.add_task("", total=None)
        for precision in {precision: None for _, precision, _ in rows}:
            progress.update(bar, description=f"float64 {precision}")
            launch(["loss_case.py", f"--out={cache}", f"--precision={precision}", *tiny], cache)

        def child(row: Row, environment: Mapping[str, str]) -> dict:
            loss, precision, system = row
            own = [f"--folder={cache}", f"--loss={loss}", f"--precision={precision}"]
            own.append(f"--steps={args.steps}")
            found = launch([SYSTEMS[system], *own], cache, more=environment)
            progress.print(*row, f"{statistics.median(found['seconds']):.3f} s", found["errors"])
            return found

        group = lambda row: row[:2]  # noqa: E731
        return measured(args, rows, seconds_of, child, group, (progress, bar), not args.tiny)


def summarise(rounds: Rounds) -> list[dict]:
    """One dict a row, as --json writes them."""
    results = rounds.better()
    seconds = {row: seconds_of(row, runs) for row, runs in results.items()}
    summary = []
    for (loss, precision, system), runs in results.items():
        own = seconds.get((loss, precision, "kd_jax"))
        errors = [run["errors"] for run in runs]
        summary.append(
            {
                "loss": loss,
                "precision": precision,
                "system": system.removeprefix("pytorch-"),
                "median_s": seconds[loss, precision, system],
                "ratio": own and seconds[loss, precision, system] / own,
                "errors": {part: statistics.median(e[part] for e in errors) for part in PARTS},
            }
            | rounds.about((loss, precision, system), runs)
        )
    return summary


def show(summary: list[dict]) -> None:
    labels = "loss", "precision", "system"
    found = [
        (
            row,
            [
                *(row[label] for label in labels),
                f"{row['median_s']:.3f}",
                times(row["ratio"]),
                *(f"{row['errors'][part]:.2e}" for part in PARTS),
            ],
        )
        for row in summary
    ]
    title = "Value and gradients of a loss, errors relative to float64"
    print_table(title, labels, ["s", "times kd_jax's", *PARTS], found, sections=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loss", choices=LOSSES, help="only this one")
    parser.add_argument("--precision", choices=PRECISIONS, help="only this one")
    parser.add_argument("--system", choices=SYSTEMS, help="only this one")
    parser.add_argument("--steps", type=int, default=3, help="timed calls of a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of a row")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to test the benchmark")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    args = parser.parse_args()
    rows = [
        (loss, precision, system)
        for loss in ([args.loss] if args.loss else LOSSES)
        for precision in ([args.precision] if args.precision else PRECISIONS)
        for system in ([args.system] if args.system else SYSTEMS)
    ]
    rounds = measure(rows, args)
    summary = summarise(rounds)
    show(summary)
    rounds.finish(summary, args.json)


if __name__ == "__main__":
    main()
