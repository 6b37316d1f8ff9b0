import functools
import importlib
import inspect
import json
import math
from pathlib import Path

import jax
import pytest
from jax import ShapeDtypeStruct

import configs
from kd_jax.recipes import plan
from kd_jax.recipes.setup import Setup
from kd_jax.train import step
from tests import smoke

FILES = Path(configs.__file__).parent.glob("*.py")
NAMES = sorted(file.stem for file in FILES if file.stem not in ("__init__", "common"))


def load(name, variant=None):
    return importlib.import_module(f"configs.{name}").get_config(variant)


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is_and_how_to_run_it(name):
    module = importlib.import_module(f"configs.{name}")
    text = inspect.getdoc(module)
    assert f"python -m kd_jax.main --config=configs/{name}.py" in text
    assert text.splitlines()[0].endswith(".") and len(text) > 300
    assert json.loads(load(name).to_json())["recipe"]
    with pytest.raises(ValueError, match="unknown variant 'smok'; have: smoke"):
        load(name, "smok")


def abstract(name):
    config = load(name)
    if not config.teacher.model and not config.teacher.architecture:
        config.teacher = load(name, "teacher").teacher  # what the config's first command makes
    return Setup(config)


@pytest.mark.parametrize("name", NAMES)
def test_step_at_full_size(name):
    born, batch, teacher, inputs, static = plan.abstract_step(abstract(name))
    train_step = functools.partial(step.train_step, plan=static)
    state, metrics = jax.eval_shape(train_step, born, batch, teacher, inputs)

    def described(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert described(state) == described(born)
    scalar = ShapeDtypeStruct((), "float32")
    assert all(leaf == scalar for leaf in jax.tree.leaves(metrics))
    assert set(metrics["terms"]) == {*static.objective.names, "kl_t1"}


@pytest.mark.parametrize("name", NAMES)
def test_smoke(name):
    found = smoke.run(name)
    order = ("teacher", "baseline", "student")
    assert list(found.results["stages"]) == [s for s in order if s in load(name).stages]
    for stage, figures in found.results["stages"].items():
        assert math.isfinite(figures["loss"]) and figures["steps"] == 4
        assert ("kl" in figures) == (stage != "teacher")
        assert len((found.folder / stage / "metrics.csv").read_text().splitlines()) == 1 + 4
    assert found.results["export"]["checked_with"] == ["kd_jax", "pytorch"]
    assert json.loads((found.folder / "results.json").read_text()) == found.results
    assert len(list((found.folder / "plots").glob("*.png"))) == 2


@pytest.fixture(scope="module")
def read_of_checkpoints(tmp_path_factory):
    """Keys that are read where teacher and student are checkpoints, as in no smoke run."""
    export = smoke.run("pretrain_wikitext").folder / "export" / "student"
    config = load("pretrain_wikitext", "smoke")
    config.teacher.model = config.student.model = str(export)
    config.teacher.architecture = config.student.architecture = {}
    config.tokenizer.train = ""
    with smoke.private_caches(), smoke.Reads(config) as reads:
        Setup(config, tmp_path_factory.mktemp("checkpoints"))
    return reads.seen


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_read(name, read_of_checkpoints):
    found = smoke.run(name)
    assert found.keys - found.read - read_of_checkpoints == set()


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
