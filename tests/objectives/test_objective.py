import functools

import jax
import numpy as np
import pytest

from kd_jax.errors import UserError
from kd_jax.objectives import vocab
from kd_jax.objectives.objective import build_objective, held_out_objective
from kd_jax.types import ModelSpec
from tests.objectives import naive
from tests.objectives.outputs import VOCAB, batch, output
from tests.objectives.rows import DIVERGENCES, FP32, OF_TEACHER, STATE_TERMS


def run(settings, rows, student, teacher, scales=None, params=None):
    """(loss, totals, the objective's weights), with temperatures as at step 0."""
    objective, coefficients, temperatures = build_objective(
        settings, 10, FP32, None if teacher is None else FP32
    )
    scales = scales or {name: 1.0 for name in objective.names}
    temperatures = {name: at(0) for name, at in temperatures.items()}
    numbers = jax.tree.map(np.float32, (scales, temperatures))
    return compiled(objective, params or {}, student, teacher, rows, *numbers)


@functools.partial(jax.jit, static_argnums=0)
def compiled(objective, params, student, teacher, rows, *numbers):
    ready = objective.dense_labels(rows)
    loss, totals = objective(params, student, teacher, ready, *numbers)
    return loss, totals, objective.denominators(ready)


@functools.partial(jax.jit, static_argnums=0)
def gradient(objective, student, teacher, rows, scales):
    """With respect to the student's outputs."""
    return jax.grad(lambda out: objective({}, out, teacher, rows, scales, {})[0])(student)


def whole_logits(out):
    logits = np.asarray(out.logits, np.float64)
    return logits.reshape(-1, logits.shape[-1])


@pytest.mark.parametrize("positions", [False, True])
def test_terms_are_weighted_sums_at_supervised_positions(positions):
    rows = batch(positions)
    student, teacher = output(rows, 1, 7, seed=1), output(rows, 3, 7, seed=2)
    settings = {"ce": {"weight": 1.0}, "kl": {"weight": 1.0, "temperature": 2.0}}
    settings["mine"] = {"weight": 1.0, "term": "kl", "temperature": 3, "t_squared": False}
    settings["hidden"] = {"weight": 1.0}
    scales = {"ce": 0.5, "kl": 0.25, "mine": 2.0, "hidden": 0.1}
    loss, totals, weights = run(settings, rows, student, teacher, scales)
    args = (whole_logits(student), whole_logits(teacher), np.asarray(rows.labels).ravel())
    counts = np.asarray(rows.weights).ravel()
    wanted = {
        "ce": counts @ naive.value("ce", *args),
        "kl": counts @ naive.value("kl", *args, 2.0),
        "mine": counts @ naive.value("kl", *args, 3.0, t_squared=False),
        "kl_t1": counts @ naive.value("kl", *args, 1.0),
    }
    for name, total in wanted.items():
        np.testing.assert_allclose(totals[name], total, rtol=1e-5, err_msg=name)
        assert weights[name] == counts.sum()
    assert weights["hidden"] == np.asarray(rows.mask_BT).sum()
    assert totals.keys() == wanted.keys() | {"hidden"}
    assert weights.keys() == totals.keys() | {"teacher_outside"}  # whatever the vocabularies are
    np.testing.assert_allclose(loss, sum(scales[n] * totals[n] for n in scales), rtol=1e-6)


