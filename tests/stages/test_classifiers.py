"""Substitution, pruning and Theseus of a fine-tuned encoder: the kinds of stages that are otherwise
tested on decoders."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from benchmarks import kill_resume
from kd_jax import cli, evaluate
from kd_jax.config import substitution
from kd_jax.errors import UserError
from kd_jax.models import family, hf
from kd_jax.run.run import build as build_run
from kd_jax.run.teaching import given_teachers
from kd_jax.smoke import samples
from kd_jax.stages import prune, substitute
from kd_jax.train import records
from tests.recipes import finetuning

pytestmark = pytest.mark.usefixtures("caches")

ORDER = [1, 2, 3, 0]  # where the task's classes stand among the teacher's


class Killed(Exception):
    pass


def config(*stages, **changes):
    """A BERT of three blocks, fine-tuned on the classes in another order; two of them become
    bottlenecks, one every two steps of six."""
    c = substitution(finetuning.config("student"))
    teacher = finetuning.checkpoint(classes=finetuning.OTHERS, layers=3)
    c.teacher = finetuning.teacher(teacher)
    c.student.architecture, c.student.init = {}, "teacher"
    c.objective = dict(ce=dict(weight=1.0), kl=dict(weight=1.0), hidden=dict(weight=1.0))
    c.stages = {name: {} for name in stages or ("substitute", "prune", "theseus")}
    c.steps, c.task.seq_len = 6, 8  # one length to compile for
    c.substitution.update(width=8, num_heads=1, num_kv_heads=1, ffn_width=16, target=0.35)
    c.substitution.update(steps=2, warmup=1, learning_rate=5e-3)
    c.theseus.steps = 3
    c.substitution.update(changes)
    return c


def build(config, folder):
    with finetuning.quick():
        return build_run(config, epath.Path(folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers") / "run"
    return folder, finetuning.run(config(), folder)["stages"]


def test_models_of_one_size_are_compared(whole):
    folder, stages = whole
    assert list(stages) == ["teacher", "substitute", "one_shot", "prune", "theseus"]
    sizes = {name: stage.get("parameters") for name, stage in stages.items()}
    assert sizes["substitute"] == sizes["theseus"]
    assert 0 <= sizes["substitute"] - sizes["prune"] < 3 * 65  # a column of every layer
    for name in ("substitute", "one_shot", "prune", "theseus"):
        assert stages[name]["reduction_percent"] > 35 and stages[name]["kl"] > 0
        assert {"loss", "accuracy", "agreement"} <= stages[name].keys()
    rows = records.read(folder / "substitute" / "swaps.csv")
    assert [(row["step"], row["blocks"]) for row in rows] == [("0", "2"), ("2", "1")]
    assert sizes["substitute"] == int(rows[-1]["parameters"])
    assert stages["substitute"]["best_step"] > 2  # of the last model alone
    metrics = records.read(folder / "substitute" / "metrics.csv")
    assert {"ce", "kl", "hidden"} <= metrics[0].keys() and len(metrics) == 6


def test_the_exported_model_has_compact_blocks_and_can_be_read_again(whole, tmp_path, monkeypatch):
    folder, stages = whole
    found = hf.read_config(folder / "export/substitute")
    assert found["architectures"] == ["KDJaxBertForSequenceClassification"]
    assert [block["kind"] for block in found["blocks"]] == ["full", "bottleneck", "bottleneck"]
    assert list(found["id2label"].values()) == list(finetuning.CLASSES)
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    test = samples() / "ag_news"
    flags = [
        f"--model={folder / 'export/substitute'}",
        "--task=agnews",
        f"--data={test}",
        "--seq_len=8",
    ]
    with finetuning.quick():
        evaluate.main([*flags, f"--json={tmp_path / 'figures.json'}"])
    again = json.loads((tmp_path / "figures.json").read_text())
    assert again["loss"] == pytest.approx(stages["substitute"]["loss"], rel=1e-5)
    assert again["accuracy"] == stages["substitute"]["accuracy"]


def test_every_kind_begins_with_classes_in_the_order_of_the_task(tmp_path):
    run = build(config("substitute", "prune", "theseus", "student"), tmp_path / "run")
    (tmp_path / "run/substitute").mkdir(parents=True)
    given = given_teachers(run)
    assert run.order("teacher") == tuple(ORDER)
    wanted = np.asarray(given["teacher"]["head"]["classifier"]["kernel"])[:, ORDER]
    with finetuning.quick():
        for name in ("substitute", "theseus", "student"):
            state = run.stage(name).phases(run, given)[0].enter(None)
            found = state.params["student"]["head"]["classifier"]["kernel"]
            np.testing.assert_array_equal(found, wanted, err_msg=name)
        found = prune.pruned(run, "prune", given)["head"]["classifier"]["kernel"]
    np.testing.assert_array_equal(found, wanted)


def test_a_swap_changes_the_blocks_that_it_names_and_nothing_else(tmp_path):
    run = build(config("substitute"), tmp_path / "run")
    (tmp_path / "run/substitute").mkdir(parents=True)
    given = given_teachers(run)
    with finetuning.quick():
        state = run.principal.phases(run, given)[0].enter(None)
    before = family.flatten(run.original(given))
    after = family.flatten(jax.device_get(state.params["student"]))
    new = {path for path in after if path.startswith("backbone/blocks/2/")}
    assert {path for path in after if "/inner/" in path or "/down/" in path} - new == {
        f"backbone/blocks/{i}/mlp/down/{kind}" for i in (0, 1) for kind in ("kernel", "bias")
    }
    for path in after.keys() - new:
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)


def test_killed_within_a_swap_it_ends_the_same(whole, tmp_path, monkeypatch):
    folder, stages = whole
    swapped = substitute.Substituted._swapped

    def dying(self, *args):
        if self.swap.number == 2:
            raise Killed
        return swapped(self, *args)

    monkeypatch.setattr(substitute.Substituted, "_swapped", dying)
    changed = config("substitute")
    with pytest.raises(Killed):
        finetuning.run(changed, tmp_path / "run")
    monkeypatch.undo()
    again = finetuning.run(changed, tmp_path / "run")
    assert kill_resume.differences(tmp_path / "run", folder) == []
    assert again["stages"]["substitute"]["loss"] == stages["substitute"]["loss"]


@pytest.mark.parametrize("kind", ["substitute", "prune", "theseus"])
def test_refuses_blocks_without_a_compact_form(tmp_path, kind):
    c = config(kind)
    c.teacher = finetuning.teacher("")
    c.teacher.architecture, c.teacher.init = {"model_type": "mobilebert"}, "scratch"
    with pytest.raises(UserError, match="the blocks of mobilebert have no compact form; take a"):
        build_run(c)


def test_refuses_heads_that_share_keys(tmp_path):
    with pytest.raises(UserError, match="2 heads and 1 key/value heads; heads of an encoder"):
        build(config("substitute", num_heads=2), tmp_path)
