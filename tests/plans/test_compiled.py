import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kd_jax.plans import compiled


def program(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile()


def cost(function, *shapes):
    """The cost, which must not depend on XLA's note of trip counts: TPU's compiler writes none."""
    text = program(function, *shapes).as_text()
    found = compiled.cost(text)
    assert compiled.cost(re.sub(r'"known_trip_count":\{"n":"\d+"\}', "", text)) == found
    return found


@pytest.mark.parametrize(
    "spec, left, right, flops",
    [
        ("ij,jk->ik", (32, 64), (64, 16), 2 * 32 * 64 * 16),
        ("ji,jk->ki", (64, 32), (64, 16), 2 * 32 * 64 * 16),
        ("bthk,bshk->bhts", (2, 16, 4, 8), (2, 32, 4, 8), 2 * 2 * 4 * 16 * 32 * 8),
    ],
)
def test_products_as_xla_counts_them(spec, left, right, flops):
    made = program(lambda a, b: jnp.einsum(spec, a, b), left, right)
    found = compiled.cost(made.as_text())
    assert found.flops == flops == made.cost_analysis()["flops"]
    assert not found.collectives and not found.unbounded


def test_a_program_without_loops_costs_what_xla_says():
    def loss(w, x):
        return jnp.sum(x @ w @ w.T)

    made = program(jax.grad(loss), (64, 32), (128, 64))
    products = compiled.cost(made.as_text()).flops
    assert 0 <= made.cost_analysis()["flops"] - products <= 0.01 * products  # and the rest


def test_loops_count_every_trip():
    def layers(w_LDD, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w_LDD)[0]

    one = 2 * 8 * 32 * 32
    assert cost(layers, (5, 32, 32), (8, 32)).flops == 5 * one
    twice = cost(lambda w, x: jax.lax.fori_loop(2, 5, lambda i, x: layers(w, x), x), *WX)
    assert twice.flops == 3 * 5 * one
    gradient = cost(jax.grad(lambda w, x: jnp.sum(layers(w, x) ** 2)), *WX)
    assert gradient.flops == 3 * 5 * one


WX = ((5, 32, 32), (8, 32))


def test_a_loop_that_counts_down():
    def halve(w, x):
        return jax.lax.while_loop(
            lambda state: state[0] > 0, lambda state: (state[0] - 3, state[1] @ w), (10, x)
        )[1]

    assert cost(halve, (32, 32), (8, 32)).flops == 4 * 2 * 8 * 32 * 32


def test_a_loop_that_depends_on_data_counts_once_and_is_named():
    def settle(w, x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x @ w, x)

    found = cost(settle, (32, 32), (8, 32))
    assert found.flops == 2 * 8 * 32 * 32
    assert len(found.unbounded) == 1 and "while" in found.unbounded[0]


def test_the_dearer_branch_of_a_conditional_counts():
    def either(w, x):
        return jax.lax.cond(jnp.sum(x) > 0, lambda: x @ w, lambda: x @ w @ w)

    assert cost(either, (32, 32), (8, 32)).flops == 2 * 2 * 8 * 32 * 32


def test_collectives():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def local(w_LDD, x):
        def layer(x, part):
            return jax.lax.psum(x @ jax.lax.all_gather(part, "fsdp", tiled=True), "data"), None

        x = jax.lax.scan(layer, x, w_LDD)[0]
        return jax.lax.psum_scatter(x, "fsdp", tiled=True)

    step = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(None, "fsdp"), P("data")),
        out_specs=P("fsdp"),
        check_vma=False,
    )
    found = cost(step, (5, 32, 32), (64, 32))
    assert {(c.kind, c.shapes, c.bytes): n for c, n in found.collectives.items()} == {
        ("all-gather", "f32[32,32]", 4096): 5,
        ("all-reduce", "f32[16,32]", 2048): 5,
        ("reduce-scatter", "f32[16,32]", 2048): 1,
    }
    assert found.bytes_by_kind() == {
        "all-gather": 5 * 4096,
        "all-reduce": 5 * 2048,
        "reduce-scatter": 2048,
    }
    assert found.all_gathers() == ["f32[32,32]"]
    assert found.flops == 5 * 2 * 16 * 32 * 32