def test_all_positions_see_every_token_but_padding():
    rows = batch(positions=True)
    student, teacher = (output(rows.dense(), 1, 7, seed=seed) for seed in (1, 2))
    settings = {"ce": {"weight": 1.0}, "kl": {"weight": 1.0, "positions": "all"}}
    settings["few"] = {"weight": 1.0, "term": "kl", "positions": "supervised"}
    _, totals, weights = run(settings, rows, student, teacher)
    dense = rows.dense()
    args = (whole_logits(student), whole_logits(teacher), np.asarray(dense.labels).ravel())
    mask, supervised = (np.asarray(x).ravel() for x in (rows.mask_BT, dense.weights))
    kl = naive.value("kl", *args)
    np.testing.assert_allclose(totals["ce"], supervised @ naive.value("ce", *args), rtol=1e-5)
    np.testing.assert_allclose(totals["kl"], mask @ kl, rtol=1e-5)
    np.testing.assert_allclose(totals["few"], supervised @ kl, rtol=1e-5)
    np.testing.assert_allclose(totals["kl_t1"], supervised @ kl, rtol=1e-5)
    assert weights["kl"] == mask.sum() == 21
    assert weights["ce"] == weights["few"] == weights["kl_t1"] == supervised.sum() == 8


def test_batch_is_left_alone_where_no_term_looks_at_all_positions():
    objective, *_ = build_objective({"kl": {"weight": 1.0}}, 10, FP32, FP32)
    rows = batch(positions=True)
    assert objective.dense_labels(rows) is rows


@pytest.mark.parametrize("name", [*DIVERGENCES, *STATE_TERMS])
def test_every_term_alone_trains_the_student(name):
    rows = batch(positions=True)
    objective, *_ = build_objective({name: {"weight": 1.0}}, 10, FP32, FP32)
    student, teacher = output(rows, 2, 7, seed=1), output(rows, 4, 7, seed=2)
    slopes = gradient(objective, student, teacher, rows, {name: np.float32(1.0)})
    of_logits = (slopes.features, slopes.unembed_VD, slopes.bias_V)
    of_states = (slopes.hidden, slopes.attention)
    trained, others = (of_logits, of_states) if name in DIVERGENCES else (of_states, of_logits)
    assert any(np.asarray(slope).any() for slope in jax.tree.leaves(trained))
    assert not any(np.asarray(slope).any() for slope in jax.tree.leaves(others))


def test_without_a_teacher():
    rows = batch()
    student = output(rows, 1, 7, seed=1)
    loss, totals, _ = run({"ce": {"weight": 1.0}}, rows, student, None)
    assert totals.keys() == {"ce"} and loss == totals["ce"]


@pytest.mark.parametrize(
    ("names", "beside_teacher", "logits", "states"),
    [
        (["ce"], False, False, False),
        (["ce"], True, True, False),  # kl_t1 is measured
        (["ce", "kl"], True, True, False),
        (["ce", "hidden"], True, True, True),
    ],
)
def test_what_is_needed_of_the_teacher(names, beside_teacher, logits, states):
    settings = {name: {"weight": 1.0} for name in names}
    objective, *_ = build_objective(settings, 10, FP32, FP32 if beside_teacher else None)
    assert (objective.needs_teacher, objective.needs_teacher_states) == (logits, states)


