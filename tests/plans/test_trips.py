import pytest

from kd_jax.plans import compiled


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
