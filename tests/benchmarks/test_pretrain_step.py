"""The side-by-side benchmark runs, at tiny shapes, and its rows do the same mathematics."""

import json
import pathlib
import sys

import pytest

from tests import forked

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
SYSTEMS = ["kd_jax", "pytorch-eager", "pytorch-gather-eager"]


def test_rows_take_the_same_steps(tmp_path, monkeypatch, capsys):
    """In forked processes."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import pretrain_step

    forked.preload("torch", "transformers.models.bert.tokenization_bert")
    monkeypatch.setattr(pretrain_step.subprocess, "run", forked.run)
    target = tmp_path / "rows.json"
    only = ["--case=mlm", "--rows=" + ",".join(f"{name}-fp32" for name in SYSTEMS)]
    size = ["--tiny", "--rounds=1", "--steps=2", "--dropout=0"]
    monkeypatch.setattr(sys, "argv", ["pretrain_step.py", *only, *size, f"--json={target}"])
    pretrain_step.main()
    shown = capsys.readouterr().out
    rows = json.loads(target.read_text())
    assert [row["system"] for row in rows] == SYSTEMS
    for row in rows:
        assert row["system"] in shown
        assert (row["case"], row["precision"]) == ("mlm", "fp32")
        assert row["tokens_per_s"] == pytest.approx(4 * 32 / row["median_s"])
        assert row["peak_bytes"] > 50e6
        # After four updates, dropout off: the same weights, batch, losses and optimizer.
        assert row["last_loss"] == pytest.approx(rows[0]["last_loss"], rel=1e-5)
