"""Rounds of a benchmark: both allocators, the better one counts, an interrupted run continues."""

import json
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
ROWS = [("kd_jax",), ("pytorch-a",), ("pytorch-b",)]
SECONDS = {  # by row and allocator
    ("kd_jax", "own"): 2.0,
    ("pytorch-a", "default"): 3.0,
    ("pytorch-a", "kept"): 1.0,
    ("pytorch-b", "default"): 1.04,
    ("pytorch-b", "kept"): 1.5,
}


@pytest.fixture
def rounds(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import rounds

    return rounds


class Children:
    def __init__(self, rounds, fail_at=None):
        self.seen, self.fail_at = [], fail_at
        self.kept = rounds.ALLOCATORS["kept"]

    def __call__(self, row, environment):
        allocator = "kept" if environment == self.kept else "default"
        self.seen.append((*row, "own" if row == ("kd_jax",) else allocator))
        if len(self.seen) == self.fail_at:
            raise KeyboardInterrupt
        return {"seconds": SECONDS[self.seen[-1]]}


def make(rounds, file, child, count=2, about=None):
    def seconds(row, runs):
        return sum(run["seconds"] for run in runs) / len(runs)

    made = rounds.Rounds(seconds, file, about or {"steps": 3})
    made.run(ROWS, count, child, lambda row: (), lambda row: None)
    return made


def test_the_better_allocator_counts_and_what_is_far_behind_runs_once(rounds):
    child = Children(rounds)
    made = make(rounds, None, child)
    first = [*SECONDS]
    assert child.seen == [*first, first[0], first[2], first[3]]
    better = {row[0]: (runs[0]["seconds"], len(runs)) for row, runs in made.better().items()}
    assert better == {"kd_jax": (2.0, 2), "pytorch-a": (1.0, 2), "pytorch-b": (1.04, 2)}
    assert made.of_allocators(ROWS[1]) == {"default": 3.0, "kept": 1.0}
    assert rounds.best_allocator({"allocators": made.of_allocators(ROWS[1])}) == "kept"


def test_an_interrupted_run_continues(rounds, tmp_path):
    file = tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        make(rounds, file, Children(rounds, fail_at=4))
    again = Children(rounds)
    made = make(rounds, file, again)
    whole = Children(rounds)
    assert made.better() == make(rounds, None, whole).better()
    assert again.seen == whole.seen[3:]
    partial = file.with_name("rows.json.partial")
    assert len(partial.read_text().splitlines()) == 1 + len(whole.seen)
    summary = [{"system": "kd_jax"}]
    made.finish(summary, file)
    assert json.loads(file.read_text()) == summary and not partial.exists()


def test_a_row_says_how_it_was_measured(rounds):
    made = make(rounds, None, Children(rounds))
    runs = [{"peak_bytes": size, "others": [0.0, share]} for size, share in [(3, 0.2), (5, 0.4)]]
    assert made.about(ROWS[1], [*runs, runs[0]]) == {
        "peak_bytes": 3,
        "others_share": 0.2,
        "allocators": {"default": 3.0, "kept": 1.0},
        "rounds": 3,
    }


def test_results_of_other_options_are_not_taken(rounds, tmp_path):
    file, first, second = tmp_path / "rows.json", Children(rounds), Children(rounds)
    make(rounds, file, first)
    make(rounds, file, second, about={"steps": 4})
    assert second.seen == first.seen
    assert json.loads(file.with_name("rows.json.partial").read_text().splitlines()[0])["steps"] == 4
