"""The configs there are, and what a smoke run of each has to leave."""

import importlib
import math
import re

from kd_jax import experiments, plugins, storage
from tests import smoke

NAMES = experiments.names()


def load(name, variant=None):
    return importlib.import_module(f"configs.{name}").get_config(variant)


def of_text(config):
    """Whether it is language modelling."""
    return not plugins.load("tasks", config.task.name, "make").make.of_examples


LANGUAGE = [f"{name}:smoke" for name in NAMES if of_text(load(name))]
# Those that run through code of their own beside every config's first variant.
FINETUNING = [f"{name}:smoke" for name in NAMES if not of_text(load(name))]
FINETUNING.remove("small_sweep:smoke")
FINETUNING += ["finetune_glue:stsb-smoke", "finetune_squad:v2-smoke"]
FINETUNING += ["finetune_agnews:mobilebert-smoke", "multi_teacher_agnews:sequential-smoke"]


OF_ORDER = ("embedding", "reranking")  # tasks whose figures have no loss and no KL


def check(name):
    """Runs it, and looks at what it left."""
    found = smoke.run(name)
    assert storage.read_json(found.folder / "results.json") == found.results
    if found.config.recipe in _OWN:
        _OWN[found.config.recipe](found)
        return
    teachers = {"teacher", *found.config.get("teachers", {})}
    stages = {*found.config.stages, *teachers}  # judged also where they are taken as they come
    if "prune" in stages:
        stages |= {"one_shot"}
    assert set(found.results["stages"]) == stages
    for stage, figures in found.results["stages"].items():
        if found.config.task.name in OF_ORDER:
            assert math.isfinite(figures[found.results["primary"]])
        else:
            assert math.isfinite(figures["loss"])
            assert ("kl" in figures) == (stage not in teachers and "pearson" not in figures)
        if not of_text(found.config):
            assert figures["throughput"] > 0 and figures["latency_ms"] > 0
            assert found.results["primary"] in figures
        if stage in found.config.stages:
            assert figures["steps"] == 4
            assert len((found.folder / stage / "metrics.csv").read_text().splitlines()) == 1 + 4
    sizes = {name: figures["parameters"] for name, figures in found.results["stages"].items()}
    if "substitute" in sizes:  # what is compared is equally small
        assert sizes["substitute"] == sizes.get("student", sizes["substitute"]) < sizes["teacher"]
    assert found.results["export"]["checked_with"] == ["kd_jax", "pytorch"]
    assert len(list((found.folder / "plots").glob("*.png"))) == 2


def _check_sweep(found):
    assert {tuple(trial["keys"].values()) for trial in found.results["trials"]} == {
        (weight, temperature) for weight in (0.3, 3.0) for temperature in (1.0, 4.0)
    }
    assert len(found.results["trials"]) == 4
    assert (found.folder / "heat_map.png").exists() and (found.folder / "trials.md").exists()


def _check_ensemble(found):
    rounds, rows = found.config.rounds, (found.folder / "rounds.csv").read_text().splitlines()
    assert len(found.results["rounds"]) == len(rows) - 1 == rounds
    for each in found.results["rounds"]:
        assert math.isfinite(each["ensemble"]["loss"]) and each["ensemble"]["throughput"] > 0
        metrics = found.folder / f"round_{each['round']}" / "metrics.csv"
        assert len(metrics.read_text().splitlines()) == 1 + 4
    assert found.results["export"]["checked_with"] == ["pytorch"]
    assert len(found.results["export"]["members"]) == rounds
    assert (found.folder / "rounds.png").exists()


_OWN = {"sweep": _check_sweep, "ensemble": _check_ensemble}


def unread(name, others, more=frozenset()):
    """Keys of a run that neither it nor any other has read: an assistant, say, is not in every
    run. Sections of one kind are read by the same code."""
    read = {_kind(key) for other in others for key in smoke.run(other).read} | more
    return {key for key in smoke.run(name).keys if _kind(key) not in read}


def _kind(key):
    key = re.sub(r"^assistant\.", "student.", key)
    return re.sub(r"^teachers\.\w+\.", "teacher.", key)
