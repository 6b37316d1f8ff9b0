"""What a step promises: the same loss and gradient however the batch is cut up."""

import functools

import jax
import numpy as np
import pytest

from kd_jax import plugins
from kd_jax.train import step
from kd_jax.train.finite import teacher_is_finite
from tests.objectives import naive
from tests.objectives.rows import VECTOR_TERMS
from tests.train import tiny_step

# Weights that tell terms apart; every objective there is, at once, since losses are sums.
# Models of other heads and widths need these, and what they lack is for other tasks.
NEEDED = {"attention": {"heads": "mean"}, "relation": {"relation_heads": 4}}
EVERYTHING = {
    name: {"weight": 0.5 + 0.1 * i} | NEEDED.get(name, {})
    for i, name in enumerate(plugins.names("objectives", "make"))
    if name not in ("mse", "pkd", *VECTOR_TERMS)
}
PAPER = {
    "ce": {"weight": 1.0},
    "kl": {"weight": 0.7, "temperature": 2.0},
    "hidden": {"weight": 0.3},
}
CASES = {
    "mlm": ("mlm", EVERYTHING),
    "mlm, all positions": ("mlm", PAPER | {"kl": PAPER["kl"] | {"positions": "all"}}),
    "mlm, the least sure": (
        "mlm",
        {
            "ce": {"weight": 1.0, "rows": "teacher_entropy", "share": 0.5},
            "kl": {"weight": 1.0, "positions": "all", "rows": "student_entropy", "share": 0.3},
        },
    ),
    "clm": ("clm", PAPER | {"cosine": {"weight": 1.0, "term": "hidden", "kind": "cosine"}}),
}
VARIANTS = {
    "8 devices": dict(devices=8),
    "4 x 2 devices, 4 micro-batches, chunks": dict(devices=8, fsdp=2, accumulate=4, chunk=3),
    "split over 8 devices": dict(devices=8, fsdp=8),
    "4 micro-batches, chunks": dict(accumulate=4, chunk=7),
}

# Compiled in half the time; the numbers are the same.
FAST = {"xla_backend_optimization_level": 0}
run = jax.jit(step.gradient, static_argnames="program", compiler_options=FAST)


def gradient(case: str, batch=None, **how):
    """(gradient, terms) of a case, on the host."""
    head, settings = CASES[case]
    program, schedules = tiny_step.program(settings, **how)
    student, teacher = tiny_step.models(head)
    own = program.objective.init(jax.random.key(0), *tiny_step.SPECS)
    state = tiny_step.state(student, own)
    batch = tiny_step.batch(head) if batch is None else batch
    return jax.device_get(run(state, batch, teacher, tiny_step.inputs(schedules), program))


reference = functools.cache(gradient)  # one device, one micro-batch, one chunk


def check_same(found, wanted):
    """||g1 - g2|| <= 1e-5 max(||g1||, 1e-3 ||all||) for every tensor; the terms alike."""
    (grads, terms), (wanted_grads, wanted_terms) = found, wanted
    whole = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(wanted_grads)))
    assert whole > 0.1

    def near(path, g, wanted):
        limit = 1e-5 * max(np.linalg.norm(wanted), 1e-3 * whole)
        assert np.linalg.norm(g - wanted) <= limit, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(near, grads, wanted_grads)
    assert terms.keys() == wanted_terms.keys()
    for name, ratio in terms.items():
        assert ratio.weight == wanted_terms[name].weight > 0, name
        np.testing.assert_allclose(ratio.total, wanted_terms[name].total, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("case", "variant"),
    [("mlm", variant) for variant in VARIANTS]
    + [("mlm, the least sure", "4 x 2 devices, 4 micro-batches, chunks")]
    + [("clm", "split over 8 devices"), ("clm", "4 micro-batches, chunks")]
    + [("mlm, all positions", "4 x 2 devices, 4 micro-batches, chunks")],
)
def test_same_however_it_is_computed(case, variant):
    check_same(gradient(case, **VARIANTS[variant]), reference(case))


@pytest.mark.parametrize("case", CASES)
def test_same_with_padding_added(case):
    """Rows without tokens, columns without tokens, and slots without labels."""
    batch = tiny_step.batch(CASES[case][0])

    def pad(array, rows=8, columns=0, value=0):
        width = [(0, rows)] + [(0, columns)] * (array.ndim - 1)
        return np.pad(array, width, constant_values=value)

    columns = 2 if batch.positions_BP is not None else 4
    padded = batch.replace(
        ids_B=pad(batch.ids_B, value=-1),
        tokens_BT=pad(batch.tokens_BT, columns=4, value=5),
        mask_BT=pad(batch.mask_BT, columns=4),
        labels=pad(batch.labels, columns=columns, value=7),
        weights=pad(batch.weights, columns=columns),
    )
    if batch.positions_BP is not None:
        padded = padded.replace(positions_BP=pad(batch.positions_BP, columns=columns))
    check_same(gradient(case, batch=padded), reference(case))


