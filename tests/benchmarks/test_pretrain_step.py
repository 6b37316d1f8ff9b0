"""The side-by-side benchmark runs, at tiny shapes, and its rows do the same mathematics."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "pretrain_step.py"
SYSTEMS = ["kd_jax", "pytorch-eager", "pytorch-gather-eager"]


def test_rows_take_the_same_steps(tmp_path):
    target = tmp_path / "rows.json"
    only = ["--case=mlm", "--rows=" + ",".join(f"{name}-fp32" for name in SYSTEMS)]
    size = ["--tiny", "--rounds=1", "--steps=2", "--dropout=0"]
    command = [sys.executable, str(SCRIPT), *only, *size, f"--json={target}"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = json.loads(target.read_text())
    assert [row["system"] for row in rows] == SYSTEMS
    for row in rows:
        assert row["system"] in shown
        assert (row["case"], row["precision"]) == ("mlm", "fp32")
        assert row["tokens_per_s"] == pytest.approx(4 * 32 / row["median_s"])
        assert row["peak_bytes"] > 50e6
        # After four updates, dropout off: the same weights, batch, losses and optimizer.
        assert row["last_loss"] == pytest.approx(rows[0]["last_loss"], rel=1e-5)
