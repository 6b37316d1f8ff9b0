"""What a training step costs in the first and in the sixth round of a sequential ensemble.

    python benchmarks/ensemble_step.py --text=runs/sampled_stories.txt [--json=FILE]

configs/ensemble_stories.py, in two ways: as it is by default, all rounds on the same
rows, whose logits are kept on disk; and "plain", with fresh=True, where teacher and members answer
in every step. Members of five short rounds are made first. Every row of the table is then one round
in a process of its own, with none or all five of them as past members; repeats go through all rows
in turn. A row's step is the median over its steps, and over repeats; its pass the seconds before
them, compilation aside, in which the fifth member is added to the mean on disk (plain: members are
stacked); "amortised" the step with its share of the pass, at the config's own numbers of rows and
of steps a round. Memory is the process's own at most, mapped files aside: from the start to the
last step, and to the end of the evaluation after it, in which all members answer in either way.
Keep the machine idle.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import rich.console
import rich.table

from kd_jax.configs import ensemble_stories

ROOT = Path(__file__).resolve().parent.parent
PAST = 5  # members before the last round that is timed
WARM_UP = 5  # steps that do not count
WAYS = {"kept": (), "plain": ("--config.ensemble.fresh=True",)}


def run(folder: Path, logits: Path, steps: int, flags: list[str]) -> dict:
    """One run; {"step_s", "pass_s", "peak_bytes", "judged_peak_bytes"} of its first round, which
    has so many steps."""
    command = [sys.executable, "-m", "kd_jax.main", *flags, f"--workdir={folder}"]
    command += [f"--config.cache.folder={logits}"]
    with open(f"{folder}.log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    this = folder / "round_1"
    peak = judged_peak = 0
    while process.poll() is None:
        memory = _own_memory(process.pid)
        if _steps_done(this) < steps:
            peak = max(peak, memory)
        if not (this / "results.json").exists():  # the export comes after it
            judged_peak = max(judged_peak, memory)
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed; see {folder}.log")
    with open(this / "timing.csv") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    first = json.loads((folder / "results.json").read_text())["rounds"][0]
    return {
        "step_s": statistics.median(seconds[WARM_UP:]),
        "pass_s": first["pass_seconds"] - first["pass_compile_seconds"],
        "peak_bytes": peak,
        "judged_peak_bytes": judged_peak,
    }


def _steps_done(folder: Path) -> int:
    path = folder / "metrics.csv"
    return path.read_text().count("\n") - 1 if path.exists() else 0


def _own_memory(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    kilobytes = [line.split()[1] for line in lines if line.startswith("RssAnon")]
    return 1024 * int(kilobytes[0]) if kilobytes else 0


def measure(options: argparse.Namespace, root: Path) -> list[dict]:
    """A dict for each way and number of past members, medians over repeats."""
    shared = [
        f"--config={ROOT / 'configs' / 'ensemble_stories.py'}",
        f"--config.data.train.path={Path(options.text).absolute()}",
        f"--config.ensemble.rows={options.rows}",
        "--config.log.every=1",
    ]

    def flags(steps: int, rounds: int) -> list[str]:
        each = {"steps": steps, "rounds": rounds, "eval.every": steps, "checkpoint.every": steps}
        return [*shared, *(f"--config.{key}={value}" for key, value in each.items())]

    run(root / "past", root / "logits", 2 * WARM_UP, flags(2 * WARM_UP, PAST))
    found: dict[tuple, list[dict]] = {}
    for repeat in range(options.repeats):
        for way, own in WAYS.items():
            for past in (0, PAST):
                name = f"{way}-{past}-{repeat}"
                logits = root / f"{name}-logits"
                # What the past members have left, and nothing of earlier repeats.
                shutil.copytree(root / "logits", logits, copy_function=os.link)
                before = [f"--config.ensemble.past_run_dirs=('{root / 'past'}',)"] if past else []
                these = [*flags(options.steps, 1), *own, *before]
                made = run(root / name, logits, options.steps, these)
                found.setdefault((way, past), []).append(made)
                shutil.rmtree(logits)
    rows = []
    for (way, past), runs in found.items():
        middle = {key: statistics.median(each[key] for each in runs) for key in runs[0]}
        config = ensemble_stories.get_config()
        whole = middle["pass_s"] * config.ensemble.rows / options.rows  # a pass over all of them
        share = whole / config.steps if way == "kept" and past else 0.0
        amortised = middle["step_s"] + share
        rows.append({"way": way, "round": past + 1} | middle | {"amortised_s": amortised})
    for row in rows:
        first = next(each for each in rows if each["way"] == row["way"] and each["round"] == 1)
        row["step_ratio"] = row["step_s"] / first["step_s"]
        for peak in ("peak", "judged_peak"):
            row[f"{peak}_ratio"] = row[f"{peak}_bytes"] / first[f"{peak}_bytes"]
    return rows


def show(rows: list[dict]) -> None:
    table = rich.table.Table(title="A step of a sequential ensemble")
    for heading in ("way", "round", "step (ms)", "of round 1's", "pass (s)", "amortised (ms)"):
        table.add_column(heading, justify="right")
    for heading in ("peak (GB)", "of round 1's", "and evaluation (GB)", "of round 1's"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            *(row["way"], str(row["round"])),
            *(f"{1e3 * row['step_s']:.1f}", f"{row['step_ratio']:.2f}", f"{row['pass_s']:.1f}"),
            f"{1e3 * row['amortised_s']:.1f}",
            *(f"{row['peak_bytes'] / 1e9:.2f}", f"{row['peak_ratio']:.2f}"),
            *(f"{row['judged_peak_bytes'] / 1e9:.2f}", f"{row['judged_peak_ratio']:.2f}"),
        )
    rich.console.Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True, help="training text")
    parser.add_argument("--rows", type=int, default=320, help="of text, which all rounds share")
    parser.add_argument("--steps", type=int, default=60, help="of a timed round")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        rows = measure(options, Path(root))
    show(rows)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