def test_asynchronous_collectives_count_once():
    found = compiled.cost("""HloModule example

%wrapped (a: f32[64]) -> f32[8] {
  %a = f32[64] parameter(0)
  ROOT %rs = f32[8] reduce-scatter(%a), dimensions={0}, to_apply=%add
}

ENTRY %main (p: f32[8], q: bf16[2,4], r: f32[64]) -> f32[64] {
  %p = f32[8]{0} parameter(0)
  %q = bf16[2,4]{1,0} parameter(1)
  %r = f32[64] parameter(2)
  %start = ((f32[8]{0}, bf16[2,4]), (f32[64]{0}, bf16[16,4])) all-gather-start(%p, %q), channel_id=1
  %done = (f32[64], bf16[16,4]) all-gather-done(%start)
  %sum = f32[8] all-reduce-start(%p), to_apply=%add
  %sum.1 = f32[8] all-reduce-done(%sum)
  %begin = ((f32[64]), f32[8], s32[]) async-start(%r), calls=%wrapped
  %end = f32[8] async-done(%begin), calls=%wrapped
  ROOT %both = f32[64] get-tuple-element(%done), index=0
}
""")
    assert {(c.kind, c.shapes, c.bytes): n for c, n in found.collectives.items()} == {
        ("all-gather", "f32[64], bf16[16,4]", 384): 1,
        ("all-reduce", "f32[8]", 32): 1,
        ("reduce-scatter", "f32[64]", 256): 1,
    }


def test_a_collective_in_pieces_counts_once():
    piece = 'all-gather(%p), channel_id=3, dimensions={0}, frontend_attributes={chain_id="7"}'
    found = compiled.cost(f"""HloModule example

%first (p: f32[8]) -> f32[64] {{
  %p = f32[8] parameter(0)
  ROOT %g = f32[64] {piece}
}}

%second (p: f32[8]) -> f32[64] {{
  %p = f32[8] parameter(0)
  ROOT %g.1 = f32[64] {piece}
}}

ENTRY %main (p: f32[8]) -> f32[64] {{
  %p = f32[8] parameter(0)
  %async-collective-start = f32[64] fusion(%p), kind=kCustom, calls=%first
  ROOT %async-collective-done = f32[64] fusion(%p), kind=kCustom, calls=%second
}}
""")
    assert found.collectives.total() == 1


BATCHED = 2 * 2 * 4 * 16 * 32 * 8  # (2, 4) products of (16, 8) and (8, 32)


@pytest.mark.parametrize(
    "left, right, result, attributes, flops",
    [
        # x_BTD w_DF
        ("2,16,64", "64,32,1", "2,16,32", "window={size=1}, dim_labels=0bf_io0->0bf", 65536 * 2),
        # sum over rows and tokens
        ("2,16,64", "2,16,32", "64,32,1", "window={size=2}, dim_labels=0fb_0io->bf0", 65536 * 2),
        (
            "2,16,4,8",
            "2,32,4,8",
            "2,4,16,32",
            "window={size=2x4 stride=1x3 lhs_dilate=2x4}, dim_labels=0b1f_0o1i->01bf",
            BATCHED,
        ),
        (
            "2,16,4,8",
            "2,4,8,32",
            "2,4,32,16",
            "window={size=2x4 stride=2x4 pad=1_1x3_3 lhs_dilate=1x3 rhs_reversal=1x1}, "
            "dim_labels=0b1f_01io->01fb",
            BATCHED,
        ),
        # 3 x 3 over an image of 5 x 5, same padding: corners meet 4 pixels, edges 6, others 9
        (
            "1,5,5,2",
            "3,3,2,7",
            "1,5,5,7",
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            2 * 2 * 7 * (4 * 4 + 12 * 6 + 9 * 9),
        ),
    ],
)
def test_convolutions(left, right, result, attributes, flops):
    text = f"""HloModule example

ENTRY %main (l: bf16[{left}], r: bf16[{right}]) -> bf16[{result}] {{
  %l = bf16[{left}]{{0:T(8,128)(2,1)}} parameter(0)
  %r = bf16[{right}] parameter(1)
  ROOT %c = bf16[{result}]{{0:T(8,128)(2,1)S(1)}} convolution(%l, %r), {attributes}
}}
"""
    assert compiled.cost(text).flops == flops


@pytest.mark.parametrize("target, products", [("Softmax", 2), ("ScaleBiasSoftmaxBackward", 5)])
def test_fused_attention(target, products):
    scores = '"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": [%s]}'
    scores %= '"8", "16", "512", "256"'
    attributes = f'custom_call_target="__cudnn$fmha{target}", backend_config={{{scores}}}'
    text = f"""HloModule example

ENTRY %main (q: bf16[8,512,16,64], k: bf16[8,256,16,64]) -> bf16[8,16,512,64] {{
  %q = bf16[8,512,16,64] parameter(0)
  %k = bf16[8,256,16,64] parameter(1)
  %a = (bf16[8,16,512,64], u8[0]) custom-call(%q, %k, %k), {attributes}
  ROOT %o = bf16[8,16,512,64] get-tuple-element(%a), index=0
}}
"""
    assert compiled.cost(text).flops == products * 2 * 8 * 16 * 512 * 256 * 64


