"""The stage in which blocks replace others at random."""

import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks import kill_resume
from kd_jax.errors import UserError
from kd_jax.models import family as families
from kd_jax.models.blueprint import Blueprint
from kd_jax.precision import Policy
from kd_jax.run.stage import abstract_state
from kd_jax.stages import swaps, theseus
from kd_jax.train import loop, records
from kd_jax.train.checkpoint import Checkpoints
from tests import smoke
from tests.models import tiny
from tests.recipes import substituting


def config(folder, **changes):
    """The last two of three blocks are replaced; 5 of 10 steps draw."""
    c = substituting.config(folder, target=0.3)
    c.stages = dict(theseus={})
    c.theseus.steps = 5
    c.theseus.update(changes)
    return c


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theseus")
    with smoke.compilations() as compiled:
        results = substituting.run(config(folder), folder / "run")
    return folder, results, dict(compiled)


def test_two_programs_and_a_model_as_small_as_by_substitution(whole):
    folder, results, compiled = whole
    assert compiled["jit(train_step)"] == 2
    sizes = {name: stage["parameters"] for name, stage in results["stages"].items()}
    described = substituting.build(config(folder))
    assert sizes["theseus"] == swaps.of(described)[-1].parameters < sizes["teacher"]
    replaced = [row["replaced"] for row in records.read(folder / "run/theseus/metrics.csv")]
    assert replaced[5:] == ["1.0"] * 5 and set(replaced[:5]) - {"1.0"}


def moments(state):
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def test_successors_see_and_turn_as_the_layers_that_they_copy():
    family, config = families.read(tiny.CONFIGS["gemma3_text"] | {"num_hidden_layers": 4})
    teacher = Blueprint("teacher", family, config, "clm", Policy())
    settings = SimpleNamespace(group=2, layers="uniform")
    new = theseus.successor(settings, teacher, {}).config
    assert config.windows == (5, None, 5, None) and new.windows == (None, None)
    assert families.read(families.write(family, new, "clm"))[1].windows == new.windows


def test_successors_keep_their_moments_when_they_are_alone(whole, tmp_path):
    folder, *_ = whole
    run = substituting.build(config(folder), folder / "run")
    this = run.principal
    with substituting.quick():
        last = abstract_state(run, this)
    reader = Checkpoints(folder / "run/theseus/checkpoints", keep=None)
    found = moments(reader.restore(10, last))
    reader.close()
    counts = {path: int(leaf) for path, leaf in found.items() if path.endswith("count")}
    assert set(counts.values()) == {10} and len(counts) == 3  # Adam's, two groups; the warm-up's
    with substituting.quick():
        first, _ = this.phases(run, {"teacher": run.models["teacher"].abstract().params})
        before = first.abstract()
    assert moments(before).keys() == found.keys()  # none of predecessors
    assert "predecessors" in before.params["student"]["backbone"]


def test_killed_again_and_again_it_ends_the_same_bit_for_bit(whole, tmp_path, monkeypatch):
    folder, *_ = whole
    step, stops = loop.train_step, [4, 5, 7]  # before, at and after the end of the draws

    def train_step(state, *args, **kwargs):
        if int(state.step) == stops[0]:
            raise substituting.Killed
        return step(state, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", train_step)
    while stops:
        with pytest.raises(substituting.Killed):
            substituting.run(config(folder), tmp_path / "run")
        stops.pop(0)
        stops or monkeypatch.undo()
    substituting.run(config(folder), tmp_path / "run")
    assert kill_resume.differences(folder / "run", tmp_path / "run") == []


def test_predecessors_do_not_change_and_successors_do(tmp_path):
    """A step in which all blocks are drawn new, and one in which none are."""
    changed = config(tmp_path, rate=0.5)
    run = substituting.build(changed, tmp_path / "run")
    this = run.principal
    with substituting.quick():
        given = jax.jit(run.models["teacher"].draw)(jax.random.key(0))
        state = this.phases(run, {"teacher": given})[0].enter(None)
    before = jax.device_get(state.params["student"]["backbone"])
    weights = {
        name: np.float32(schedule(0)) for name, schedule in this.schedules.coefficients.items()
    }
    teacher = run.models["teacher"].abstract().replace(params=given)
    batch = loop.place(run.task.train(8, 0)[0], run.mesh)
    for drawn in (np.ones(3, bool), np.zeros(3, bool)):
        inputs = loop.Inputs(np.float32(0.01), weights, {}, np.uint32(1), drawn)
        state, _ = loop.train_step(state, batch, teacher, inputs, program=this.program)
        after = jax.device_get(state.params["student"]["backbone"])
        jax.tree.map(np.testing.assert_array_equal, before["predecessors"], after["predecessors"])
    for layer in range(3):
        pairs = jax.tree.map(
            lambda a, b: np.any(a != b), before["blocks"][layer], after["blocks"][layer]
        )
        assert any(jax.tree.leaves(pairs))


def test_draws():
    drawn = loop.Replacement(lambda step: min(0.01 * step, 1.0), 6)
    many = np.array([drawn.at(3, step) for step in range(100)])
    assert many.shape == (100, 6) and many.dtype == bool
    assert not many[0].any() and 0.3 < many.mean() < 0.7
    np.testing.assert_array_equal(many[50], drawn.at(3, 50))
    assert any((drawn.at(4, step) != drawn.at(3, step)).any() for step in range(100))
    columns = many[20:80].T
    assert all((a != b).any() for a, b in itertools.combinations(columns, 2))


def encoder(folder, **changes):
    c = config(folder, **({"group": 2} | changes))
    c.task = dict(name="mlm", seq_len=16)
    c.tokenizer.train = "wordpiece"
    c.teacher.architecture = dict(
        model_type="bert",
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return c


def test_encoders_in_language_modelling(tmp_path):
    run = substituting.build(encoder(tmp_path))
    assert run.models["theseus"].config.num_layers == 2
    given = {"teacher": run.models["teacher"].abstract().params}
    first, second = run.principal.phases(run, given)
    first.check(), second.check()
    beside = first.abstract().params["student"]["backbone"]["predecessors"]
    assert {i: len(blocks) for i, blocks in beside.items()} == {0: 2, 1: 2}
    assert (first.start, first.end, second.start, second.end) == (0, 5, 5, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(group=3), "group=3 does not divide the 4 blocks"),
        (dict(rate=1.5), r"rate=1.5 must be at least 0 and at most 1"),
        (dict(rate="often"), "config.theseus.rate='often': give a number or {kind: linear"),
        (dict(steps=10), "steps=10: the stage has 10 steps, the last of which train the successo"),
        (dict(steps=0), "config.theseus.steps=0.0 must be above 0"),
        (dict(layers="middle"), "layers='middle': have 'uniform', 'first', 'last'"),
    ],
)
def test_mistakes(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        substituting.checked(encoder(tmp_path, **changes))


def test_compact_successors_of_encoders(tmp_path):
    changed = encoder(tmp_path, group=0)
    substituting.checked(changed)
    changed.teacher.architecture.update(model_type="mobilebert", embedding_size=16)
    with pytest.raises(UserError, match="group=0: teacher mobilebert of .*: the blocks of mobile"):
        substituting.checked(changed)


def test_there_is_no_attention_to_compare(tmp_path):
    changed = encoder(tmp_path)
    changed.objective.attention = dict(weight=1.0, layers="last")
    with pytest.raises(
        UserError, match="objective.attention compares attention, which the stage th"
    ):
        substituting.checked(changed)