def test_terms_are_those_of_the_models_and_the_teacher_has_no_dropout():
    """Against NumPy, from whole logits."""
    settings = CASES["clm"][1]
    student, teacher = tiny_step.models("clm")
    batch, seed = tiny_step.batch("clm"), 3
    program, schedules = tiny_step.program(settings, dropout=True)
    own = program.objective.init(jax.random.key(0), *tiny_step.SPECS)
    inputs = tiny_step.inputs(schedules, seed=seed)
    state = tiny_step.state(student, own)
    _, terms = jax.device_get(run(state, batch, teacher, inputs, program))

    logits = jax.jit(lambda model, seed: model(batch, seed).logits)
    ours, theirs = (
        np.asarray(x, np.float64).reshape(-1, x.shape[-1])
        for x in (logits(student, jax.numpy.uint32(seed)), logits(teacher, None))
    )
    rows, counts = (ours, theirs, batch.labels.ravel()), batch.weights.ravel()
    for name, t in (("ce", 1.0), ("kl", 2.0), ("kl_t1", 1.0)):
        each = naive.value("ce" if name == "ce" else "kl", *rows, t)
        np.testing.assert_allclose(terms[name].total, counts @ each, rtol=1e-5, err_msg=name)
        assert terms[name].weight == counts.sum()


def test_gradient_is_that_of_the_loss():
    """Of the sum of weight x mean, by finite differences along the gradient."""
    head, settings = CASES["mlm"]
    # By definition these have constants in them that depend on the student.
    settings = {k: v for k, v in settings.items() if k not in ("akl", "policy_gradient")}
    program, schedules = tiny_step.program(settings)
    student, teacher = tiny_step.models(head)
    own = program.objective.init(jax.random.key(0), *tiny_step.SPECS)
    given = tiny_step.batch(head), teacher, tiny_step.inputs(schedules), program
    grads = jax.device_get(run(tiny_step.state(student, own), *given)[0])

    def loss(size):
        params = {"student": student.params, "objective": own}
        moved = jax.tree.map(lambda p, g: p + size * g, params, grads)
        terms = run(tiny_step.state(student).replace(params=moved), *given)[1]
        return sum(schedules[0][name](0) * float(terms[name].value()) for name in settings)

    square = sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))
    step_size = 1e-3 / np.sqrt(square)
    slope = (loss(step_size) - loss(-step_size)) / (2 * step_size)
    np.testing.assert_allclose(slope, square, rtol=1e-2)


@pytest.mark.parametrize("how", [dict(devices=8, fsdp=2), dict(accumulate=8)])
def test_no_two_devices_or_micro_batches_share_their_dropout(how):
    """Eight copies of a row: losses differ by dropout alone."""
    program, schedules = tiny_step.program(
        {"ce": {"weight": 1.0}}, dropout=True, teacher=False, **how
    )
    student, _ = tiny_step.models("mlm")
    copies = jax.tree.map(lambda x: np.repeat(x[:1], 8, axis=0), tiny_step.batch("mlm"))

    def losses(seed):
        """Of each row, the others not being counted."""
        inputs = tiny_step.inputs(schedules, seed=seed)
        for row in range(8):
            batch = copies.replace(weights=copies.weights * (np.arange(8) == row)[:, None])
            _, terms = run(tiny_step.state(student), batch, None, inputs, program)
            yield float(terms["ce"].total)

    first, other = list(losses(1)), list(losses(2))
    assert len({*first, *other}) == 16
    assert list(losses(1)) == first


@pytest.mark.parametrize("bad", [None, np.nan, np.inf])
def test_a_teacher_that_is_not_finite_is_found_on_any_device(bad):
    (_, teacher), (program, _) = (
        tiny_step.models("clm"),
        tiny_step.program({"kl": {"weight": 1.0}}, 4, 2),
    )
    rows, leaves = tiny_step.batch("clm"), jax.tree.leaves(teacher.params)
    if bad is not None:
        tree = jax.tree.structure(teacher.params)
        spoilt = [leaves[0].at[(-1,) * leaves[0].ndim].set(bad), *leaves[1:]]
        teacher = teacher.replace(params=jax.tree.unflatten(tree, spoilt))
    assert bool(teacher_is_finite(teacher, rows, program=program)) == (bad is None)