def test_schedules_of_weights_and_temperatures():
    kl = {"weight": {"kind": "linear", "start": 0.0, "end": 1.0}, "temperature": 4}
    own = {"weight": 2, "term": "kl", "temperature": {"kind": "cosine", "start": 4.0, "end": 1.0}}
    objective, coefficients, temperatures = build_objective({"kl": kl, "own": own}, 10, FP32, FP32)
    assert [coefficients["kl"](step) for step in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert coefficients["own"](7) == 2.0
    assert list(temperatures) == ["own"]
    assert temperatures["own"](0) == 4.0
    np.testing.assert_allclose(temperatures["own"](5), 2.5)
    assert [term.temperature for term in objective.row_terms] == [4.0, None]
    # Terms are static arguments of compiled programs: equal ones must not recompile.
    again, *_ = build_objective({"kl": kl, "own": own}, 10, FP32, FP32)
    assert again == objective and hash(again) == hash(objective)


def test_projections_by_the_name_of_their_term():
    settings = {"a": {"weight": 1.0, "term": "hidden"}, "b": {"weight": 1.0, "term": "hidden"}}
    objective, *_ = build_objective(settings | {"kl": {"weight": 1.0}}, 10, FP32, FP32)
    assert objective.names == ["kl", "a", "b"]
    specs = ModelSpec(5, 1), ModelSpec(8, 3)
    params = objective.init(jax.random.key(0), *specs)
    assert params.keys() == {"a", "b"}
    assert not np.array_equal(params["a"]["pair_0"]["kernel"], params["b"]["pair_0"]["kernel"])
    assert objective.init(jax.random.key(0), ModelSpec(8, 1), specs[1]) == {}
    rows = batch()
    student, teacher = output(rows, 1, 5, seed=1), output(rows, 3, 8, seed=2)
    _, totals, _ = run(settings, rows, student, teacher, params=params)
    assert totals["a"] != totals["b"]


@pytest.mark.parametrize("sizes", [(VOCAB, VOCAB + 3), (VOCAB + 3, VOCAB)])
def test_a_model_has_the_figures_of_its_own_whatever_stands_beside_it(sizes):
    rows = batch()
    student = output(rows, 1, 7, seed=1, vocab_size=sizes[0])
    teacher = output(rows, 1, 7, seed=2, vocab_size=sizes[1])
    _, beside, _ = compiled(held_out_objective(FP32, FP32), {}, student, teacher, rows, {}, {})
    _, alone, _ = compiled(held_out_objective(FP32), {}, student, None, rows, {}, {})
    for name, total in alone.items():
        np.testing.assert_allclose(beside[name], total, rtol=1e-6, err_msg=name)

    def slopes(settings, teacher):
        own = {name: each for name, each in settings.items() if teacher is not None or name == "ce"}
        objective, *_ = build_objective(own, 1, FP32, None if teacher is None else FP32)
        weights = {name: np.float32(settings[name]["weight"]) for name in own}
        return gradient(objective, student, teacher, rows, weights)

    both = {"ce": {"weight": 1.0}, "kl": {"weight": 0.0}}
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, slopes(both, teacher), slopes(both, None))


def test_the_mass_outside_of_the_shared_ids_is_logged():
    rows = batch()
    student, teacher = output(rows, 1, 7, seed=1), output(rows, 1, 7, seed=2, vocab_size=VOCAB + 3)
    _, totals, weights = run({"kl": {"weight": 1.0}}, rows, student, teacher, {"kl": 1.0})
    outside_N = naive.softmax(whole_logits(teacher), 1.0)[:, VOCAB:].sum(-1)
    wanted = outside_N @ np.asarray(rows.weights).ravel()
    np.testing.assert_allclose(totals["teacher_outside"], wanted, rtol=1e-5)
    assert weights["teacher_outside"] == weights["kl"]


