"""Tiny runs of substitution on one device, without what a run does after its last stage."""

import contextlib
import itertools
from pathlib import Path
from unittest import mock

import jax

from kd_jax.config import substitution
from kd_jax.recipes import distil
from kd_jax.report import plots
from kd_jax.run import workdir
from kd_jax.run.run import build as build_run
from kd_jax.train import sharding
from tests import smoke, tiny_config

STEPS, PHASE = 10, 3  # phases of the steps (0, 3], (3, 6], (6, 10]


def config(folder: Path, **changes):
    """A GPT-2 of three blocks, with dropout, all of which become bottlenecks; a checkpoint every
    two steps. `changes` of the section substitution."""
    c = substitution()
    c.precision = "fp32"
    c.batch_size = 8
    c.steps = STEPS
    c.stages = dict(substitute={})
    c.teacher.init = "scratch"
    c.teacher.architecture = dict(
        model_type="gpt2", n_embd=16, n_layer=3, n_head=2, n_positions=16, initializer_range=0.2
    )
    c.tokenizer = dict(path="", train="bpe", vocab_size=280)
    c.objective = dict(ce=dict(weight=1.0), kl=dict(weight=1.0, temperature=2.0))
    c.objective.hidden = dict(weight=1.0)
    c.optim.learning_rate = 1e-3
    c.optim.schedule = dict(kind="linear", warmup=0.2)
    c.substitution.update(width=8, num_heads=1, num_kv_heads=1, ffn_width=16, target=0.4)
    c.substitution.update(steps=PHASE, warmup=2, learning_rate=5e-3, importance_batches=2)
    c.substitution.update(changes)
    c.task = dict(name="clm", seq_len=16)
    c.data = dict(train=dict(source="files", path=str(tiny_config.write_text(folder))))
    c.data.held_out = 0.1
    c.data.cache_dir = str(folder)
    c.eval = dict(every=2, batch_size=64)
    c.checkpoint = dict(every=2, keep=2)
    c.log = dict(every=2)
    return c


class Killed(Exception):
    """The death of a run."""


def dies(call, number: int):
    """Makes a function that does what `call` does, and dies at its call `number`, from 0."""
    calls = itertools.count()

    def dying(*args, **kwargs):
        if next(calls) == number:
            raise Killed
        return call(*args, **kwargs)

    return dying


@contextlib.contextmanager
def quick():
    """One device; no plots, no export; models are timed a few times."""
    make_mesh = sharding.make_mesh
    alone = lambda fsdp=1, devices=None, model=1: make_mesh(fsdp, devices or jax.devices()[:1])  # noqa: E731
    with contextlib.ExitStack() as stack:
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        stack.enter_context(smoke.private_caches())  # compiling takes longest
        jax.config.update("jax_disable_most_optimizations", True)
        stack.callback(jax.config.update, "jax_disable_most_optimizations", False)
        patch(sharding, "make_mesh", alone)
        patch(distil.export, "export_run", lambda *args: {"path": "nowhere"})
        patch(plots, "draw", lambda *args: None)
        stack.enter_context(smoke.few_calls(2))
        yield


def run(config, folder: Path) -> dict:
    """The results of a quick run in `folder`."""
    with quick(), workdir.enter(config, "example", str(folder)) as place:
        return distil.run(config, place)


def build(config, folder: Path | None = None):
    with quick():
        return build_run(config, folder)


def checked(config):
    """Raises what a run would find before its long work."""
    run = build(config)
    given = {name: model.abstract().params for name, model in run.models.items()}
    for phase in run.principal.phases(run, given):
        phase.check()


def undisturbed(config, run, folder):
    """(config, run directory, results, programs compiled) of a run, by a function like `run`."""
    with smoke.compilations() as compiled:
        results = run(config, folder / "run")
    return config, folder / "run", results, dict(compiled)
