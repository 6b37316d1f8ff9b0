"""Two processes make the ensemble that one makes."""

import csv
import os

import pytest

from tests import forked
from tests.recipes import ensemble_worker, ensembles

WORKER = ensemble_worker.__file__


def test_two_processes_make_the_same_ensemble(tmp_path):
    alone = ensembles.run(ensembles.two_rounds(tmp_path), tmp_path / "alone")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    processes = [
        forked.start([f"--folder={tmp_path}", *each], tmp_path, WORKER, XLA_FLAGS=flags)
        for each in forked.cluster()
    ]
    for process in processes:
        assert process.wait() == 0, process.output()[-2000:] + process.error()[-4000:]
    for process in (0, 1):  # each keeps what both have computed
        kept = tmp_path / "signals" / "teacher_logits" / f"process_{process}_of_2"
        assert len(list(kept.glob("*/logits.npy"))) == 2
    rows = list(csv.DictReader((tmp_path / "run" / "rounds.csv").read_text().splitlines()))
    for row, found in zip(rows, alone["rounds"], strict=True):
        for name in ("loss", "kl"):
            key = "ensemble_eval_loss" if name == "loss" else "ensemble_kl"
            assert float(row[key]) == pytest.approx(found["ensemble"][name], rel=1e-4)
    assert (tmp_path / "run" / "export" / "ensemble" / "config.json").exists()
