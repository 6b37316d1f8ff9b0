"""Tiny runs of ensembles on one device."""

import contextlib
from pathlib import Path
from unittest import mock

from kd_jax import config as defaults
from kd_jax.recipes import ensemble, export_check
from kd_jax.report import plots
from kd_jax.run import workdir
from tests import tiny_config
from tests.recipes import substituting

ROUNDS, STEPS = 3, 4


def config(folder: Path, **changes):
    """A GPT-2 of three blocks as the teacher, three rounds of students of one block; a checkpoint
    every two steps. `changes` of the section ensemble."""
    c = defaults.ensemble()
    c.precision = "fp32"
    c.batch_size, c.steps, c.rounds = 8, STEPS, ROUNDS
    c.teacher.init = "scratch"
    c.teacher.architecture = dict(
        model_type="gpt2", n_embd=16, n_layer=3, n_head=2, n_positions=16, initializer_range=0.2
    )
    c.student.architecture = dict(model_type="gpt2", n_embd=8, n_layer=1)
    c.student.init = "scratch"
    c.tokenizer = dict(path="", train="bpe", vocab_size=280)
    c.objective = dict(ce=dict(weight=0.3), kl=dict(weight=0.7))
    c.optim.learning_rate = 1e-2
    c.ensemble.update(changes)
    c.ensemble.rows = changes.get("rows", 60)
    c.task = dict(name="clm", seq_len=16)
    c.data = dict(train=dict(source="files", path=str(tiny_config.write_text(folder))))
    c.data.update(held_out=0.1, cache_dir=str(folder))
    c.cache.folder = str(folder / "signals")
    c.eval = dict(every=2, batch_size=64)
    c.checkpoint = dict(every=2, keep=2)
    c.log = dict(every=2)
    return c


def two_rounds(folder: Path):
    """Two of them, of two steps, after a teacher of one block; without dropout, which is drawn by
    device."""
    c = config(folder)
    c.rounds, c.steps, c.teacher.architecture.n_layer = 2, 2, 1
    c.student.architecture.update(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return c


@contextlib.contextmanager
def quick():
    """No pictures, and no checks of what is exported."""
    with (
        mock.patch.object(plots, "save"),
        mock.patch.object(export_check, "check", lambda *args: {}),
        mock.patch.object(export_check, "check_in_pytorch", lambda *args: {}),
    ):
        yield


def run(config, folder: Path) -> dict:
    """The results of a quick run in `folder`."""
    with quick():
        return whole_run(config, folder)


def whole_run(config, folder: Path) -> dict:
    """The results of a run in `folder`, with pictures and a checked export."""
    with substituting.quick(), workdir.enter(config, "example", str(folder)) as place:
        return ensemble.run(config, place)
