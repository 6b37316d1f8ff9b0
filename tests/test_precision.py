import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import precision
from kd_jax.errors import UserError
from kd_jax.metrics import likelihood
from kd_jax.models import family
from kd_jax.objectives.objective import build_objective
from kd_jax.precision import Policy, einsum, policy_for, rows_product
from kd_jax.train import sharding, step
from tests.models import tiny
from tests.train import tiny_step

FP32 = Policy()
ON_CPU = policy_for("bf16", "cpu")
ON_GPU = policy_for("bf16", "gpu")
# A linear layer, and the two products of attention, with shapes of their operands.
SPECS = {
    "btd,df->btf": ((2, 5, 8), (8, 6)),
    "ntk,nsk->nts": ((3, 4, 8), (3, 6, 8)),
    "nts,nsk->ntk": ((3, 4, 6), (3, 6, 8)),
}


def operands(spec):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in SPECS[spec]]


def rounded(array, policy):
    """float64 of what a product multiplies."""
    return np.asarray(array.astype(jnp.dtype(policy.operand)), np.float64)


def products(spec, policy):
    """(result, gradients) of ours, and in float64 of the rounded operands and cotangent."""
    a, b = operands(spec)
    if policy.activation == "bfloat16":
        a = a.astype(jnp.bfloat16)  # what flows between layers; b is a parameter, or flows too
    run = jax.jit(lambda a, b: jax.vjp(lambda a, b: einsum(spec, a, b, policy), a, b)[0])
    result = run(a, b)
    g = jnp.asarray(np.random.default_rng(1).normal(size=result.shape), result.dtype)
    grads = jax.jit(lambda a, b, g: jax.vjp(lambda a, b: einsum(spec, a, b, policy), a, b)[1](g))
    found = grads(a, b, g)
    left, right = spec.split("->")[0].split(",")
    out = spec.split("->")[1]
    A, B, G = (rounded(x, policy) for x in (a, b, g))
    wanted = (np.einsum(f"{out},{right}->{left}", G, B), np.einsum(f"{left},{out}->{right}", A, G))
    assert [x.dtype for x in found] == [a.dtype, b.dtype]
    return (result, *found), (np.einsum(spec, A, B), *wanted)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("policy", [FP32, ON_CPU, ON_GPU], ids=["fp32", "cpu", "gpu"])
def test_products_forward_and_backward(spec, policy):
    found, wanted = products(spec, policy)
    assert found[0].dtype == jnp.dtype(policy.activation)
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.shape == exact.shape
        # A result in bfloat16 was rounded once, after a float32 sum.
        error = 2**-8 if ours.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=error, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_all_three_products_multiply_bfloat16_and_sum_in_float32(spec):
    def both(a, b, g):
        result, pull = jax.vjp(lambda a, b: einsum(spec, a, b, ON_CPU), a, b)
        return result, pull(g)

    a, b = operands(spec)
    g = einsum(spec, a, b, ON_CPU)
    text = jax.jit(both).lower(a, b, g).as_text()
    dots = re.findall(r"dot_general .*: \((.*)\) -> (.*)", text)
    assert len(dots) == 3
    for inputs, result in dots:
        assert inputs.count("xbf16>") == 2 and result.startswith("tensor<") and "xf32>" in result


@pytest.mark.parametrize("width", [8, 7])
@pytest.mark.parametrize("policy", [FP32, ON_CPU, ON_GPU], ids=["fp32", "cpu", "gpu"])
def test_rows_product(width, policy):
    rng = np.random.default_rng(0)
    a_NA, b_NB = (jnp.asarray(rng.normal(size=(50, n)), jnp.float32) for n in (width, 5))
    found = jax.jit(rows_product, static_argnums=2)(a_NA, b_NB, policy)
    assert found.dtype == jnp.float32
    wanted = rounded(a_NA, policy).T @ rounded(b_NB, policy)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_policies():
    assert policy_for("fp32", "cpu") == Policy("float32", "float32", "explicit")
    accelerator = {"least_rows": 1024}
    assert policy_for("fp32", "tpu") == Policy("float32", "float32", "pallas", **accelerator)
    assert ON_CPU == Policy("bfloat16", "float32", "explicit") and ON_CPU.on_cpu_in_bf16
    assert ON_GPU == Policy("bfloat16", "bfloat16", "cudnn", **accelerator)
    assert not ON_GPU.on_cpu_in_bf16
    assert policy_for("bf16", "tpu") == Policy("bfloat16", "bfloat16", "pallas", **accelerator)
    assert policy_for("fp32", "gpu") == Policy("float32", "float32", "blocks", **accelerator)
    with pytest.raises(UserError, match="precision='fp16': have fp32, bf16"):
        policy_for("fp16", "gpu")


@pytest.mark.parametrize(
    "version, capability, attention",
    [
        ("cuda 12090", "8.0", "cudnn"),
        ("cuda 12090", "7.5", "blocks"),
        ("rocm 6", "gfx90a", "blocks"),
    ],
)
def test_a_card_without_fused_attention_says_so_once(
    version, capability, attention, monkeypatch, caplog
):
    client = types.SimpleNamespace(platform_version=version)
    card = types.SimpleNamespace(client=client, compute_capability=capability, device_kind="A card")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [card])
    precision._has_cudnn_attention.cache_clear()
    try:
        assert [policy_for("bf16", "gpu").attention for _ in range(2)] == [attention] * 2
    finally:
        precision._has_cudnn_attention.cache_clear()
    lines = [record.getMessage() for record in caplog.records]
    assert [line[:28] for line in lines] == ["A card: no fused attention, "] * (
        attention == "blocks"
    )


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("head", ["clm", "mlm"])
def test_fp32_is_float32_on_every_platform(head, platform):
    policy, name = policy_for("fp32", platform), tiny_step.FAMILY[head]
    teacher = tiny.model(name, head, policy=policy)
    student = tiny.model(name, head, policy=policy, **tiny_step.STUDENT[head])
    settings = {name: {"weight": 1.0} for name in ("ce", "kl", "hidden")}
    settings["attention"] = {"weight": 1.0, "heads": "mean", "causal": head == "clm"}
    objective, *schedules = build_objective(settings, 10, policy, policy)
    specs = (dataclasses.replace(spec, causal=head == "clm") for spec in tiny_step.SPECS)
    state = tiny_step.state(student, objective.init(jax.random.key(0), *specs))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    program = step.Program(objective, mesh, family.PARTITION)
    rows, inputs = tiny_step.batch(head), tiny_step.inputs(schedules)
    for rates in ("with dropout", "without"):
        program = dataclasses.replace(program, dropout=rates == "with dropout")
        jitted = jax.jit(functools.partial(step.gradient, program=program))
        traced = jitted.trace(state, rows, teacher, inputs)
        only_highest(traced.lower(lowering_platforms=(platform,)))
    if head == "clm":
        score = functools.partial(likelihood.of_segments, segments=1, policy=policy)
        traced = jax.jit(lambda batch: score(student(batch), batch)).trace(rows)
        only_highest(traced.lower(lowering_platforms=(platform,)))


def only_highest(lowered):
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert len(products) > 5
    for line in products:
        assert "precision = [HIGHEST, HIGHEST]" in line, line
