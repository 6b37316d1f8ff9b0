"""The benchmark of an on-policy step, on tiny models; TRL's rows are left out."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_tiny_step(tmp_path):
    command = [sys.executable, "benchmarks/onpolicy_step.py", "--tiny", "--rows=kd_jax-fp32"]
    command += ["--rounds=1", "--steps=2", f"--json={tmp_path / 'rows.json'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["onpolicy"] == "kd_jax" and 0 < row["writing_s"] < row["median_s"]
    assert row["tokens"] > 0 and row["ratio"] == 1
