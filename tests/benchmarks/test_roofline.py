"""Rooflines: what operations need, from a program's text."""

import pytest

from benchmarks import roofline
from kd_jax.plans import topology

PROGRAM = """HloModule jit_f, is_scheduled=true

%slice (p0: bf16[10,512,256], p1: s32[]) -> bf16[512,256] {
  %p0 = bf16[10,512,256]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = bf16[1,512,256]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero)
  ROOT %flat = bf16[512,256]{1,0} reshape(%part)
}

%body (state: (s32[], bf16[10,512,256], bf16[128,512])) -> (s32[], bf16[10,512,256], bf16[128,512]) {
  %state = (s32[], bf16[10,512,256]{2,1,0}, bf16[128,512]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %all = bf16[10,512,256]{2,1,0} get-tuple-element(%state), index=1
  %x = bf16[128,512]{1,0} get-tuple-element(%state), index=2
  %w = bf16[512,256]{1,0} fusion(%all, %i), kind=kLoop, calls=%slice
  %y = f32[128,256]{1,0:T(8,128)S(1)} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sum = bf16[10,512,256]{2,1,0} all-reduce(%all), to_apply=%slice
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  ROOT %out = (s32[], bf16[10,512,256]{2,1,0}, bf16[128,512]{1,0}) tuple(%j, %all, %x)
}

%condition (state.1: (s32[], bf16[10,512,256], bf16[128,512])) -> pred[] {
  %state.1 = (s32[], bf16[10,512,256]{2,1,0}, bf16[128,512]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %ten = s32[] constant(10)
  ROOT %less = pred[] compare(%i.1, %ten), direction=LT
}

ENTRY %main (w: bf16[10,512,256], x: bf16[128,512]) -> bf16[128,512] {
  %w.1 = bf16[10,512,256]{2,1,0} parameter(0)
  %x.1 = bf16[128,512]{1,0} parameter(1)
  %start = s32[] constant(0)
  %first = (s32[], bf16[10,512,256]{2,1,0}, bf16[128,512]{1,0}) tuple(%start, %w.1, %x.1)
  %loop = (s32[], bf16[10,512,256]{2,1,0}, bf16[128,512]{1,0}) while(%first), condition=%condition, body=%body
  ROOT %last = bf16[128,512]{1,0} get-tuple-element(%loop), index=2
}
"""  # noqa: E501


def test_operations_count_as_often_as_they_run():
    found = list(roofline.works(PROGRAM, roofline.kinds(-1, {256})))
    by_shape = {each.shape.partition("{")[0]: each for each in found}
    product, slice_ = by_shape["f32[128,256]"], by_shape["bf16[512,256]"]
    assert (product.kind, product.times) == ("vocabulary products", 10)
    assert product.flops == 2 * 128 * 512 * 256
    # Its operands; the result stays in the chip's fast memory.
    assert product.bytes == 2 * (128 * 512 + 512 * 256)
    # Of the ten matrices the fusion reads one.
    assert slice_.bytes == pytest.approx(2 * 2 * 512 * 256, abs=8)
    assert "all-reduce" not in {each.kind for each in found}  # nothing is waited for
    assert by_shape.keys() == {"f32[128,256]", "bf16[512,256]", "s32[]"}


def test_the_longer_of_two_times():
    chip = topology.find("v5e:1x1")
    compute = roofline.Work("products", "", 3, flops=197 * 10**9, bytes=819)
    memory = roofline.Work("elementwise", "", 1, flops=197, bytes=819 * 10**6)
    assert compute.seconds(chip) == pytest.approx(3e-3)
    assert memory.seconds(chip) == pytest.approx(1e-3)
    row = roofline.summary("both", chip, [compute, memory, memory])
    assert row["ms"] == pytest.approx(5.0) and row["flops_ms"] == pytest.approx(3.0)
    assert [*row["kinds"]] == ["products", "elementwise"]
    assert row["kinds"]["elementwise"]["gb"] == pytest.approx(1.638)
