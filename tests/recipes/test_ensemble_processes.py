"""Two processes make the ensemble that one makes."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes import ensemble_worker, ensembles

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_make_the_same_ensemble(tmp_path):
    alone = ensembles.run(ensembles.two_rounds(tmp_path), tmp_path / "alone")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_"))}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    script = [ROOT / "launch" / "local_processes.sh", "2", ensemble_worker.__file__]
    command = [*script, f"--folder={tmp_path}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for process in (0, 1):  # each keeps what both have computed
        kept = tmp_path / "signals" / "teacher_logits" / f"process_{process}_of_2"
        assert len(list(kept.glob("*/logits.npy"))) == 2
    rows = list(csv.DictReader((tmp_path / "run" / "rounds.csv").read_text().splitlines()))
    for row, found in zip(rows, alone["rounds"], strict=True):
        for name in ("loss", "kl"):
            key = "ensemble_eval_loss" if name == "loss" else "ensemble_kl"
            assert float(row[key]) == pytest.approx(found["ensemble"][name], rel=1e-4)
    assert (tmp_path / "run" / "export" / "ensemble" / "config.json").exists()
