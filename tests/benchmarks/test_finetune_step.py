"""The fine-tuning benchmark runs, on little data, and its rows do the same mathematics."""

import json
import pathlib
import random
import sys

import numpy as np
import pytest

from tests import forked

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
WORDS = "good bad film plot dull warm sharp flat".split()


@pytest.fixture
def data(tmp_path):
    """As many training sentences as a batch has: every step sees all of them, in any system."""
    choose = random.Random(0)
    for name, rows in (("train", 32), ("dev", 9)):
        lines = [
            " ".join(choose.choices(WORDS, k=choose.randint(2, 14))) + f"\t{row % 2}"
            for row in range(rows)
        ]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return tmp_path


@pytest.fixture
def rows_of(data, monkeypatch, capsys):
    """Rows of a work, computed in forked processes."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import finetune_step
    import pretrain_step

    forked.preload("torch", "transformers.models.bert.tokenization_bert")
    monkeypatch.setattr(pretrain_step.subprocess, "run", forked.run)

    def of(work, systems):
        only = [f"--work={work}", "--rows=" + ",".join(f"{name}-fp32" for name in systems)]
        size = ["--tiny", "--rounds=1", "--steps=2", "--passes=1", "--dropout=0"]
        target = data / "rows.json"
        command = ["finetune_step.py", *only, *size, f"--data={data}", f"--json={target}"]
        monkeypatch.setattr(sys, "argv", command)
        finetune_step.main()
        shown = capsys.readouterr().out
        rows = json.loads(target.read_text())
        assert sorted(row["system"] for row in rows) == sorted(systems)
        for row in rows:
            assert row["system"] in shown and row["sentences_per_s"] > 0
            assert row["peak_bytes"] > 50e6
            # The same weights and sentences; after some updates, with dropout off.
            assert row["last"] == pytest.approx(rows[0]["last"], rel=1e-4)
        return {row["system"]: row for row in rows}

    return of


def test_distillation_takes_the_same_steps(rows_of):
    found = rows_of("distill", ["kd_jax", "kd_jax-stored", "pytorch-eager"])
    speeds = {name: row["sentences_per_s"] for name, row in found.items()}
    ratio = speeds["kd_jax"] / speeds["pytorch-eager"]
    assert found["kd_jax"]["ratio"] == pytest.approx(ratio)
    assert found["pytorch-eager"]["ratio"] == 1.0


def test_evaluation_gives_the_same_logits(rows_of):
    rows_of("evaluate", ["kd_jax", "pytorch-sorted-eager"])


def test_the_timed_batches_stand_for_an_epoch(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import finetune_cases

    lengths_S = np.random.default_rng(1).permutation(np.repeat([16, 24, 40], [60, 30, 10]))
    timed = lengths_S[finetune_cases.chosen(lengths_S, 10)]
    assert sorted(timed) == [16] * 6 + [24] * 3 + [40]
    assert lengths_S[finetune_cases.first_of_each(lengths_S, 4)].tolist() == [16, 24, 40]
    assert lengths_S[finetune_cases.first_of_each(lengths_S, 2)].tolist() == [16, 40]
