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
from kd_jax import plugins
from kd_jax.evals.runs import STAGES
from kd_jax.recipes import plan
from kd_jax.recipes.setup import TextSetup
from kd_jax.train import step
from tests import smoke

FILES = Path(configs.__file__).parent.glob("*.py")
SHARED = ("__init__", "common", "samples")
NAMES = sorted(file.stem for file in FILES if file.stem not in SHARED)
# Smoke runs: of every config its own variant, and those that run through other code.
SMOKE = [f"{name}:smoke" for name in NAMES if name != "small_sweep"]
SMOKE += ["finetune_glue:stsb-smoke", "finetune_squad:v2-smoke"]
SMOKE += ["finetune_agnews:mobilebert-smoke", "multi_teacher_agnews:sequential-smoke"]


def load(name, variant=None):
    return importlib.import_module(f"configs.{name}").get_config(variant)


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
    if config.recipe == "sweep":
        config = finetuning_of(config)
    return plugins.load("recipes", config.recipe, "run").Setup(config)


def finetuning_of(sweep):
    """The run that a sweep tries."""
    config = type(sweep)({key: value for key, value in sweep.items() if key != "sweep"})
    config.recipe = "finetune"
    return config


@pytest.mark.parametrize("name", NAMES)
def test_step_at_full_size(name):
    setup = abstract(name)
    born, batch, teacher, inputs, static = plan.abstract_step(setup)
    train_step = functools.partial(step.train_step, plan=static)
    state, metrics = jax.eval_shape(train_step, born, batch, teacher, inputs)

    def described(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert described(state) == described(born)
    scalar = ShapeDtypeStruct((), "float32")
    assert all(leaf == scalar for leaf in jax.tree.leaves(metrics))
    logged = {"kl_t1"} if setup.config.recipe == "pretrain" else {"kl_t1", "accuracy"}
    assert set(metrics["terms"]) == {*static.objective.names} | logged


@pytest.mark.parametrize("name", SMOKE)
def test_smoke(name):
    found = smoke.run(name)
    assert json.loads((found.folder / "results.json").read_text()) == found.results
    if found.config.recipe == "sweep":
        check_sweep(found)
        return
    stages = [s for s in (*STAGES, *found.config.get("teachers", {})) if s in found.config.stages]
    assert sorted(found.results["stages"]) == sorted(stages)
    for stage, figures in found.results["stages"].items():
        assert math.isfinite(figures["loss"]) and figures["steps"] == 4
        apart = stage in ("teacher", *found.config.get("teachers", {})) or "pearson" in figures
        assert ("kl" in figures) == (not apart)
        assert len((found.folder / stage / "metrics.csv").read_text().splitlines()) == 1 + 4
        if found.config.recipe == "finetune":
            assert figures["throughput"] > 0 and figures["latency_ms"] > 0
            assert found.results["primary"] in figures
    assert found.results["export"]["checked_with"] == ["kd_jax", "pytorch"]
    assert len(list((found.folder / "plots").glob("*.png"))) == 2


def check_sweep(found):
    assert len(found.results["trials"]) == 4
    assert {tuple(trial["keys"].values()) for trial in found.results["trials"]} == {
        (weight, temperature) for weight in (0.3, 3.0) for temperature in (1.0, 4.0)
    }
    assert (found.folder / "heat_map.png").exists() and (found.folder / "trials.md").exists()


@pytest.fixture(scope="module")
def read_of_checkpoints(tmp_path_factory):
    """Keys that are read where teacher and student are checkpoints, as in no smoke run."""
    export = smoke.run("pretrain_wikitext:smoke").folder / "export" / "student"
    config = load("pretrain_wikitext", "smoke")
    config.teacher.model = config.student.model = str(export)
    config.teacher.architecture = config.student.architecture = {}
    config.tokenizer.train = ""
    with smoke.private_caches(), smoke.Reads(config) as reads:
        TextSetup(config, tmp_path_factory.mktemp("checkpoints"))
    return reads.seen


@pytest.mark.parametrize("name", SMOKE)
def test_every_key_is_read(name, read_of_checkpoints):
    """By this run, or by another of the same recipe: an assistant, say, is not in every run."""
    found = smoke.run(name)
    alike = [smoke.run(other) for other in SMOKE]
    read = {key for run in alike if run.config.recipe == found.config.recipe for key in run.read}
    read = read if found.config.recipe != "pretrain" else found.read
    assert found.keys - read - read_of_checkpoints == set()


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
