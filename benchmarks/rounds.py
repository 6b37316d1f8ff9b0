"""Runs the timed processes of a benchmark in rounds, and continues where it was interrupted.

The first round runs every row, PyTorch's with glibc's allocator as it is and with the settings that
kd_jax gives it (`kd_jax.cli.keep_memory`); a row counts with the better of both. Later rounds run
kd_jax's rows and those of PyTorch that came within `CLOSE` of the best one that they are compared
with: the others cannot become the best one.
"""

import argparse
import collections
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence

import rich.console
import rich.progress
import rich.table

CLOSE = 1.05
ALLOCATORS = {  # what PyTorch's processes find in their environment
    "default": {},
    "kept": {
        "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold="
        f"{2**63 - 1}:glibc.malloc.arena_max=1"
    },
}
OWN = "kept"  # kd_jax's rows set it by themselves

Row = tuple[str, ...]
Seconds = Callable[[Row, list[dict]], float]


class Rounds:
    """The results of every row and allocator: a dict for each round. With a `file` they are also
    kept next to it, and found there again after an interruption, until `finish`."""

    def __init__(self, seconds: Seconds, file: pathlib.Path | None, about: dict) -> None:
        """`seconds(row, runs)` is what a row costs; results kept by a run with other options than
        `about` are not used."""
        self.seconds = seconds
        self._about = json.loads(json.dumps(about, default=str))
        self._file = file and file.with_name(f"{file.name}.partial")
        self._runs: dict[tuple[Row, str], list[dict]] = collections.defaultdict(list)
        kept = self._file.read_text().splitlines() if self._file and self._file.exists() else []
        if kept and json.loads(kept[0]) == self._about:
            for line in kept[1:]:
                row, allocator, found = json.loads(line)
                self._runs[tuple(row), allocator].append(found)
        elif self._file:
            self._file.write_text(json.dumps(self._about) + "\n")

    def run(
        self,
        rows: Sequence[Row],
        count: int,
        child: Callable[[Row, dict[str, str]], dict | None],
        group: Callable[[Row], Row],
        tell: Callable[[Row], None],
        both: bool = True,
    ) -> None:
        """Runs `count` rounds. `child(row, environment)` runs one process; None: it failed, and the
        row is left out from then on. `group` says which rows are compared; without `both`, PyTorch
        keeps the default allocator."""
        failed = set()
        for number in range(count):
            for row in rows:
                theirs = ALLOCATORS if both else ("default",)
                for allocator in theirs if is_pytorch(row) else (OWN,):
                    runs = self._runs[row, allocator]
                    if row in failed or len(runs) > number:
                        continue
                    if number and not self._close(row, allocator, group):
                        continue
                    tell((*row, allocator))
                    found = child(row, ALLOCATORS[allocator] if is_pytorch(row) else {})
                    if found is None:
                        failed.add(row)
                        continue
                    runs.append(found)
                    if self._file:
                        with self._file.open("a") as kept:
                            kept.write(json.dumps([row, allocator, found]) + "\n")

    def _close(self, row, allocator, group) -> bool:
        if not is_pytorch(row):
            return True
        best = min(
            self.seconds(other, runs[:1])
            for (other, _), runs in self._runs.items()
            if runs and is_pytorch(other) and group(other) == group(row)
        )
        own = self._runs[row, allocator]
        return bool(own) and self.seconds(row, own[:1]) <= CLOSE * best

    def better(self) -> dict[Row, list[dict]]:
        """The runs of every row with the allocator that served it better."""
        best: dict[Row, list[dict]] = {}
        for (row, _), runs in self._runs.items():
            if runs and (row not in best or self.seconds(row, runs) < self.seconds(row, best[row])):
                best[row] = runs
        return best

    def of_allocators(self, row: Row) -> dict[str, float]:
        """Seconds of a row by allocator."""
        found = {name: self._runs[row, name] for name in ALLOCATORS}
        return {name: self.seconds(row, runs) for name, runs in found.items() if runs}

    def about(self, row: Row, runs: list[dict]) -> dict:
        """Describes how a row was measured, by the runs that count, for a summary's row."""
        return {
            "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
            "others_share": max(statistics.mean(run["others"]) for run in runs),
            "allocators": self.of_allocators(row),
            "rounds": len(runs),
        }

    def finish(self, summary: list[dict], file: pathlib.Path | None) -> None:
        """Writes a summary to the file, if there is one, and removes what was kept next to it."""
        if file:
            file.write_text(json.dumps(summary, indent=2) + "\n")
        if self._file:
            self._file.unlink(missing_ok=True)


def is_pytorch(row: Row) -> bool:
    return any(name.startswith("pytorch") for name in row)


def best_allocator(row: dict) -> str:
    """The allocator of the better runs of a summary's row."""
    return min(row["allocators"], key=row["allocators"].get)


def print_table(
    title: str,
    labels: Sequence[str],
    headings: Sequence[str],
    found: Sequence[tuple[dict, Sequence[str]]],
    sections: int = 0,
) -> None:
    """Prints a summary as a table: of each row its cells, its memory, what other processes took and
    the better allocator. Lines part rows whose first `sections` cells differ."""
    table = rich.table.Table(title=title)
    for heading in labels:
        table.add_column(heading)
    for heading in (*headings, "peak GB", "others", "malloc"):
        table.add_column(heading, justify="right")
    following = [cells for _, cells in found[1:]] + [None]
    for (row, cells), after in zip(found, following, strict=True):
        about = f"{row['peak_bytes'] / 1e9:.2f}", f"{row['others_share']:.0%}", best_allocator(row)
        ends = bool(sections) and (after is None or cells[:sections] != after[:sections])
        table.add_row(*cells, *about, end_section=ends)
    rich.console.Console(width=None if sys.stdout.isatty() else 150).print(table)


def times(ratio: float | None) -> str:
    """Shows a ratio; "-" where there is none."""
    return f"{ratio:.2f}x" if ratio else "-"


def measured(
    args: argparse.Namespace,
    rows: Sequence[Row],
    seconds: Seconds,
    child: Callable[[Row, dict[str, str]], dict | None],
    group: Callable[[Row], Row],
    bar: tuple[rich.progress.Progress, rich.progress.TaskID],
    both: bool = True,
) -> Rounds:
    """Runs the rounds of a benchmark's command line, and shows the row at work in a bar."""
    rounds, (progress, task) = Rounds(seconds, args.json, {**vars(args), "rounds": None}), bar
    tell = lambda row: progress.update(task, description=" ".join(row))  # noqa: E731
    rounds.run(rows, args.rounds, child, group, tell, both)
    return rounds
