"""Row-wise terms as they are discovered, and logits run through the engine as they are."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import plugins
from kd_jax.objectives import vocab
from kd_jax.objectives.divergence import Divergence
from kd_jax.objectives.vectors import VectorTerm
from kd_jax.precision import Policy

FP32 = Policy()
PLUGINS = {
    name: plugins.load("objectives", name, "make").make
    for name in plugins.names("objectives", "make")
}
ROW_TERMS = {name: make for name, make in PLUGINS.items() if isinstance(make(), Divergence)}
DIVERGENCES = {name: make for name, make in ROW_TERMS.items() if "classes" in make().suits}
VECTOR_TERMS = {name: make for name, make in PLUGINS.items() if isinstance(make(), VectorTerm)}
STATE_TERMS = {name: make for name, make in PLUGINS.items() if name not in ROW_TERMS | VECTOR_TERMS}
OF_TEACHER = sorted(name for name, make in DIVERGENCES.items() if make().needs_teacher)
OWN = {  # settings that only some have
    "jsd": [*({"beta": beta} for beta in (0.0, 0.1, 0.9)), {"beta": 0.3, "scaled": False}],
    "skl": [{"alpha": 0.0}, {"alpha": 0.6}],
    "srkl": [{"alpha": 0.0}, {"alpha": 0.6}],
    "symmetric_kl": [{"forward": 0.2}],
    "akl": [{"head": 0.9}],
}


def cases(name: str) -> list[tuple[dict, float | jax.Array]]:
    """(settings, temperature) that a divergence is tried with; arrays are traced temperatures."""
    make = DIVERGENCES[name]
    if not make().has_temperature:
        return [({}, 1.0)]
    tried = [({}, t) for t in (1.0, 2.0, 2.5, jnp.float32(1.0), jnp.float32(2.5))]
    if "t_squared" in inspect.signature(make).parameters:
        tried += [({"t_squared": False}, t) for t in (2.0, jnp.float32(2.5))]
    tried += [(settings, 2.5) for settings in OWN.get(name, [])]
    return tried


def logits(rows: int = 6, vocab_size: int = 11, seed: int = 0, size: float = 3.0):
    """(student_CV, teacher_CV, labels_C): ordinary rows, one with large logits, one even one."""
    rng = np.random.default_rng(seed)
    student, teacher = size * rng.normal(size=(2, rows, vocab_size)).astype(np.float32)
    student[1], teacher[1] = student[1] * 4 + 50, teacher[1] * 4 - 50
    student[2] = 1.0
    return student, teacher, rng.integers(0, vocab_size, rows).astype(np.int32)


def head(logits_CV, bias_V=None) -> vocab.Head:
    """A head whose logits are exactly these."""
    return vocab.Head(jnp.asarray(logits_CV), jnp.eye(logits_CV.shape[1]), bias_V)


def value_and_grad(divergences, temperatures, student_CV, teacher_CV, labels_C):
    """Values (K, C) and gradients (K, C, V) of K divergences on every row, by the engine.

    A temperature that is a Python float is static, an array is traced.
    """
    static = [t if isinstance(t, float) else None for t in temperatures]
    terms = [
        vocab.RowTerm(str(i), divergence, static[i]) for i, divergence in enumerate(divergences)
    ]
    engine = vocab.Engine(tuple(terms), FP32, FP32)
    traced = {str(i): t for i, t in enumerate(temperatures) if static[i] is None}
    return jax.device_get(terms_and_rows(engine, student_CV, teacher_CV, labels_C, traced))


@functools.partial(jax.jit, static_argnums=0)
def terms_and_rows(engine, student_CV, teacher_CV, labels_C, traced):
    terms = engine.terms
    alone = not any(term.divergence.needs_teacher for term in terms)

    def row(student_V, teacher_V, label, scales, traced):
        return vocab.vocab_loss(
            engine,
            head(student_V[None]),
            None if alone else head(teacher_V[None]),
            label[None],
            {term.name: jnp.ones(1) for term in terms},
            {term.name: scales[i] for i, term in enumerate(terms)},
            traced,
        )[0]

    rows = jax.vmap(jax.value_and_grad(row), in_axes=(0, 0, 0, None, None))
    of_terms = jax.vmap(rows, in_axes=(None, None, None, 0, None))
    return of_terms(student_CV, teacher_CV, labels_C, jnp.eye(len(terms)), traced)
