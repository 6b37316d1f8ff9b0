"""The arrays that are alive at the peak of a program."""

import jax
import jax.numpy as jnp
import pytest

from kd_jax.plans import alive

# As XLA writes a scheduled program: a loop that carries two arrays, a fusion, a chain in place.
PROGRAM = """HloModule jit_f, is_scheduled=true

%body (state: (s32[], f32[1000], f32[1000])) -> (s32[], f32[1000], f32[1000]) {
  %state = (s32[], f32[1000]{0}, f32[1000]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[1000]{0} get-tuple-element(%state), index=1
  %y = f32[1000]{0} get-tuple-element(%state), index=2
  %wide = f32[50,1000]{1,0} broadcast(%x), dimensions={1}, metadata={op_name="jit(f)/wide"}
  %next = f32[1000]{0} custom-call(%wide), custom_call_target="sum"
  %j = s32[] add(%i, %i)
  ROOT %out = (s32[], f32[1000]{0}, f32[1000]{0}) tuple(%j, %next, %y)
}

%condition (state.1: (s32[], f32[1000], f32[1000])) -> pred[] {
  %state.1 = (s32[], f32[1000]{0}, f32[1000]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %ten = s32[] constant(10)
  ROOT %less = pred[] compare(%i.1, %ten), direction=LT
}

ENTRY %main (given: f32[1000]) -> f32[1000] {
  %given = f32[1000]{0} parameter(0)
  %zero = s32[] constant(0)
  %fast = f32[9000]{0:T(8,128)S(1)} broadcast(%zero), dimensions={}
  %early = f32[70000]{0} broadcast(%zero), dimensions={}
  %used = f32[] custom-call(%early, %fast), custom_call_target="sum"
  %a = f32[1000]{0} add(%given, %given)
  %b = f32[1000]{0} negate(%a)
  %c = f32[1000]{0} multiply(%b, %b)
  %first = (s32[], f32[1000]{0}, f32[1000]{0}) tuple(%zero, %c, %given)
  %loop = (s32[], f32[1000]{0}, f32[1000]{0}) while(%first), condition=%condition, body=%body
  %last = f32[1000]{0} get-tuple-element(%loop), index=1
  ROOT %result = f32[1000]{0} add(%last, %last)
}
"""


def test_what_is_alive_at_the_peak():
    found = [each for each in alive.at_peak(PROGRAM) if each.bytes > 8]  # without the scalars
    # Before the loop, the array that is read once; it is larger than what the loop makes.
    assert [(each.shape, each.bytes) for each in found] == [("f32[70000]", 280_000)]
    smaller = [e for e in alive.at_peak(PROGRAM.replace("70000", "700")) if e.bytes > 8]
    shapes = [each.shape for each in smaller]
    # In the loop: its own array, and the one that it started with (a, b and c share one place).
    assert shapes == ["f32[50,1000]", "f32[1000]"]
    assert smaller[0].made_by == "jit(f)/wide" and smaller[0].dims == (50, 1000)
    assert alive.total(smaller) == 204_000


def test_a_branch_counts_as_its_largest():
    program = PROGRAM.replace(
        "while(%first), condition=%condition, body=%body",
        "conditional(%zero, %first, %first), branch_computations={%body, %body}",
    )
    assert "f32[50,1000]" in {each.shape for each in alive.at_peak(program.replace("70000", "7"))}


def test_agrees_with_a_compiled_program():
    def step(w_LDD, x_BD):
        def loss(w_LDD):
            return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_LDD)[0])

        return w_LDD - jax.grad(loss)(w_LDD)

    shapes = [jax.ShapeDtypeStruct(dims, "float32") for dims in ((8, 64, 64), (512, 64))]
    made = jax.jit(step, donate_argnums=0).lower(*shapes).compile()
    found = alive.total(alive.at_peak(made.as_text()))
    assert found == pytest.approx(made.memory_analysis().temp_size_in_bytes, rel=0.25)


def test_memory_is_handed_on():
    chain = "\n".join(
        [
            "ENTRY %main (given: f32[1000]) -> f32[1000] {",
            "  %given = f32[1000]{0} parameter(0)",
            "  %a = f32[1000]{0} add(%given, %given)",
            "  %b = f32[1000]{0} negate(%a)",
            "  ROOT %c = f32[1000]{0} multiply(%b, %b)",
            "}",
        ]
    )
    assert alive.total(alive.at_peak(chain)) == 4000
    # A result of another shape has a place of its own.
    assert alive.total(alive.at_peak(chain.replace("%b = f32[1000]", "%b = f32[500]"))) == 6000
