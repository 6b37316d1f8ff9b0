"""Compares ways to teach a small student: on the data's text, on the teacher's, on its own.

    python benchmarks/on_policy_runs.py --prepare       # texts and the student that all begin from
    python benchmarks/on_policy_runs.py --tune          # learning rates, by one seed of its own
    python benchmarks/on_policy_runs.py --time          # a step of each arm; an idle machine
    python benchmarks/on_policy_runs.py [--seeds=5]     # all arms at equal steps
    python benchmarks/on_policy_runs.py --seconds       # cheaper arms again, for as long

Everything is in runs/on_policy, and what is there is not done again: the same command goes on after
an interruption. Each finished arm and seed is a row of results/onpolicy_stories.json, or, at equal
seconds, of results/onpolicy_stories_seconds.json.

Teacher: stories260K, in models/ next to $KD_JAX_DATA. Student: half as large, trained on stories
that the teacher wrote (configs/onpolicy_stories.py:start). Prompts and data: the real stories in
$KD_JAX_DATA/lm_text, of which the last fifth is the test.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import results
from kd_jax import api
from kd_jax.configs import onpolicy_stories
from kd_jax.stages import sequence
from kd_jax.train import records

ROOT = Path("runs/on_policy")
REAL = [Path(f"runs/real_stories{part}.txt") for part in ("", "_test")]
TEST = 0.2  # of the stories, the last ones
BEGINS = re.compile(r"Once\b|One day, (?:a|an|there)\b")  # a story; other paragraphs go on with it
TERMS, SHARES = ("kl", "jsd", "reverse_kl"), (0.0, 0.5, 1.0)
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{term} {share:g}": (term, {"rollout.lambda": share}) for term in TERMS for share in SHARES
}
ARMS["policy gradient 1"] = ("policy_gradient", {})  # of reverse KL
ARMS["sequence"] = ("sequence", {})
ARMS["ce"] = ("ce", {})
# What an arm is compared with: the same divergence on given text, or that text alone.
AGAINST = {arm: f"{arm.rpartition(' ')[0]} 0" for arm in ARMS}
AGAINST |= {f"{term} 0": "ce" for term in TERMS} | {"sequence": "ce", "ce": ""}
AGAINST["policy gradient 1"] = "reverse_kl 1"
RATES, TUNED_BY = (3e-4, 1e-3, 3e-3), 100  # learning rates that were tried; their seed
SLOWEST = "reverse_kl 1"  # as long as this arm takes, the others may take
FIGURES = "loss kl own_kl own_reverse_kl own_entropy own_length own_ended".split()


def prepare() -> None:
    """Writes the stories to files, and trains the student that all arms begin from."""
    text = Path(os.environ["KD_JAX_DATA"], "lm_text", "tinystories_197k.txt").read_text()
    stories: list[list[str]] = []
    for paragraph in filter(None, map(str.strip, text.split("\n\n"))):
        if BEGINS.match(paragraph) or not stories:
            stories.append([])
        stories[-1].append(" ".join(paragraph.split()))
    cut = round(len(stories) * (1 - TEST))
    for file, part in zip(REAL, (stories[:cut], stories[cut:]), strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n\n".join(" ".join(story) for story in part) + "\n")
        print(f"{file}: {len(part)} stories")
    api.distil(onpolicy_stories.get_config("start"), workdir="runs/onpolicy_start")


def _config(arm: str, seed: int, rate: float, steps: int = 0) -> Any:
    variant, changes = ARMS[arm]
    config = onpolicy_stories.get_config(variant)
    config.seed, config.optim.learning_rate = seed, rate
    config.steps = steps or config.steps
    config.eval.every = config.checkpoint.every = config.steps  # the last checkpoint is reported
    config.update_from_flattened_dict(changes)
    return config


def _distilled(arm: str, config: Any) -> Any:
    about = arm.replace(" ", "-"), f"{config.optim.learning_rate:g}", config.steps, config.seed
    return api.distil(config, workdir=ROOT / "-".join(map(str, about)))


def run(arm: str, seed: int, rate: float, steps: int = 0) -> dict[str, Any]:
    """Runs an arm, or reads what it came to: its row."""
    config = _config(arm, seed, rate, steps)
    found = _distilled(arm, config)
    row = {"arm": arm, "against": AGAINST[arm], "seed": seed, "rate": rate, "steps": config.steps}
    figures = found.figures["student"]
    step, before = _seconds(arm)
    row["seconds"] = round(before + step * config.steps, 2)
    return row | {key: figures[key] for key in FIGURES}


def time(arm: str) -> None:
    """Measures the seconds of a step of an arm, without compilation, evaluation and saving: the
    median row of timing.csv; and those of the teacher's texts before the first one."""
    file, begin, each = _file("time", arm), 0, []
    if file.exists():
        return
    config = _config(arm, TUNED_BY, RATES[0])
    os.environ["KD_JAX_CACHE"] = str(ROOT / "cache")
    shutil.rmtree(ROOT / "cache" / "texts", ignore_errors=True)
    with _watch(sequence, "written") as seconds:
        made = api.distil(config, workdir=ROOT / f"time-{arm.replace(' ', '-')}")
    for row in records.read(made.folder / "student" / "timing.csv"):
        each.append(float(row["seconds"]) / (int(row["step"]) - begin))
        begin = int(row["step"])
    found = statistics.median(each), sum(seconds)
    file.write_text(json.dumps(found) + "\n")
    print(f"{arm}: {1000 * found[0]:.1f} ms a step, {found[1]:.1f} s before", flush=True)


