"""Smoke runs of fine-tuning."""

import pytest

from tests.configs import smokes


@pytest.mark.parametrize("name", smokes.FINETUNING)
def test_smoke(name):
    smokes.check(name)


# What is read of a model only where it is a checkpoint: test_language.py looks at these.
OF_CHECKPOINTS = {"teacher.revision", "student.revision", "tokenizer.path"}


@pytest.mark.parametrize("name", smokes.FINETUNING)
def test_every_key_is_read(name):
    assert smokes.unread(name, smokes.FINETUNING) <= {
        key for key in smokes.smoke.run(name).keys if smokes._kind(key) in OF_CHECKPOINTS
    }
