"""Kills a small run ten times with SIGKILL and compares what it leaves with an undisturbed one.

    python benchmarks/kill_resume.py [--case=pretrain] [--seed=0] [--folder=DIR] [--json=FILE]

The run is configs/quickstart.py:smoke with more steps, and dropout in all its models. It is killed
at two random steps and within one checkpoint write of each of its three stages, and within the
export; each time the same command goes on. With --case=substitute it is one stage of
configs/substitute_gpt2.py:smoke in three phases, killed at two random steps of each, within two
checkpoint writes, a swap and the export. With --case=ensemble it is three rounds of
configs/ensemble_stories.py:smoke, killed at two random steps of each, within two checkpoint writes,
a pass that adds a member, and the export. With
--case=on_policy it is the stage of configs/onpolicy_stories.py:smoke, which writes most of what it
learns from, killed at seven random times within steps, within two checkpoint writes, and the
export. Then final and best checkpoints (parameters and optimizer), metrics.csv, eval.csv,
samples.jsonl, results and the exported weights have to be the same bit for bit, and no more steps
may have been taken than undisturbed + kills x save interval. Kills come from
outside, by watching the run directory. The exit status is 1 where anything differs.
"""

import argparse
import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("teacher", "baseline", "student")
STEPS, SAVE, EVALUATE = 64, 16, 8
COMMAND = (
    f"--config={ROOT / 'configs/quickstart.py'}:smoke",
    f"--config.steps={STEPS}",
    "--config.batch_size=512",  # for steps that are not much shorter than a checkpoint's write
    f"--config.checkpoint.every={SAVE}",
    f"--config.eval.every={EVALUATE}",
)
ROUNDS = ("round_1", "round_2", "round_3")
PHASE = 20  # steps from one swap to the next
SUBSTITUTE = (
    f"--config={ROOT / 'configs/substitute_gpt2.py'}:smoke",
    "--config.stages={'substitute': {}}",
    "--config.teacher.architecture.n_layer=4",  # of which three go
    f"--config.substitution.steps={PHASE}",
    "--config.substitution.fit_steps=8",
    *COMMAND[1:],
)
ROUND = 48  # steps
DROPOUT = "'embd_pdrop': 0.1, 'attn_pdrop': 0.1, 'resid_pdrop': 0.1"
ENSEMBLE = (
    f"--config={ROOT / 'configs/ensemble_stories.py'}:smoke",
    "--config.rounds=3",
    "--config.student.architecture={'model_type': 'gpt2', 'n_embd': 32, "
    f"'n_head': 2, 'n_positions': 32, {DROPOUT}}}",
    *COMMAND[1:],
    f"--config.steps={ROUND}",
    "--config.ensemble.rows=2048",
    "--config.cache.max_gb=1",
)
ON_POLICY = (
    f"--config={ROOT / 'configs/onpolicy_stories.py'}:smoke",
    *COMMAND[1:],
    "--config.rollout.lambda=0.8",
    "--config.rollout.every=2",
    "--config.rollout.prompt_tokens=8",
    "--config.rollout.max_new_tokens=24",  # so that writing takes about as long as learning
)
# The figures that may differ.
TIMING = ("tokens_per_second", "rows_per_second", "input_wait_fraction", "minutes")
TIMING += ("pass_seconds", "pass_compile_seconds", "latency_ms", "latency_ms_p90", "throughput")

# Starts the command for a run directory; what subprocess.Popen returns, or has the same methods.
Start = Callable[[Path], Any]


@dataclasses.dataclass(frozen=True)
class Kill:
    """When to kill: `step` rows are in STAGE/metrics.csv; or, from then on, within a `write` or a
    pass; or within the swap that follows the checkpoint of `step`."""

    stage: str
    step: int = 0
    write: str = ""  # checkpoint | export | swap | pass
    delay: float = 0.0  # seconds after that

    def due(self, run: Path) -> bool:
        if self.write == "export":
            return _exporting(run)
        if self.write == "swap":
            return _swapping(run, self.stage, self.step)
        return last_step(run, self.stage) >= self.step and self._within(run)

    def hit(self, run: Path) -> bool:
        """Whether the killed run was where it should be."""
        if self.write == "export":
            return _exporting(run) and not (run / "results.json").exists()
        if self.write == "swap":
            return _swapping(run, self.stage, self.step)
        return self._within(run)

    def _within(self, run: Path) -> bool:
        left = {"pass": _passing(run), "checkpoint": bool(unfinished(run, self.stage))}
        return left.get(self.write, True)


