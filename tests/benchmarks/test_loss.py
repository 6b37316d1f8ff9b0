"""The losses that are compared with float64 are those that the engine computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import loss_case
from kd_jax.objectives import ce, vocab
from kd_jax.precision import Policy
from tests.objectives.rows import DIVERGENCES


def test_float64_is_the_engines_loss():
    inputs = loss_case.Shape(rows=8, width=16, vocab_size=100).inputs("fp32")
    exact = loss_case.reference(inputs)
    student, teacher = (
        vocab.Head(*(jnp.asarray(inputs[f"{who}_{end}"]) for end in ("ND", "VD")), None)
        for who in ("student", "teacher")
    )
    for loss, (of_labels, name) in loss_case.LOSSES.items():
        settings = dict(beta=loss_case.BETA, scaled=False) if name == "jsd" else {}
        terms = vocab.RowTerm(name, DIVERGENCES[name](**settings)), vocab.RowTerm("ce", ce.make())
        scales = {name: jnp.float32((1 - of_labels) / 8), "ce": jnp.float32(of_labels / 8)}
        engine, weights = vocab.Engine(terms, Policy(), Policy()), dict.fromkeys(scales, np.ones(8))

        @jax.jit
        @jax.value_and_grad
        def found(student, engine=engine, scales=scales, weights=weights):
            return vocab.vocab_loss(
                engine, student, teacher, inputs["labels_N"], weights, scales, {}
            )[0]

        value, grads = found(student)
        assert value == pytest.approx(exact[loss]["value"], rel=1e-5)
        for part, grad in (("features", grads.features_ND), ("unembedding", grads.unembed_VD)):
            wanted = exact[loss][part]
            np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
