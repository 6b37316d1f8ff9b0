"""Compares what may be kept of a teacher's answers, at equal bytes a token.

    python benchmarks/sampled_text.py --model=$KD_JAX_DATA/../models/stories260K --texts=6000 \
      --out=runs/sampled_stories.txt
    python benchmarks/offline_runs.py [--seeds=5] [--kept all ce ...]

The arms are the variants of configs/offline_stories.py, with its settings. Everything is in
runs/offline, and what is there is not done again: the same command goes on after an interruption.
Each finished arm and seed is a row of results/offline_stories.json.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import results
from kd_jax import api
from kd_jax.configs import offline_stories
from kd_jax.train import records

ROOT = Path("runs/offline")
ARMS = {  # what tables call the variants
    "all": "all 512 logits",
    "uniform": "top 4, uniform rest",
    "bucket": "top 4, rest as one",
    "renormalised": "top 4, renormalised",
    "rskd": "14 draws (RS-KD)",
    "ce": "labels alone",
}
FIGURES = ("loss", "kl", "ece", "agreement")


def run(kept: str, seed: int) -> dict[str, Any]:
    """Runs an arm, or reads what it came to: its row."""
    config = offline_stories.get_config(kept)
    config.seed = seed
    found = api.distil(config, workdir=ROOT / f"{kept}-{seed}")
    figures, begin, each = found.figures["student"], 0, []
    for row in records.read(found.folder / "student" / "timing.csv"):
        each.append(float(row["seconds"]) / (int(row["step"]) - begin))
        begin = int(row["step"])
    about = {"arm": ARMS[kept], "against": "" if kept == "all" else ARMS["all"], "seed": seed}
    about |= {"steps": config.steps, "seconds": round(statistics.median(each) * config.steps, 2)}
    return about | {"equal": "steps"} | {key: figures[key] for key in FIGURES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kept", nargs="+", default=list(ARMS), choices=list(ARMS))
    options = parser.parse_args()
    ROOT.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for kept in options.kept:
            file = ROOT / f"{kept}-{seed}.json"
            if not file.exists():
                file.write_text(json.dumps(run(kept, seed)) + "\n")
                print(file.read_text(), flush=True)
    found = [ROOT / f"{kept}-{seed}.json" for kept in ARMS for seed in range(options.seeds)]
    rows = [json.loads(file.read_text()) for file in found if file.exists()]
    for arm in {row["arm"] for row in rows}:
        own = [row for row in rows if row["arm"] == arm]
        seconds = min(row["seconds"] for row in own)
        for row in own:
            row["seconds"] = seconds
    note = (
        "s: of the steps of the seed that other processes disturbed least, on one core, without "
        "those of the teacher's one pass."
    )
    results.keep_rows("offline_stories", rows, "python benchmarks/offline_runs.py", note)


if __name__ == "__main__":
    main()
