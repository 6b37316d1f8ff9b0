"""Keeps the figures of finished runs under results/, and the README's tables in step with them.

    python benchmarks/results.py record NAME RUN...    # results/NAME.json from run directories
    python benchmarks/results.py readme                # makes the README's tables again

A table stands between `<!-- results: NAME -->` and `<!-- end -->`. A test renders every one again
and compares.
"""

import argparse
import json
import os
import re
from pathlib import Path

from kd_jax.evals import runs, table

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
KEPT = ("config", "config_hash", "commit", "seed", "machine", "versions", "split", "stages")


def record(name: str, workdirs: list[str], note: str) -> Path:
    """Writes results/NAME.json; every run must be finished and of the same config but the seed."""
    found = [runs.read(workdir) for workdir in workdirs]
    configs = [run.config | {"seed": None} for run in found]
    if any(config != configs[0] for config in configs):
        raise SystemExit("error: the runs differ in more than the seed; record them apart")
    entry = {
        "note": note,
        "command": (found[0].workdir / "command.txt").read_text().splitlines()[0].split(" ", 1)[1],
        "config": configs[0],
        "runs": [{key: run.results[key] for key in KEPT if key in run.results} for run in found],
    }
    page = json.dumps(entry, indent=1)
    if folder := os.environ.get("KD_JAX_DATA"):  # not where it lay on this machine
        page = page.replace(folder, "$KD_JAX_DATA")
    path = ROOT / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(page + "\n")
    return path


def render(name: str) -> str:
    """The Markdown of results/NAME.json: table, then where it comes from."""
    entry = json.loads((ROOT / "results" / f"{name}.json").read_text())
    found = entry["runs"]
    first = found[0]
    title = f"{first['config']}, {first['split']} split"
    page = table.of_runs([run["stages"] for run in found], title).markdown()
    machine = first["machine"]
    where = f"{machine['cores']} cores of {machine['cpu']}"
    if machine["platform"] != "cpu":
        where = f"{machine['devices']} x {machine['device']}"
    seeds = ", ".join(str(run["seed"]) for run in found)
    commits = ", ".join(sorted({run["commit"][:9] for run in found}))
    source = f"`results/{name}.json`: {where}, {entry['config']['precision']}; "
    source += f"seeds {seeds}; commit {commits}. {entry['note']}".rstrip()
    return f"{page}\n{source}\n"


def rendered(readme: str) -> str:
    """The README with every marked table made again."""
    return MARKED.sub(lambda m: m[1] + render(m[2]) + m[3], readme)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    keep = commands.add_parser("record", help="write results/NAME.json from finished runs")
    keep.add_argument("name")
    keep.add_argument("runs", nargs="+")
    keep.add_argument("--note", default="", help="a sentence to stand under the table")
    commands.add_parser("readme", help="make the README's tables again")
    options = parser.parse_args()
    if options.command == "record":
        print(record(options.name, options.runs, options.note))
    else:
        path = ROOT / "README.md"
        path.write_text(rendered(path.read_text()))


if __name__ == "__main__":
    main()
