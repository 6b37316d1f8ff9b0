"""Smoke runs of language models."""

import pytest

from kd_jax.run.run import build
from tests import smoke
from tests.configs import smokes
from tests.configs.smokes import load


@pytest.mark.parametrize("name", smokes.LANGUAGE)
def test_smoke(name):
    smokes.check(name)


@pytest.fixture(scope="module")
def read_of_checkpoints(tmp_path_factory):
    """Keys that are read where teacher and student are checkpoints, as in no smoke run."""
    export = smoke.run("pretrain_wikitext:smoke").folder / "export" / "student"
    config = load("pretrain_wikitext", "smoke")
    config.teacher.model = config.student.model = str(export)
    config.teacher.architecture = config.student.architecture = {}
    config.tokenizer.train = ""
    with smoke.private_caches(), smoke.Reads(config) as reads:
        build(config, tmp_path_factory.mktemp("checkpoints"))
    return reads.seen


# Read where a successor replaces several blocks: test_finetuning.py looks at it.
OF_GROUPS = {"theseus.layers"}


@pytest.mark.parametrize("name", smokes.LANGUAGE)
def test_every_key_is_read(name, read_of_checkpoints):
    assert smokes.unread(name, smokes.LANGUAGE, read_of_checkpoints) <= OF_GROUPS
