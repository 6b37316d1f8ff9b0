"""An on-policy step, side by side: kd_jax and TRL's DistillationTrainer, on the same models.

    pip install --no-deps trl accelerate datasets
    python benchmarks/on_policy_runs.py --prepare    # the student, and the stories
    python benchmarks/onpolicy_step.py --json=FILE [--python-trl=PATH]

A step: the student writes 64 tokens after each of 32 prompts of 16 tokens, at temperature 1 from
the whole vocabulary, or fewer where a story ends; the teacher, stories260K, judges them; reverse
KL; an AdamW update. Each system takes the steps in its own loop, with its own batches of the same
prompts; the student is half as large as the teacher. "writing" is what the writing of a batch
takes, from choosing prompts to having a batch to learn from; the rest of a step is "learning".
bf16 computes in bfloat16 over float32 weights in both.

Every row runs in a process of its own; rounds go through the rows in turn (rounds.py), so that a
slow spell of the machine falls on all of them. A row's figures are medians over rounds of its
medians over steps; the first steps, which compile, are not among them ("first step" is the longest
of the very first ones). TRL runs with and without kd_jax's settings of the allocator, and the
better of both counts. With --json the same command continues after an interruption. --python-trl
names the interpreter that runs TRL's rows, where that is another one than this.

ratio is a row's step divided by kd_jax's at the same precision. Keep the machine idle: "others" is
the share of it that other processes took meanwhile; PyTorch's threads wait for each other, and
suffer more from them.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping

import rich.progress
from onpolicy_cases import sizes
from pretrain_step import PRECISIONS, launch
from rounds import Rounds, measured, print_table, times

SYSTEMS = {  # in the order of the table; what computes a row
    "kd_jax": ("onpolicy_kd_jax.py",),
    "pytorch-trl": ("onpolicy_trl.py",),
    "pytorch-trl-1-thread": ("onpolicy_trl.py", "--threads=1"),
}
HAVE = "import accelerate, datasets, trl; trl.DistillationTrainer"

Row = tuple[str, str]  # system, precision


def measure(rows: list[Row], args: argparse.Namespace) -> Rounds:
    """Results of every row."""
    with tempfile.TemporaryDirectory() as folder, rich.progress.Progress() as progress:
        cache = pathlib.Path(folder)
        bar = progress.add_task("", total=None)
        made = ["onpolicy_models.py", f"--out={cache}", *["--tiny"] * args.tiny]
        made += [f"--{name}={getattr(args, name)}" for name in ("teacher", "student", "text")]
        found = launch(made, cache)["prompts"]
        if found < sizes(args)[0]:
            raise SystemExit(f"{args.text} has {found} usable prompts, a step takes more")

        def child(row: Row, environment: Mapping[str, str]) -> dict:
            system, precision = row
            options = [f"--precision={precision}", f"--folder={cache}", f"--steps={args.steps}"]
            python = sys.executable if system == "kd_jax" else args.python_trl
            command = [*SYSTEMS[system], *options, *["--tiny"] * args.tiny]
            return launch(command, cache, more=environment, python=python)

        group = lambda row: row[1:]  # noqa: E731
        return measured(args, rows, seconds_of, child, group, (progress, bar), not args.tiny)


def median(runs: list[dict], key: str) -> float:
    return statistics.median(statistics.median(run[key]) for run in runs)


def seconds_of(row: Row, runs: list[dict]) -> float:
    """A row's step: the median over rounds of its median step."""
    return median(runs, "seconds")


def summarise(rounds: Rounds) -> list[dict]:
    """One dict a row, as --json writes them."""
    results, summary = rounds.better(), []
    for (system, precision), runs in results.items():
        step, kd_jax = median(runs, "seconds"), results.get(("kd_jax", precision))
        writing = median(runs, "writing")
        summary.append(
            {
                "onpolicy": system,
                "precision": precision,
                "median_s": step,
                "writing_s": writing,
                "learning_s": step - writing,
                "cpu_s": median(runs, "cpu"),
                "tokens": statistics.mean(each for run in runs for each in run["tokens"]),
                "ratio": step / median(kd_jax, "seconds") if kd_jax else None,
                "writing_ratio": writing / median(kd_jax, "writing") if kd_jax else None,
                "first_s": max(run["first_s"] for run in runs),
                "first_loss": statistics.median(run["losses"][0] for run in runs),
            }
            | rounds.about((system, precision), runs)
        )
    return summary


def show(summary: list[dict]) -> None:
    seconds = "median_s", "writing_s", "learning_s", "cpu_s"
    found = [
        (
            row,
            [
                *(row[key] for key in ("precision", "onpolicy")),
                *(f"{row[key]:.3f}" for key in seconds),
                f"{row['tokens']:,.0f}",
                *(times(row[key]) for key in ("ratio", "writing_ratio")),
                f"{row['first_s']:.1f}",
                f"{row['first_loss']:.3f}",
            ],
        )
        for row in summary
    ]
    headings = ["s/step", "writing", "learning", "CPU s", "tokens", "ratio", "of writing"]
    headings += ["first step", "loss"]
    labels = "precision", "system"
    print_table("One on-policy step", labels, headings, found, sections=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data, start = pathlib.Path(os.environ.get("KD_JAX_DATA", "data")), "runs/onpolicy_start"
    teacher = data / ".." / "models" / "stories260K"
    parser.add_argument("--teacher", type=pathlib.Path, default=teacher, help="a HF checkpoint")
    parser.add_argument("--student", type=pathlib.Path, default=f"{start}/export/student")
    parser.add_argument("--text", type=pathlib.Path, default="runs/real_stories.txt")
    parser.add_argument("--python-trl", default=sys.executable, help="interpreter that has trl")
    parser.add_argument("--rows", default="", help="only these, as SYSTEM or SYSTEM-PRECISION,...")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of a row")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to test the benchmark")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    args = parser.parse_args()

    rows = [(system, precision) for precision in PRECISIONS for system in SYSTEMS]
    if args.rows:
        wanted = set(args.rows.split(","))
        names = {name for s, p in rows for name in (s, f"{s}-{p}")}
        if wanted - names:
            parser.error(f"--rows: unknown {sorted(wanted - names)}; have {sorted(names)}")
        rows = [(s, p) for s, p in rows if {s, f"{s}-{p}"} & wanted]
    for name in ("teacher", "student", "text"):
        if not args.tiny and not getattr(args, name).exists():
            parser.error(
                f"--{name}: there is no {getattr(args, name)}: set KD_JAX_DATA, and run "
                f"python benchmarks/on_policy_runs.py --prepare"
            )
    if any(system != "kd_jax" for system, _ in rows):
        checked = subprocess.run([args.python_trl, "-c", HAVE], capture_output=True, text=True)
        if checked.returncode:
            why = (checked.stderr.strip().splitlines() or ["it failed"])[-1]
            parser.error(
                f"{args.python_trl} has no TRL ({why}): pip install --no-deps trl accelerate "
                f"datasets, give --python-trl, or leave its rows out with --rows=kd_jax"
            )
    rounds = measure(rows, args)
    summary = summarise(rounds)
    show(summary)
    rounds.finish(summary, args.json)


if __name__ == "__main__":
    main()
