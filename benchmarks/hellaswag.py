"""HellaSwag, side by side: kd_jax and the same scoring in PyTorch with HF modules.

    python benchmarks/hellaswag.py --json hellaswag.json

Every ending of every question is scored after its context, in batches of 16 endings. PyTorch does
it as the lm-evaluation-harness: the longest rows first, padded on the right, one forward pass over
context and ending for each ending, log-softmax of all tokens; with its own number of threads, and
with one, which is faster where batches are small or the machine is busy. kd_jax makes the pass of
recipes/evaluate.py, where the endings of a question share their context, with its own number of
endings a batch, and with PyTorch's.

Texts are tokenised before. A process makes one pass that compiles and is reported as "first", then
timed ones. Every row runs in a process of its own; rounds go through the rows in turn (rounds.py),
so that a slow spell of the machine falls on all of them, and a row's figure is its fastest pass,
the one that others disturbed least. PyTorch runs with and without kd_jax's settings of the
allocator, and the better of both counts. With --json the same command continues after an
interruption. ratio is a row's speed divided by that of the best PyTorch row. "apart" is
the largest difference of a log-likelihood from the first PyTorch row's, in nats.

Model: models/stories260K beside $KD_JAX_DATA, or --model. Questions: hellaswag/ of $KD_JAX_DATA, or
--data. Keep the machine idle: "others" is the share of it that other processes took meanwhile.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
from collections.abc import Mapping

import numpy as np
import rich.progress
from pretrain_step import launch
from rounds import Rounds, measured, print_table, times

SYSTEMS = {  # in the order of the table; what computes a row
    "kd_jax": ("hellaswag_kd_jax.py", "--own_batch_size"),
    "kd_jax-same-batch": ("hellaswag_kd_jax.py",),
    "pytorch": ("hellaswag_pytorch.py",),
    "pytorch-1-thread": ("hellaswag_pytorch.py", "--threads=1"),
}


def measure(systems: list[str], args: argparse.Namespace) -> Rounds:
    """Results of every row."""
    with tempfile.TemporaryDirectory() as folder, rich.progress.Progress() as progress:
        cache = pathlib.Path(folder)
        bar = progress.add_task("", total=None)

        def child(row: tuple[str], environment: Mapping[str, str]) -> dict:
            values = cache / "values.npz"
            arguments = [
                *SYSTEMS[row[0]],
                f"--model={args.model}",
                f"--data={args.data}",
                f"--batch_size={args.batch_size}",
                f"--steps={args.passes}",
                f"--out={values}",
            ]
            found = launch(arguments, cache, more=environment)
            with np.load(values) as written:
                return found | {key: written[key].tolist() for key in written.files}

        rows = [(system,) for system in systems]
        rounds = measured(args, rows, seconds_of, child, lambda row: (), (progress, bar))
    return rounds


def seconds_of(row: tuple[str], runs: list[dict]) -> float:
    """A row's fastest pass."""
    return min(min(run["seconds"]) for run in runs)


def summarise(rounds: Rounds) -> list[dict]:
    """One dict a row, as --json writes them."""
    results = {row[0]: runs for row, runs in rounds.better().items()}
    seconds = {system: seconds_of((system,), runs) for system, runs in results.items()}
    pytorch = [system for system in results if system.startswith("pytorch")]
    best = min((seconds[system] for system in pytorch), default=None)
    summary = []
    for system, runs in results.items():
        values_N = np.array(runs[0]["log_likelihoods"])
        apart = np.abs(values_N - results[pytorch[0]][0]["log_likelihoods"]) if pytorch else None
        summary.append(
            {
                "system": system,
                "pass_s": seconds[system],
                "median_s": statistics.median(s for run in runs for s in run["seconds"]),
                "first_s": float(runs[0]["first"]),
                "endings_per_s": len(values_N) / seconds[system],
                "ratio": best and best / seconds[system],
                "apart": None if apart is None else float(apart.max()),
                "acc": float(runs[0]["acc"]),
                "acc_norm": float(runs[0]["acc_norm"]),
            }
            | rounds.about((system,), runs)
        )
    return summary


def show(summary: list[dict]) -> None:
    found = [
        (
            row,
            [
                row["system"],
                *(f"{row[key]:.2f}" for key in ("pass_s", "first_s")),
                f"{row['endings_per_s']:,.0f}",
                times(row["ratio"]),
                "-" if row["apart"] is None else f"{row['apart']:.1e}",
                *(f"{row[key]:.4f}" for key in ("acc", "acc_norm")),
            ],
        )
        for row in summary
    ]
    headings = "s/pass", "first", "endings/s", "ratio", "apart", "acc", "acc_norm"
    print_table("HellaSwag", ["system"], headings, found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = pathlib.Path(os.environ.get("KD_JAX_DATA", "data"))
    file = folder / "hellaswag" / "hellaswag_val_1000.jsonl"
    model = folder.parent / "models" / "stories260K"
    parser.add_argument("--data", type=pathlib.Path, default=file, help="HellaSwag's .jsonl")
    parser.add_argument("--model", type=pathlib.Path, default=model, help="an HF checkpoint")
    parser.add_argument("--rows", default="", help="only these systems, with commas")
    parser.add_argument("--batch_size", type=int, default=16, help="endings")
    parser.add_argument("--passes", type=int, default=2, help="timed passes of a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of a row")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    args = parser.parse_args()

    systems = args.rows.split(",") if args.rows else list(SYSTEMS)
    if set(systems) - SYSTEMS.keys():
        parser.error(f"--rows: unknown {sorted(set(systems) - SYSTEMS.keys())}; have {[*SYSTEMS]}")
    if not args.data.is_file():
        parser.error(f"{args.data} does not exist: give --data, or set KD_JAX_DATA")
    if not (args.model / "config.json").is_file():
        parser.error(f"{args.model} is no HF checkpoint: give --model")
    rounds = measure(systems, args)
    summary = summarise(rounds)
    show(summary)
    rounds.finish(summary, args.json)


if __name__ == "__main__":
    main()
