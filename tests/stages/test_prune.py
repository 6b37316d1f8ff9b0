"""Runs of pruning: what they leave, alone and beside substitution."""

import jax
import numpy as np
import pytest

from kd_jax import storage
from kd_jax.errors import UserError
from kd_jax.models import compact, model_config
from kd_jax.models.blueprint import count as count_of
from kd_jax.recipes import distil
from kd_jax.run import stage, workdir
from kd_jax.run.run import build as build_run
from kd_jax.run.teaching import given_params
from kd_jax.train import loop, records
from tests.recipes import substituting

STEPS = 4


class Killed(Exception):
    pass


def config(folder, **changes):
    """The GPT-2 of the tests of substitution, pruned and fine-tuned. `changes` of the section."""
    c = substituting.config(folder)
    c.recipe = "prune"
    del c.substitution, c.theseus
    c.stages = dict(prune={})
    c.steps = STEPS
    c.pruning.update(dict(target=0.3) | changes)
    return c


def run(config, folder):
    with substituting.quick(), workdir.enter(config, "example", str(folder)) as place:
        return distil.run(config, place)


def build(config, folder=None):
    with substituting.quick():
        return build_run(config, folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config, folder, results) of an undisturbed run."""
    folder = tmp_path_factory.mktemp("prune")
    c = config(folder)
    return c, folder / "run", run(c, folder / "run")


def trained(config, folder):
    """The parameters of the run's best checkpoint."""
    made = build(config, folder)
    return made, jax.device_get(stage.restore_best(made, made.principal))


def test_figures_before_and_after_training(whole):
    config, folder, results = whole
    found = results["stages"]
    assert list(found) == ["teacher", "one_shot", "prune"]
    teacher = build(config).models["teacher"]
    with substituting.quick():
        params = given_params(build(config), "teacher")
    model = teacher.abstract().replace(params=params)
    model, made = compact.prune(model, teacher.family, teacher.config, 0.3, "global")
    blocks = [made.shape(layer) for layer in range(3)]
    assert storage.read_json(folder / "pruned.json") == {
        "blocks": model_config.write_blocks(blocks)
    }
    assert len(set(blocks)) > 1  # as the weights have it, and not as it was planned
    for name in ("one_shot", "prune"):
        assert found[name]["parameters"] == count_of(model.params)
        assert 30.0 <= found[name]["reduction_percent"] < 30.5
        assert {"loss", "perplexity", "kl", "agreement"} <= found[name].keys()
    assert found["teacher"]["reduction_percent"] == 0 < found["one_shot"]["kl"]
    assert found["prune"]["loss"] < found["one_shot"]["loss"] and "steps" not in found["one_shot"]
    _, after = trained(config, folder)
    described = [jax.tree.map(np.shape, each) for each in (after, model.params)]
    assert described[0] == described[1]
    # Training began with what was judged: four steps of 1e-3 at most lie between.
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after, jax.device_get(model.params))
    assert 0 < max(jax.tree.leaves(moved)) < 4e-3
    rows = records.read(folder / "prune" / "metrics.csv")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4] and "kl" in rows[0]


@pytest.mark.parametrize("at", [0, 3])
def test_a_killed_run_ends_as_an_undisturbed_one(whole, tmp_path, monkeypatch, at):
    config, folder, _ = whole
    step = loop.train_step

    def dying(state, *args, **kwargs):
        if int(state.step) == at:
            raise Killed
        return step(state, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", dying)
    with pytest.raises(Killed):
        run(config, tmp_path / "run")
    monkeypatch.setattr(loop, "train_step", step)
    run(config, tmp_path / "run")
    (_, ours), (_, theirs) = trained(config, tmp_path / "run"), trained(config, folder)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    for file in ("prune/metrics.csv", "prune/eval.csv", "one_shot/results.json", "pruned.json"):
        assert (tmp_path / "run" / file).read_text() == (folder / file).read_text()


def test_beside_substitution_it_makes_a_model_as_small(tmp_path):
    c = substituting.config(tmp_path)
    c.stages = dict(substitute={}, prune={}, student={})
    for target in (0.0, 0.2):  # 0: what substitution comes to, which is above its target
        c.pruning.target = target
        made = substituting.build(c)
        assert list(made.models) == ["teacher", "student", "substitute", "prune"]
        count = {name: count_of(each.abstract().params) for name, each in made.models.items()}
        wanted = count["student"] if not target else 0.8 * count["teacher"]
        assert wanted - 3 * 33 < count["prune"] <= wanted  # a column of every layer
    assert count["student"] == count["substitute"]
    c.stages = dict(prune={})
    c.pruning.target = 0.0
    assert count_of(substituting.build(c).models["prune"].abstract().params) < count["prune"]


def test_it_learns_from_the_original_or_from_the_labels(tmp_path):
    for learns, terms in ((True, {"ce", "kl", "hidden"}), (False, {"ce"})):
        made = build(config(tmp_path, distil=learns))
        assert set(made.principal.program.objective.names) == terms
        assert made.principal.learns == learns


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(target=0.9), "pruning away 0.9 of all parameters: .* at most 0.[0-9]+ of this model"),
        (dict(target=0.0), "pruning away 0.0 of all parameters: want a share above 0"),
        (dict(ranking="best"), "ranking='best': have global, layer"),
        (dict(ranked="layer"), "pruning.ranked"),
    ],
)
def test_refuses_before_anything_is_read(tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        build(config(tmp_path, **changes))
