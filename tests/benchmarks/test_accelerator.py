"""The benchmark for a GPU or TPU runs, with tiny shapes on a CPU."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests import forked

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "accelerator.py"


def test_a_row_of_each_system(tmp_path, monkeypatch, capsys):
    """In forked processes."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import accelerator

    forked.preload("torch", "transformers.models.gpt2.modeling_gpt2")
    monkeypatch.setattr(accelerator.subprocess, "run", forked.run)
    target = f"--json={tmp_path / 'rows.json'}"
    monkeypatch.setattr(sys, "argv", ["accelerator.py", "--tiny", "--work=gpt2", target])
    with pytest.raises(SystemExit) as ended:
        accelerator.main()
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "missing" not in shown and shown.endswith("these figures mean nothing\n")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["accelerator"], row["system"]) for row in rows] == [
        ("gpt2", "kd_jax"),
        ("gpt2", "pytorch-eager"),
    ]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(2 * 32 / row["median_s"])
        assert row["mfu"] is None  # nobody knows a CPU's peak
        assert row["peak_bytes"] > 50e6
    assert rows[0]["ratio"] == 1.0
    assert rows[1]["ratio"] == pytest.approx(rows[1]["median_s"] / rows[0]["median_s"])


def test_what_there_is_no_time_for_is_named(tmp_path):
    flags = ["--tiny", f"--json={tmp_path / 'rows.json'}", "--work=bert", "--minutes=0.01"]
    ran = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True)
    assert ran.returncode == 1
    assert "missing: bert, kd_jax: no time left" in ran.stdout
    assert json.loads((tmp_path / "rows.json").read_text()) == []