def test_held_out_figures():
    rows = batch()
    student, teacher = output(rows, 1, 7, seed=1), output(rows, 3, 7, seed=2, vocab_size=15)
    objective = held_out_objective(FP32, FP32)
    assert objective.names == []
    _, totals, weights = compiled(objective, {}, student, teacher, rows, {}, {})
    ours, theirs = whole_logits(student), whole_logits(teacher)[:, :13]
    labels, counts = np.asarray(rows.labels).ravel(), np.asarray(rows.weights).ravel()
    wanted = {
        "loss": counts @ naive.value("ce", ours, theirs, labels),
        "accuracy": counts @ (ours.argmax(-1) == labels),
        "kl": counts @ naive.value("kl", ours, theirs, labels),
        "agreement": counts @ (ours.argmax(-1) == theirs.argmax(-1)),
    }
    assert totals.keys() == wanted.keys() == weights.keys()
    for name, total in wanted.items():
        np.testing.assert_allclose(totals[name], total, rtol=1e-5, err_msg=name)
    _, alone, _ = compiled(held_out_objective(FP32), {}, student, None, rows, {}, {})
    assert alone.keys() == {"loss", "accuracy"} and alone["loss"] == totals["loss"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kld": {"weight": 1.0}},
            r"unknown objectives plug-in 'kld' \(did you mean 'kl'\?\); have",
        ),
        (
            {"x": {"weight": 1.0, "term": "combine"}},
            "'combine'.*; have: akl, attention, ce, contrastive",
        ),
        ({"kl": {"temperature": 2.0}}, "objective.kl has no weight: add objective.kl.weight"),
        ({"kl": {"weight": "high"}}, r"objective.kl.weight='high': give a number"),
        (
            {"kl": {"weight": 1.0, "alpha": 2}},
            "objective.kl: unknown alpha; have weight.* t_squared",
        ),
        (
            {"kl": {"weight": 1.0, "positions": "masked"}},
            "positions='masked': have all, supervised",
        ),
        (
            {"ce": {"weight": 1.0, "positions": "all"}},
            "objective.ce.positions='all': there are labels",
        ),
        ({"ce": {"weight": 1.0, "temperature": 2.0}}, "objective.ce takes no temperature"),
        ({"logit_mse": {"weight": 1.0, "temperature": 2.0}}, "logit_mse takes no temperature"),
        (
            {"kl": {"weight": 1.0, "temperature": 0}},
            "objective.kl.temperature=0 must be at least 0.01",
        ),
        (
            {"kl": {"weight": 1.0, "temperature": {"kind": "linear", "start": 4, "end": 0}}},
            "objective.kl.temperature.end=0.0 must be at least 0.01",
        ),
        ({"kl": {"weight": 1.0, "temperature": 1e4}}, "temperature=10000.0 must be .*at most 100"),
        ({"kl": {"weight": -1.0}}, "objective.kl.weight=-1.0 must be at least 0"),
        (
            {"ce": {"weight": 0}, "kl": {"weight": 0}},
            "objective.ce.weight, objective.kl.weight: all",
        ),
        ({"kl": {"weight": 1.0, "temperature": "hot"}}, "objective.kl.temperature='hot': give"),
        (
            {"hidden": {"weight": 1.0, "positions": "all"}},
            "hidden takes neither positions nor a temp",
        ),
        (
            {"hidden": {"weight": 1.0, "temperature": 2.0}},
            "hidden takes neither positions nor a temp",
        ),
        ({"kl": {"weight": 1.0, "rows": "entropy", "share": 0.2}}, "kl: rows='entropy', share=0.2"),
        ({"kl": {"weight": 1.0, "rows": "student_entropy"}}, "kl: rows='student.*give both"),
        (
            {"kl": {"weight": 1.0, "rows": "student_entropy", "share": 1.5}},
            "objective.kl.share=1.5 must be above 0 and at most 1",
        ),
        ({"hidden": {"weight": 1.0, "rows": "student_entropy", "share": 0.5}}, "over logits"),
        (
            {"entropy": {"weight": 1.0, "term": "kl"}},
            "objective.entropy: what is logged .* this name",
        ),
        ({"kl": 1.0}, "objective.kl=1.0: give settings, such as objective.kl.weight"),
        ({}, "objective is empty: give it a term"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(UserError, match=message):
        build_objective(settings, 10, FP32, FP32)


@pytest.mark.parametrize("name", [*OF_TEACHER, *STATE_TERMS])
def test_terms_that_need_a_teacher(name):
    with pytest.raises(
        UserError, match=f"objective.{name} needs a teacher, and this stage has none"
    ):
        build_objective({name: {"weight": 1.0}}, 10, FP32, None)


def test_the_engine_gets_the_chunk_size(monkeypatch):
    seen = []

    def vocab_loss(engine, *args):
        seen.append(engine.chunk)
        return 0.0, {}

    monkeypatch.setattr(vocab, "vocab_loss", vocab_loss)
    objective, *_ = build_objective({"ce": {"weight": 1.0}}, 10, FP32, None, chunk=3)
    rows = batch()
    objective({}, output(rows, 1, 7, seed=1), None, rows, {"ce": 1.0}, {})
    assert seen == [3]