def test_shapes():
    shape = "(f32[8,4]{1,0:T(8,128)S(1)}, /*index=1*/s32[], pred[3], bf16[<=5,2])"
    assert compiled.arrays(shape) == [
        ("f32", (8, 4)),
        ("s32", ()),
        ("pred", (3,)),
        ("bf16", (5, 2)),
    ]
    assert compiled.num_bytes(shape) == 128 + 4 + 3 + 20
    assert compiled.num_bytes("(s4[10], f8e4m3fn[7], token[])") == 5 + 7


LOOP = """HloModule example

%less (left: s32[], right: s32[]) -> pred[] {{
  %left = s32[] parameter(0)
  %right = s32[] parameter(1)
  ROOT %compare.1 = pred[] compare(%left, %right), direction={direction}
}}

%condition (state: (f32[4], s32[], s32[])) -> pred[] {{
  %state = (f32[4], s32[], s32[]) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%state), index=1
  %limit = s32[] get-tuple-element(%state), index=2
  ROOT %fused = pred[] fusion(%i, %limit), kind=kLoop, calls=%less
}}

%body (state.1: (f32[4], s32[], s32[])) -> (f32[4], s32[], s32[]) {{
  %state.1 = (f32[4], s32[], s32[]) parameter(0)
  %x = f32[4] get-tuple-element(%state.1), index=0
  %i.1 = s32[] get-tuple-element(%state.1), index=1
  %limit.1 = s32[] get-tuple-element(%state.1), index=2
  %step = s32[] constant({step})
  %next = s32[] add(%i.1, %step), metadata={{op_name="jit(f)/while (body)"}}
  ROOT %tuple.1 = (f32[4], s32[], s32[]) tuple(%x, %next, %limit.1)
}}

ENTRY %main (p: f32[4], n: s32[]) -> (f32[4], s32[], s32[]) {{
  %p = f32[4] parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant({start})
  %start = s32[] copy(%zero)
  %end = s32[] constant({end})
  %tuple = (f32[4], s32[], /*index=2*/s32[]) tuple(%p, %start, %{limit})
  ROOT %while.1 = (f32[4], s32[], s32[]) while(%tuple), condition=%condition, body=%body{note}
}}
"""


def loop(start, step, direction, end, limit="end", note=""):
    text = LOOP.format(**locals())
    frame = compiled.main_frame(text)
    return frame.loop(frame.root)


@pytest.mark.parametrize(
    "start, step, direction, end, trips",
    [
        (0, 1, "LT", 5, 5),
        (2, 1, "LT", 7, 5),
        (0, 2, "LT", 7, 4),
        (0, 1, "LE", 5, 6),
        (10, -3, "GT", 0, 4),
        (9, -3, "GE", 0, 4),
        (0, 2, "NE", 8, 4),
        (8, -2, "NE", 0, 4),
        (7, 1, "LT", 5, 0),
        (7, 0, "LT", 5, 0),
        (4, 1, "NE", 4, 0),
        (0, 0, "LT", 5, None),  # for ever
        (0, -1, "LT", 5, None),
        (0, 1, "EQ", 0, None),
    ],
)
def test_trips_from_the_condition(start, step, direction, end, trips):
    assert loop(start, step, direction, end)[2] == trips


def test_trips_that_depend_on_data():
    assert loop(0, 1, "LT", 5, limit="n")[2] is None


def test_trips_that_xla_notes_come_first():
    note = ', backend_config={"known_trip_count":{"n":"12"}}'
    assert loop(0, 1, "LT", 5, limit="n", note=note)[2] == 12


def test_constants_reach_the_body_and_what_changes_does_not():
    body, condition, _ = loop(0, 1, "LT", 5)
    for frame in (body, condition):
        assert frame.argument(0, 2) == 5
        assert frame.argument(0, 1) is None
        assert frame.argument(0, 0) is None


def test_a_kernel_of_a_tpu_states_its_flops():
    kernel = (
        'custom-call(%q, %q, %q), custom_call_target="tpu_custom_call", backend_config='
        '{"custom_call_config":{"body":"TUzvUg","cost_estimate":{"flops":"2415919104",'
        '"transcendentals":"9437184"},"needs_layout_passes":true}}'
    )
    text = f"""HloModule example

ENTRY %main (q: bf16[1,12,1024,64]) -> bf16[1,12,1024,64] {{
  %q = bf16[1,12,1024,64]{{3,2,1,0}} parameter(0)
  %other = bf16[8]{{0}} custom-call(%q), custom_call_target="tpu_custom_call", backend_config={{}}
  ROOT %y = bf16[1,12,1024,64]{{3,2,1,0:T(8,128)(2,1)}} {kernel}
}}
"""
    # Two products of 64; of four blocks of 512 x 512 pairs, causal attention computes three.
    assert compiled.cost(text).flops == 2 * 2 * 12 * 64 * 3 * 512**2
