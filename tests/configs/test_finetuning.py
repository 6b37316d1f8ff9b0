"""Smoke runs of fine-tuning."""

import pytest

from kd_jax.recipes.compare import compare
from tests.configs import smokes


@pytest.mark.parametrize("name", smokes.FINETUNING)
def test_smoke(name):
    smokes.check(name)


def test_the_report_of_a_run(tmp_path):
    """What kd_jax.compare makes of what a run really leaves."""
    run = smokes.smoke.run("finetune_agnews:smoke")
    _, written = compare([str(run.folder)], str(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in written
    assert "Sci/Tech" in page and "samples/s, batch 32" in page and page.count("data:image/svg") > 3


# What is read of a model only where it is a checkpoint: test_language.py looks at these.
OF_CHECKPOINTS = {"teacher.revision", "student.revision", "tokenizer.path"}
# What stages read that are in no smoke run of fine-tuning; likewise.
OF_STAGES = {f"pruning.{key}" for key in ("target", "ranking", "distil")} | {
    "substitution.fit_learning_rate",
    "substitution.importance_batches",
}


@pytest.mark.parametrize("name", smokes.FINETUNING)
def test_every_key_is_read(name):
    assert smokes.unread(name, smokes.FINETUNING) <= {
        key
        for key in smokes.smoke.run(name).keys
        if smokes._kind(key) in OF_CHECKPOINTS | OF_STAGES
    }
