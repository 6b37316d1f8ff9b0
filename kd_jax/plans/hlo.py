"""Reads compiled HLO text (`compiled.as_text()`): instructions, shapes, and how often loops run.

XLA notes a loop's trip count on some platforms only (not on TPU). Elsewhere it follows from the
integers that the loop's condition compares, so a small interpreter traces integers through the
program: through tuples, fusions, calls and the arguments of loops.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*-> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Reads the arrays in an HLO shape: "(f32[8]{0}, s32[])" -> [("f32", (8,)), ("s32", ())]."""
    return [
        (dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size))
        for dtype, dims in _ARRAY.findall(shape)
    ]


def num_bytes(shape: str) -> int:
    """Counts the bytes of all arrays in an HLO shape, without the padding of a layout."""
    bits = 0
    for dtype, dims in arrays(shape):
        width = re.search(r"\d+", dtype)  # bf16, f8e4m3fn, s4; tokens hold nothing
        bits += math.prod(dims) * (int(width[0]) if width else 8 * (dtype == "pred"))
    return bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(operands), attributes`; `literal` is the text of the operands, which
    is all there is to a constant or a parameter's number."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str

    def attribute(self, name: str) -> str:
        """Reads the value of `name=...` without braces and a name's %; "" where there is none."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return found[1].strip("{}").replace("%", "") if found else ""

    @property
    def called(self) -> str:
        """The computation that a fusion, a call or the start of an asynchronous pair runs."""
        return self.attribute("to_apply" if self.opcode == "call" else "calls")


@dataclasses.dataclass
class Computation:
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: str = ""

    def shapes(self, op: Instruction) -> list[str]:
        """Lists the shapes of an instruction's operands."""
        return [self.instructions[name].shape for name in op.operands]


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = Computation()
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest = found.groups()
            literal, _, attributes = rest.partition(")")
            operands = tuple(_NAME.findall(literal))
            current.instructions[name] = Instruction(
                name, shape, opcode, operands, literal, attributes
            )
            current.root = name if root else current.root
    return computations, entry


@dataclasses.dataclass(frozen=True)
class Frame:
    """A computation as one instruction runs it.

    `argument(number, element)` is the integer at that element of that parameter (element None:
    the parameter itself), None where it is not a matter of constants.
    """

    computations: dict[str, Computation]
    name: str
    argument: Callable[[int, int | None], int | None] = lambda number, element: None

    @property
    def computation(self) -> Computation:
        return self.computations[self.name]

    @property
    def root(self) -> Instruction:
        return self.computation.instructions[self.computation.root]

    def enter(self, op: Instruction) -> Frame:
        """Enters the computation that `op` calls, with its operands as arguments."""
        return Frame(self.computations, op.called, lambda n, i: self.value(op.operands[n], i))

    def value(self, name: str, element: int | None = None) -> int | None:
        """The integer `name`, or an element of the tuple `name`, None where it is not a matter of
        constants. A comparison is worth left - right."""
        op = self.computation.instructions[name]
        if op.opcode == "parameter":
            return self.argument(int(op.literal), element)
        if op.opcode in ("copy", "bitcast", "convert", "reshape", "opt-barrier"):
            return self.value(op.operands[0], element)
        if op.called:
            called = self.enter(op)
            return called.value(called.computation.root, element)
        if op.opcode == "tuple" and element is not None:
            return self.value(op.operands[element])
        if element is not None:
            return None
        if op.opcode == "get-tuple-element":
            return self.value(op.operands[0], int(op.attribute("index")))
        if op.opcode == "constant" and re.fullmatch(r"-?\d+", op.literal):
            return int(op.literal)
        if op.opcode in ("add", "subtract", "multiply", "compare"):
            left, right = (self.value(operand) for operand in op.operands)
            if left is None or right is None:
                return None
            return {"add": left + right, "multiply": left * right}.get(op.opcode, left - right)
        return None

    def loop(self, op: Instruction) -> tuple[Frame, Frame, int | None]:
        """Gives body, condition and trips of a `while`; trips are None where data decide."""
        first = Frame(
            self.computations,
            op.attribute("body"),
            lambda number, element: self.value(op.operands[0], element),
        )

        def second(number: int, element: int | None) -> int | None:
            return first.value(first.computation.root, element)

        def constant(number: int, element: int | None) -> int | None:
            value = first.argument(number, element)
            return value if value == second(number, element) else None

        condition = Frame(self.computations, op.attribute("condition"), first.argument)
        if known := _TRIPS.search(op.attributes):
            trips = int(known[1])
        else:
            trips = _trips(condition, dataclasses.replace(condition, argument=second))
        body = dataclasses.replace(first, argument=constant)
        return body, dataclasses.replace(condition, argument=constant), trips


def _trips(first: Frame, second: Frame) -> int | None:
    """Trips of a loop whose condition compares integers that draw nearer by the same amount in
    each trip, from the distance at the first and at the second trip."""
    distance, next_distance = (frame.value(frame.computation.root) for frame in (first, second))
    if distance is None or next_distance is None:
        return None
    step = next_distance - distance
    while first.root.called:
        first = first.enter(first.root)
    direction = first.root.attribute("direction")
    if direction in ("GT", "GE"):
        distance, step = -distance, -step
    if direction in ("LE", "GE"):
        distance -= 1
    if direction not in ("LT", "LE", "GT", "GE", "NE"):
        return None
    if distance == 0 or (distance > 0 and direction != "NE"):
        return 0
    if distance * step >= 0:
        return None  # for ever
    return math.ceil(-distance / step)


def main_frame(text: str) -> Frame:
    """Gives the program's entry."""
    return Frame(*_parse(text))
