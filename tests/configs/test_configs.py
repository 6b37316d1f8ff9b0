import functools
import importlib
import inspect
import json

import jax
import pytest
from jax import ShapeDtypeStruct

from kd_jax.recipes import plan
from kd_jax.run.run import build
from kd_jax.train import step
from tests import smoke
from tests.configs.smokes import NAMES, load


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is_and_how_to_run_it(name):
    module = importlib.import_module(f"configs.{name}")
    text = inspect.getdoc(module)
    assert f"python -m kd_jax.main --config=configs/{name}.py" in text
    assert text.splitlines()[0].endswith(".") and len(text) > 300
    assert json.loads(load(name).to_json())["recipe"]
    with pytest.raises(ValueError, match="unknown variant 'smok'; have: "):
        load(name, "smok")


def abstract(name):
    config = load(name)
    if not config.teacher.model and not config.teacher.architecture:
        config.teacher = load(name, "teacher").teacher  # what the config's first command makes
        config.teacher.init = "scratch"
    if config.recipe == "sweep":
        config = finetuning_of(config)
    config.mesh.fsdp = min(config.mesh.fsdp, jax.device_count())
    config.scan = "always"  # a loop over equal blocks is traced once
    return build(config)


def finetuning_of(sweep):
    """The run that a sweep tries."""
    config = type(sweep)({key: value for key, value in sweep.items() if key != "sweep"})
    config.recipe = "finetune"
    return config


@pytest.mark.parametrize("name", NAMES)
def test_step_at_full_size(name):
    run = abstract(name)
    born, batch, teacher, inputs, static = plan.abstract_step(run)
    train_step = functools.partial(step.train_step, program=static)
    state, metrics = jax.eval_shape(train_step, born, batch, teacher, inputs)

    def described(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert described(state) == described(born)
    scalar = ShapeDtypeStruct((), "float32")
    assert all(leaf == scalar for leaf in jax.tree.leaves(metrics))
    logged = {"accuracy"} if run.task.outputs == "classes" else set()
    logged |= {"kl_t1"} if teacher and run.task.outputs in ("classes", "tokens") else set()
    logged |= {"reverse_kl_t1", "entropy"} if run.principal.writing else set()
    assert set(metrics["terms"]) - {"teacher_outside"} == {*static.objective.names} | logged


def test_reads_are_noticed():
    config = load("pretrain_wikitext", "smoke")
    with smoke.Reads(config) as reads:
        json.loads(config.to_json())
        assert config.seed == 0 and config.optim.get("beta1") == 0.9
        copy = type(config)(config.optim.to_dict())
        assert copy.schedule.kind == "linear"
        dict(config.eval.items())
    assert reads.seen == {
        "seed",
        "optim.beta1",
        "optim.schedule.kind",
        "eval.every",
        "eval.batch_size",
    }
    assert config.steps == 4 and "steps" in reads.keys - reads.seen
