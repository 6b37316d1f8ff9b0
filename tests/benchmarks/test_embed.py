"""The embedding benchmark: what its rows say, and their table."""

import pathlib

import pytest

from benchmarks import results

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


class Measured:
    """Rounds that have been run."""

    def better(self):
        run = dict(texts=40, first_s=3.0, apart=1e-7, cosine=1.0)
        return {
            ("kd_jax",): [run | {"seconds": [2.0, 1.0]}, run | {"seconds": [4.0], "apart": 2e-7}],
            ("pytorch-32",): [run | {"seconds": [3.0]}],
            ("pytorch-64",): [run | {"seconds": [2.0]}],
            ("onnx-int8-32",): [run | {"seconds": [0.5], "apart": 0.03, "cosine": 0.97}],
        }

    def about(self, row, runs):
        return {"peak_bytes": 1e9, "others_share": 0.0, "allocators": {"kept": 1.0}, "rounds": 1}


def test_rows_are_compared_with_the_best_pytorch(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import embed

    rows = {row["system"]: row for row in embed.summarise(Measured())}
    assert rows["kd_jax"]["pass_s"] == 1.0 and rows["kd_jax"]["texts_per_s"] == 40
    assert rows["kd_jax"]["ratio"] == 2.0 and rows["kd_jax"]["apart"] == 2e-7
    assert rows["pytorch-32"]["ratio"] == pytest.approx(2 / 3)
    line = "| onnx-int8-32 | 0.50 | 80 | 1.00 | 4.00 | 3.0e-02 | 0.9700 | kept |"
    assert line in results._table(list(rows.values()))


def test_arms_are_compared_with_their_teacher():
    def arm(name, value, seeds, against=""):
        about = dict(arm=name, against=against, equal="steps", steps=300, seconds=10.0)
        return [about | dict(seed=seed, spearman=value + 0.02 * seed) for seed in seeds]

    rows = arm("a", 0.8, (0, 1), "b") + arm("b", 0.7, (0, 1)) + arm("teacher", 0.9, (0,))
    lines = results._table(rows).splitlines()
    assert "| a | 300 | 10 | 0.8100 ± 0.0141 | 90.0% |" in lines
    assert "| - b |  |  | +0.1000 ± 0.0000 |  |" in lines


def test_choices_of_layers():
    scores = {(0, 2): 0.1, (1, 2): 0.5, (0, 1): 0.4, (0, 3): 0.3, (1, 3): 0.2}
    rows = [{"kept": list(kept), "spearman": score} for kept, score in scores.items()]
    table = results._table([{"kept": [0, 1, 2, 3], "spearman": 0.9}, *rows])
    assert "| 2 | 1, 2 |  | 0.5000 |" in table and "| 2 | 0, 2 |" not in table
    assert "| 2 | 1, 3 | evenly spaced | 0.2000 |" in table