def plan(seed: int, steps: int = STEPS, save: int = SAVE) -> list[Kill]:
    """The ten kills, in the order in which the run comes to them."""
    rng = random.Random(seed)
    kills = []
    for stage in STAGES:
        first, second = sorted(rng.sample(range(1, steps), 2))
        write = save * rng.randrange(1, steps // save)
        kills += sorted(
            [Kill(stage, first), Kill(stage, second), Kill(stage, write, "checkpoint")],
            key=lambda kill: kill.step,
        )
    return [*kills, Kill(STAGES[-1], write="export", delay=rng.uniform(0.0, 0.3))]


def plan_substitution(seed: int) -> list[Kill]:
    """The ten kills of a stage that swaps twice."""
    rng = random.Random(seed)
    kills = []
    for first, last in ((1, PHASE), (PHASE + 1, 2 * PHASE), (2 * PHASE + 1, STEPS)):
        kills += [Kill("substitute", step) for step in sorted(rng.sample(range(first, last), 2))]
    kills += [Kill("substitute", write, "checkpoint") for write in rng.sample((16, 32, 48), 2)]
    kills.append(Kill("substitute", rng.choice((PHASE, 2 * PHASE)), "swap"))
    kills.sort(key=lambda kill: (kill.step, kill.write))
    return [*kills, Kill("substitute", write="export", delay=rng.uniform(0.0, 0.3))]


def plan_ensemble(seed: int) -> list[Kill]:
    """The ten kills of three rounds."""
    rng = random.Random(seed)
    kills = []
    for stage in ROUNDS:
        kills += [Kill(stage, step) for step in sorted(rng.sample(range(1, ROUND), 2))]
    kills.insert(2, Kill(ROUNDS[0], ROUND, "pass"))
    for stage in rng.sample(ROUNDS[1:], 2):
        kills.append(Kill(stage, SAVE * rng.randrange(1, ROUND // SAVE), "checkpoint"))
    kills.sort(key=lambda kill: (kill.stage, kill.step))
    return [*kills, Kill(ROUNDS[-1], write="export", delay=rng.uniform(0.0, 0.3))]


def plan_on_policy(seed: int) -> list[Kill]:
    """The ten kills of a stage that writes what it learns from."""
    rng = random.Random(seed)
    delays = [rng.uniform(0.0, 0.1) for _ in range(7)]  # a step takes about so long
    steps = sorted(rng.sample(range(1, STEPS), 7))
    kills = [Kill("student", *each) for each in zip(steps, [""] * 7, delays, strict=True)]
    kills += [Kill("student", write, "checkpoint") for write in rng.sample((16, 32, 48), 2)]
    kills.sort(key=lambda kill: (kill.step, kill.write))
    return [*kills, Kill("student", write="export", delay=rng.uniform(0.0, 0.3))]


def last_step(run: Path, stage: str) -> int:
    """The last step in metrics.csv."""
    try:
        rows = (run / stage / "metrics.csv").read_bytes().splitlines()
    except FileNotFoundError:
        return 0
    numbers = [row.split(b",")[0] for row in rows[1:]]
    return next((int(n) for n in reversed(numbers) if n.isdigit()), 0)


def checkpoints(run: Path, stage: str) -> list[int]:
    """Steps of the whole checkpoints."""
    return sorted(int(p.name) for p in (run / stage / "checkpoints").glob("*") if p.name.isdigit())


def unfinished(run: Path, stage: str) -> list[Path]:
    """Checkpoints that are being written, or were when the run was killed."""
    return list((run / stage / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def _swapping(run: Path, stage: str, step: int) -> bool:
    """Whether the model of a step has been saved, and what comes from it not been made."""
    swaps = run / stage / "swaps.csv"
    made = swaps.read_text().splitlines()[1:] if swaps.exists() else []
    saved = step in checkpoints(run, stage)
    return saved and not any(row.startswith(f"{step},") for row in made)


def _exporting(run: Path) -> bool:
    return any((run / "export").glob(".*.partial"))


def _passing(run: Path) -> bool:
    return any(logits_of(run).glob("teacher_logits/*.partial"))


def logits_of(run: Path) -> Path:
    """Where a run of an ensemble keeps logits: each its own."""
    return run.with_name(f"{run.name}.logits")


class Life:
    """One process of a run, from its start to its end: what it began from."""

    def __init__(self, run: Path, stages: Sequence[str] = STAGES):
        self._run = run
        self._began = {stage: (checkpoints(run, stage) or [0])[-1] for stage in stages}
        self._files = {stage: self._file(stage) for stage in stages}

    def _file(self, stage: str) -> int | None:
        try:
            return (self._run / stage / "metrics.csv").stat().st_ino
        except FileNotFoundError:
            return None

    def entered(self, stage: str) -> bool:
        """Whether this process has begun the stage: it writes metrics.csv anew, cut back."""
        return self._file(stage) != self._files[stage]

    def steps(self) -> int:
        """Steps that it wrote down."""
        entered = [stage for stage in self._began if self.entered(stage)]
        return sum(last_step(self._run, stage) - self._began[stage] for stage in entered)


def run_killed(
    start: Start,
    run: Path,
    kills: list[Kill],
    timeout: float,
    stages: Sequence[str] = STAGES,
) -> dict[str, Any]:
    """Runs to the end through all kills; a kill that came too late for its write is done again at
    the next one. Returns how many hit, by kind, and the steps taken in total, at most."""
    hits: dict[str, int] = {}
    executed, waiting = 0, list(kills)
    while True:
        life = Life(run, stages)
        process = start(run)
        for _ in _until(time.monotonic() + timeout):
            if process.poll() is not None:
                break
            if waiting and life.entered(waiting[0].stage) and waiting[0].due(run):
                time.sleep(waiting[0].delay)
                process.send_signal(signal.SIGKILL)
                process.wait()
                break
        executed += life.steps()
        if process.returncode != -signal.SIGKILL:
            if process.returncode or waiting:
                raise RuntimeError(f"ended with {process.returncode}, not yet killed: {waiting}")
            return {"hits": hits, "steps": executed}
        kill = waiting[0]
        executed += 2 if kill.write != "export" else 0  # done or under way, not yet written down
        if kill.hit(run):
            hits[kill.write or kill.stage] = hits.get(kill.write or kill.stage, 0) + 1
            waiting.pop(0)
            print(f"killed: {kill}", flush=True)
        else:
            print(f"too late for {kill}", flush=True)
            waiting[0] = dataclasses.replace(kill, delay=0.0)


def _until(deadline: float) -> Iterator[None]:
    while time.monotonic() < deadline:
        yield
        time.sleep(0.001)
    raise TimeoutError("the run neither ends nor comes to where it is to be killed")


def differences(one: Path, other: Path) -> list[str]:
    """What of two finished run directories is not the same bit for bit."""
    found = []
    stages = sorted(path.parent.name for path in one.glob("*/metrics.csv"))
    for stage in stages:
        for name in ("metrics.csv", "eval.csv", "samples.jsonl"):
            a, b = (run / stage / name for run in (one, other))
            if a.exists() != b.exists() or (a.exists() and a.read_bytes() != b.read_bytes()):
                found.append(f"{stage}/{name}")
        if _figures(one / stage) != _figures(other / stage):
            found.append(f"{stage}/results.json")
        if checkpoints(one, stage) != checkpoints(other, stage):
            found.append(f"{stage}: {checkpoints(one, stage)}, {checkpoints(other, stage)}")
            continue
        for step in checkpoints(one, stage):
            a, b = (_arrays(run / stage / "checkpoints" / str(step)) for run in (one, other))
            wrong = [path for path in sorted(a.keys() | b.keys()) if a.get(path) != b.get(path)]
            found += [f"{stage} at step {step}: {path}" for path in wrong]
    for path in one.glob("export/*/model.safetensors"):
        weights = path.relative_to(one)
        if path.read_bytes() != (other / weights).read_bytes():
            found.append(str(weights))
    left = [*other.glob("**/*orbax-checkpoint-tmp"), *other.glob("**/.*.partial")]
    return found + [f"left behind: {path}" for path in left]


def _figures(stage: Path) -> dict[str, Any]:
    from kd_jax import storage

    return untimed(storage.read_json(stage / "results.json"))


def untimed(found: Any) -> Any:
    """Figures but for those that a run cannot repeat."""
    if isinstance(found, list):
        return [untimed(each) for each in found]
    if not isinstance(found, dict):
        return found
    return {key: untimed(value) for key, value in found.items() if key not in TIMING}


def _arrays(checkpoint: Path) -> dict[str, tuple]:
    """All arrays of a checkpoint as bytes, by path: step, parameters and optimizer."""
    import jax
    import orbax.checkpoint as ocp

    tree = ocp.StandardCheckpointer().restore(checkpoint / "default")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return {path: (a.dtype.name, a.shape, a.tobytes()) for path, a in arrays.items()}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is run, and when it is killed."""

    command: Sequence[str]
    stages: Sequence[str]  # folders of the run directory, in their order
    kills: Callable[[int], list[Kill]]  # by the seed


CASES = {
    "pretrain": Case(COMMAND, STAGES, plan),
    "substitute": Case(SUBSTITUTE, ("substitute",), plan_substitution),
    "ensemble": Case(ENSEMBLE, ROUNDS, plan_ensemble),
    "on_policy": Case(ON_POLICY, ("student",), plan_on_policy),
}


def start_command(run: Path, command: Sequence[str] = COMMAND) -> subprocess.Popen:
    """The command as a user gives it; what it prints goes to RUN.log."""
    if command is ENSEMBLE:
        command = (*command, f"--config.cache.folder={logits_of(run)}")
    with open(f"{run}.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "kd_jax.main", *command, f"--workdir={run}"],
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )


def _again(start: Start, run: Path) -> str:
    """What the command does once the run is finished."""
    newest = max(path.stat().st_mtime for path in run.glob("*/metrics.csv"))
    began = time.monotonic()
    status = start(run).wait()
    same = newest == max(path.stat().st_mtime for path in run.glob("*/metrics.csv"))
    done = "nothing computed" if same else "computed again"
    return f"exit status {status} after {time.monotonic() - began:.1f} s, {done}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, default="pretrain", help="what is run")
    parser.add_argument("--seed", type=int, default=0, help="of the random steps")
    parser.add_argument("--folder", help="keep the run directories there")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON")
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="kill_resume_")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    # Many starts: small programs are worth keeping too.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    whole, killed = folder / "undisturbed", folder / "killed"

    case = CASES[args.case]
    start = functools.partial(start_command, command=case.command)
    stages, kills = case.stages, case.kills(args.seed)
    undisturbed = run_killed(start, whole, [], 1800, stages)
    done = run_killed(start, killed, kills, 1800, stages)
    steps, limit = done["steps"], undisturbed["steps"] + len(kills) * SAVE
    found = differences(whole, killed)
    report = {
        "case": args.case,
        "kills": done["hits"],
        "dropout": _dropout(whole),
        "steps_undisturbed": undisturbed["steps"],
        "steps_at_most": steps,
        "steps_allowed": limit,
        "differences": found,
        "same_command_after_the_end": _again(start, killed),
    }
    print(json.dumps(report, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    if not args.folder:
        shutil.rmtree(folder)
    sys.exit(1 if found or steps > limit else 0)


def _dropout(run: Path) -> float:
    """The rate in the exported models."""
    pages = [path.read_text() for path in run.glob("export/*/config.json")]
    return max(json.loads(page).get("resid_pdrop", 0.0) for page in pages)


if __name__ == "__main__":
    main()