@contextlib.contextmanager
def _watch(module: Any, name: str) -> Iterator[list[float]]:
    """Notes the seconds of each call of a function of a module."""
    function, seconds = getattr(module, name), []

    def watched(*args: Any) -> Any:
        begin = perf_counter()
        try:
            return function(*args)
        finally:
            seconds.append(perf_counter() - begin)

    with mock.patch.object(module, name, watched):
        yield seconds


def tune(arms: list[str]) -> None:
    """Chooses each arm's learning rate: the lowest sum of the two KL to the teacher on held-out
    prompts and text, at the end of a run with a seed that is not reported."""
    for arm in arms:
        file, scores = _file("rate", arm), {}
        if file.exists():
            continue
        for rate in RATES:
            folder = _distilled(arm, _config(arm, TUNED_BY, rate)).folder
            last = records.read(folder / "student" / "eval.csv")[-1]
            scores[rate] = float(last["kl"]) + float(last["own_kl"])
            print(f"{arm}: rate {rate:g}: {scores[rate]:.4f}", flush=True)
        file.write_text(json.dumps(scores) + "\n")


def _file(*about: object) -> Path:
    return ROOT / f"{'-'.join(map(str, about)).replace(' ', '-')}.json"


def _rate(arm: str) -> float:
    scores = json.loads(_file("rate", arm).read_text())
    return float(min(scores, key=scores.get))


def keep(equal: str) -> None:
    """Writes the result of the arms at equal "steps" or "seconds"."""
    rows = (json.loads(file.read_text()) for file in ROOT.glob(f"{equal}-*.json"))
    rows = sorted(rows, key=lambda row: (list(ARMS).index(row["arm"]), row["seed"]))
    note = (
        f"{len(RATES)} learning rates were tried for each arm, with another seed, on held-out "
        f"stories; the last checkpoint is reported. seconds: of the steps, each arm's timed "
        f"alone on two cores, with the teacher's texts where it writes them."
    )
    name, flag = {"steps": ("", ""), "seconds": ("_seconds", " --seconds")}[equal]
    command = f"python benchmarks/on_policy_runs.py{flag}"
    results.keep_rows(f"onpolicy_stories{name}", rows, command, note)


def main() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--seconds", action="store_true", help="equal seconds instead of steps")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    options = parser.parse_args()
    if options.prepare:
        return prepare()
    ROOT.mkdir(parents=True, exist_ok=True)
    if options.tune:
        return tune(options.arms)
    if options.time:
        return list(map(time, options.arms))
    equal = "seconds" if options.seconds else "steps"
    for seed in range(options.seeds):
        for arm in options.arms:
            file = _file(equal, arm, seed)
            if not file.exists():
                steps = _as_long(arm) if options.seconds else 0
                row = run(arm, seed, _rate(arm), steps) | {"equal": equal}
                file.write_text(json.dumps(row) + "\n")
                print(row, flush=True)
    keep(equal)


def _seconds(arm: str) -> tuple[float, float]:
    """Reads the seconds of a step of an arm, and of what comes before the first one."""
    file = _file("time", arm)
    if not file.exists():
        raise SystemExit(f"error: {file} is missing: run --time first, on an idle machine")
    step, before = json.loads(file.read_text())
    return step, before


def _as_long(arm: str) -> int:
    """Computes the steps of an arm that take as long as the dearest arm's."""
    (slow, _), (own, before) = _seconds(SLOWEST), _seconds(arm)
    return round((_config(SLOWEST, 0, 0.0).steps * slow - before) / own)


if __name__ == "__main__":
    main()
