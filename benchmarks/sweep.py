"""Twenty trials in one sweep against twenty runs of their own.

    python benchmarks/sweep.py --teacher=runs/agnews-teacher/export/teacher [--json=FILE]

Weight x temperature, 5 x 4, 300 steps of 16 rows a trial, AG News, MiniLM to three of its layers.
The sweep shares data, the teacher's answers and one compiled step; a run of its own starts the
program, reads the data and compiles again, and its teacher answers at every step. Of the twenty
runs `--separate` are made, spread over the grid and in turn with nothing else; their mean counts
for all. Each begins without compiled programs and without stored answers. Run it on an idle
machine.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sweep_config import TEMPERATURES, WEIGHTS

CONFIG = Path(__file__).with_name("sweep_config.py")


def run(folder: Path, variant: str, flags: list[str]) -> dict:
    """One run of the program: its seconds, whole and by part."""
    command = [sys.executable, "-m", "kd_jax.main", f"--config={CONFIG}:{variant}"]
    command += [f"--workdir={folder}", *flags]
    cache = folder.with_name(f"{folder.name}-cache")
    began = time.perf_counter()
    subprocess.run(
        command, check=True, env=os.environ | {"KD_JAX_CACHE": str(cache)}, stdout=sys.stderr
    )
    seconds = time.perf_counter() - began
    parts = json.loads((folder / "results.json").read_text())["seconds_by_part"]
    parts["imports, tables, exit"] = round(seconds - sum(parts.values()), 2)
    shutil.rmtree(cache)
    return {"seconds": round(seconds, 1), "parts": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="a fine-tuned checkpoint")
    parser.add_argument("--separate", type=int, default=4, help="runs of their own that are made")
    parser.add_argument("--steps", type=int, default=300, help="a trial")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    flags = [f"--config.teacher.model={Path(options.teacher).absolute()}"]
    flags += [f"--config.steps={options.steps}", f"--config.eval.every={options.steps}"]
    grid = [(weight, temperature) for weight in WEIGHTS for temperature in TEMPERATURES]
    every = max(1, len(grid) // options.separate)
    with tempfile.TemporaryDirectory() as root:
        alone = []
        for i, (weight, temperature) in enumerate(grid[::every][: options.separate]):
            own = [f"--config.objective.kl.weight={weight}"]
            own += [f"--config.objective.kl.temperature={temperature}"]
            alone.append(run(Path(root, f"one-{i}"), "one", flags + own))
        sweep = run(Path(root, "grid"), "grid", flags)
    expected = len(grid) * statistics.fmean(each["seconds"] for each in alone)
    found = {
        "trials": len(grid),
        "steps": options.steps,
        "sweep": sweep,
        "separate": alone,
        "separate_total_s": round(expected, 1),
        "ratio": round(sweep["seconds"] / expected, 3),
    }
    print(json.dumps(found, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
