"""Teachers of embedders: their vectors, stored or computed in the step, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from etils import epath

from kd_jax import config as defaults
from kd_jax.errors import UserError
from kd_jax.models.model_config import Dense
from kd_jax.recipes import distil
from kd_jax.run import stage, teaching
from kd_jax.run.run import build
from kd_jax.run.teaching import TeacherLogits, given_teachers, teacher_and_batches
from kd_jax.smoke import smoke_finetuning
from kd_jax.teachers.ensemble import Several, Stored
from tests.recipes import finetuning

ONLINE = dict(max_gb=0.0, folder="")
TERMS = {name: {"weight": 1.0} for name in ("embedding", "similarity", "margin_mse", "contrastive")}
COLUMNS = ("query", "positive", "negative")


@pytest.fixture(scope="module", autouse=True)
def quick(caches):
    with finetuning.quick():
        yield


def config(*stages: str, objective=TERMS, columns=COLUMNS, **changes):
    """A student half as wide as its teachers, of which the other one has another tokenizer."""
    c = defaults.finetuning()
    c.task = dict(name="embedding", columns=columns, scored="sts")
    c.objective, c.stages = objective, dict.fromkeys(stages or ("student",), {})
    c = smoke_finetuning(c)
    paths = [finetuning.checkpoint(name, "embedding") for name in ("teacher", "other")]
    c.teacher, c.teachers.other = map(finetuning.teacher, paths)
    c.student.init, c.student.architecture = "scratch", dict(hidden_size=16)
    c.precision, c.tokenizer.train, c.accumulate = "fp32", "", 2
    c.update(changes)
    return c


def taught(c, folder):
    """(teacher, the vectors of the first batch) of a student's stage."""
    run = build(c, epath.Path(folder))
    this = run.stages[-1]
    teacher, stream = teacher_and_batches(run, this, TeacherLogits(run, given_teachers(run)))
    assert this.program.caches_vectors and not this.program.objective.needs_teacher_states
    return teacher, jax.jit(lambda teacher, batch: teacher(batch).features)(teacher, stream[0])


def test_stored_vectors_and_teachers_in_the_step_are_the_same(tmp_path, monkeypatch):
    cache = dict(max_gb=1.0, folder=str(tmp_path / "vectors"))
    teacher, stored_B1D = taught(config(cache=cache), tmp_path)
    assert isinstance(teacher, Stored) and stored_B1D.shape == (16 * 3, 1, 32)
    assert np.std(stored_B1D, axis=0).min() > 0.01
    monkeypatch.setattr(teaching, "predict", lambda *args: pytest.fail("computed again"))
    np.testing.assert_array_equal(taught(config(cache=cache), tmp_path)[1], stored_B1D)
    teacher, online_B1D = taught(config(cache=ONLINE), tmp_path)
    assert isinstance(teacher, Several)
    np.testing.assert_allclose(online_B1D, stored_B1D, atol=1e-5)


def test_projections_are_fitted_to_the_vectors_of_the_first_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(teaching, "FITTED", 24)
    run = build(config(), epath.Path(tmp_path))
    parameters = given_teachers(run)
    this, logits = run.stages[-1], TeacherLogits(run, parameters)
    drawn = stage.create_state(run, this, parameters)
    begun = []
    train = lambda run, this, phases, **given: begun.append(phases[0].enter(None))  # noqa: E731
    monkeypatch.setattr(stage, "train", train)
    with pytest.raises(AttributeError):  # nothing was trained
        distil.run_stage(run, this, parameters, logits, "validation")
    (state,) = begun
    before, after = (x.params["objective"]["embedding"]["16"]["kernel"] for x in (drawn, state))
    assert after.sharding == before.sharding
    same = jax.tree.map(np.array_equal, state.params["student"], drawn.params["student"])
    assert all(jax.tree.leaves(same))
    stream = run.tasks["student"].train(this.batch_size, run.config.seed)
    ids_N = np.concatenate([stream[step].ids_B for step in range(2)])  # of 16 examples each
    rows = teaching.together(run, this, logits, "train")
    vectors_ND = np.stack([rows[i] for i in np.unique(ids_N[ids_N >= 0])])
    *_, right = np.linalg.svd(vectors_ND)
    after = np.asarray(after)
    np.testing.assert_allclose(after.T @ after, right[:16].T @ right[:16], atol=1e-3)
    only = run.stages[-1].program.objective.parts()[1]  # nothing to fit
    assert only.fitted({}, lambda: pytest.fail("computed")) == {}


def test_teachers_whose_vectors_have_no_mean(tmp_path):
    run = build(config(), epath.Path(tmp_path))
    teaching.check(run, run.stages[-1])
    wide = run.models["other"]
    config_of_it = dataclasses.replace(wide.config, dense=(Dense(48),))
    run.models["other"] = wide.changed("wide", config_of_it)
    with pytest.raises(UserError, match="vectors of teacher, other have 32, 48 numbers, and only"):
        teaching.check(run, run.stages[-1])


@pytest.mark.parametrize(
    ("columns", "changes", "message"),
    [
        ((), {}, "config.objective.contrastive needs positives, and the training texts have none"),
        (COLUMNS[:2], {}, "config.objective.margin_mse needs negatives"),
        (COLUMNS, dict(average="probabilities"), "'probabilities': an embedder has none; take lo"),
        (COLUMNS, dict(objective=dict(kl=dict(weight=1.0))), "objective.kl compares logits, and"),
        ((), dict(stages=("baseline",)), "lone texts say nothing without a teacher"),
    ],
)
def test_mistakes(columns, changes, message, tmp_path):
    stages = changes.get("stages", ("student",))
    others = {key: value for key, value in changes.items() if key != "stages"}
    with pytest.raises(UserError, match=message) as error:
        build(config(*stages, columns=columns, **others), epath.Path(tmp_path))
    assert "\n" not in str(error.value)


def test_a_baseline_of_pairs_is_contrastive(tmp_path):
    run = build(config("baseline", columns=COLUMNS[:2]), epath.Path(tmp_path))
    assert run.stages[0].program.objective.names == ["contrastive"]
