"""Reads a compiled program, HLO text (`compiled.as_text()`), and counts what it costs on one of its
devices: matrix products and collectives.

XLA's own `cost_analysis()` counts the body of a loop once and does not report collectives. Here
each instruction of the text counts as often as it runs. XLA notes a loop's trip count on some
platforms only (not on TPU). Elsewhere it follows from the integers that the loop's condition
compares, so a small interpreter traces integers through the program: through tuples, fusions, calls
and the arguments of loops.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable

import numpy as np

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*-> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
    r"|collective-broadcast)(-start)?"
)
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=(\S+))"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange between devices. `shapes` and `bytes` describe the arrays on one device:
    the results of an all-gather, the operands of other kinds."""

    kind: str  # all-reduce, all-gather, ...
    shapes: str  # such as "f32[1024,4096], f32[4096]"
    bytes: int


@dataclasses.dataclass
class Cost:
    """Costs of one run of a program, on one device."""

    flops: int = 0  # two for each multiplication of a matrix product or convolution
    collectives: collections.Counter[Collective] = dataclasses.field(
        default_factory=collections.Counter  # how often each of them runs
    )
    unbounded: list[str] = dataclasses.field(default_factory=list)  # loops that were counted once

    def add(self, other: Cost, times: int = 1) -> None:
        """Adds the cost of another program, run `times` times."""
        self.flops += times * other.flops
        for collective, count in other.collectives.items():
            self.collectives[collective] += times * count
        self.unbounded += other.unbounded

    def bytes_by_kind(self) -> dict[str, int]:
        """Sums the bytes that one run exchanges, by kind of collective."""
        total: collections.Counter[str] = collections.Counter()
        for collective, count in self.collectives.items():
            total[collective.kind] += count * collective.bytes
        return dict(total)

    def all_gathers(self) -> list[str]:
        """Lists the shapes of all-gathers, to see at a glance that only parameters are gathered."""
        return sorted(c.shapes for c in self.collectives if c.kind == "all-gather")


def cost(text: str) -> Cost:
    """Computes the cost of a program from its compiled HLO `text`.

    A loop whose trip count depends on data counts once and is named in `unbounded`; a conditional
    counts as its branch with the most FLOPs.
    """
    return _cost(main_frame(text), set())


def flops(frame: Frame, op: Instruction) -> int:
    """Counts the FLOPs of an instruction and of what it calls; loops are no part of it."""
    if op.opcode in _FLOPS:
        return _FLOPS[op.opcode](frame, op)
    return _cost(frame.enter(op), set()).flops if op.called else 0


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
    """An instruction, `name = shape opcode(operands), attributes`; `literal` is the text of the
    operands: the value of a constant, or the number of a parameter."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool  # of its computation, whose result it is

    def attribute(self, name: str) -> str:
        """Reads the value of `name=...`, without braces or a leading %; "" if it is missing."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return found[1].strip("{}").replace("%", "") if found else ""

    @property
    def called(self) -> str:
        """Names the computation that a fusion, a call or an asynchronous start runs."""
        return self.attribute("to_apply" if self.opcode == "call" else "calls")


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Frame:
    """A computation with the arguments of one call.

    `argument(number, element)` is the integer at that element of that parameter (element None:
    the parameter itself), or None if it cannot be derived from constants.
    """

    computations: dict[str, Computation]
    name: str
    argument: Callable[[int, int | None], int | None] = lambda number, element: None

    @property
    def instructions(self) -> Computation:
        return self.computations[self.name]

    @property
    def root(self) -> Instruction:
        return next(op for op in self.instructions.values() if op.is_root)

    def shapes(self, op: Instruction) -> list[str]:
        """Lists the shapes of an instruction's operands."""
        return [self.instructions[name].shape for name in op.operands]

    def enter(self, op: Instruction) -> Frame:
        """Enters the computation that `op` calls, with its operands as arguments."""
        return Frame(self.computations, op.called, lambda n, i: self.value(op.operands[n], i))

    def result(self, element: int | None = None) -> int | None:
        """Computes the computation's result, an integer, or an element of it."""
        return self.value(self.root.name, element)

    def value(self, name: str, element: int | None = None) -> int | None:
        """Computes the integer `name`, or an element of the tuple `name`; None if it cannot be
        derived from constants. The value of a comparison is left - right."""
        op = self.instructions[name]
        if op.opcode == "parameter":
            return self.argument(int(op.literal), element)
        if op.opcode in ("copy", "bitcast", "convert", "reshape", "opt-barrier"):
            return self.value(op.operands[0], element)
        if op.called:
            return self.enter(op).result(element)
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
        """Returns body, condition and trip count of a `while`; the count is None if it depends on
        data."""

        def start(number: int, element: int | None) -> int | None:
            return self.value(op.operands[0], element)

        first = Frame(self.computations, op.attribute("body"), start)

        def second(number: int, element: int | None) -> int | None:
            return first.result(element)

        def constant(number: int, element: int | None) -> int | None:
            value = start(number, element)
            return value if value == second(number, element) else None

        condition = Frame(self.computations, op.attribute("condition"), start)
        if known := _TRIPS.search(op.attributes):
            trips = int(known[1])
        else:
            trips = _trips(condition, dataclasses.replace(condition, argument=second))
        body, condition = (dataclasses.replace(f, argument=constant) for f in (first, condition))
        return body, condition, trips


def main_frame(text: str) -> Frame:
    """Parses a program and returns its entry computation."""
    computations: dict[str, Computation] = {}
    entry = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest = found.groups()
            literal, _, attributes = rest.partition(")")
            operands = tuple(_NAME.findall(literal))
            current[name] = Instruction(
                name, shape, opcode, operands, literal, attributes, bool(root)
            )
    return Frame(computations, entry)


def _trips(first: Frame, second: Frame) -> int | None:
    """Computes a loop's trip count from its condition at the first and second trip: the difference
    of the two compared integers shrinks by the same amount in each trip."""
    distance, next_distance = first.result(), second.result()
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


def _cost(frame: Frame, chains: set[str]) -> Cost:
    total = Cost()
    for op in frame.instructions.values():
        if op.opcode in _FLOPS:
            total.flops += _FLOPS[op.opcode](frame, op)
        elif kind := _COLLECTIVE.fullmatch(op.opcode):
            if _begins(op, chains):
                total.collectives[_collective(frame, op, kind[1])] += 1
        elif op.opcode == "while":
            body, condition, trips = frame.loop(op)
            if trips is None:
                total.unbounded.append(op.name)
                trips = 1
            total.add(_cost(body, chains), trips)
            total.add(_cost(condition, chains), trips + 1)
        elif branches := _BRANCHES.search(op.attributes):
            names = re.findall(r"[\w.\-]+", ",".join(filter(None, branches.groups())))
            costs = [_cost(Frame(frame.computations, name), chains) for name in names]
            total.add(max(costs, key=lambda each: each.flops))
        elif op.called and not op.opcode.endswith(("-done", "-update")):  # "-start" did it
            total.add(_cost(frame.enter(op), chains))
    return total


def _dot_flops(frame: Frame, op: Instruction) -> int:
    (_, lhs), *_ = arrays(frame.shapes(op)[0])
    (_, out), *_ = arrays(op.shape)
    contracted = [int(dim) for dim in op.attribute("lhs_contracting_dims").split(",") if dim]
    return 2 * math.prod(out) * math.prod(lhs[dim] for dim in contracted)


def _convolution_flops(frame: Frame, op: Instruction) -> int:
    """Counts the FLOPs of a convolution; on TPU, matrix products are convolutions too. Only taps
    that meet an element of the input count: the dilated window of a batched product has gaps."""
    labels = re.split("_|->", op.attribute("dim_labels"))  # such as 0b1f_0o1i->01bf
    shapes = [arrays(shape)[0][1] for shape in (*frame.shapes(op), op.shape)]
    lhs, rhs, out = (dict(zip(*pair, strict=True)) for pair in zip(labels, shapes, strict=True))
    window = dict(re.findall(r"(\w+)=(\S+)", op.attribute("window")))
    taps = 1
    for dim in map(str, range(len(out) - 2)):
        stride, lhs_dilation, rhs_dilation, padding = (
            int(window[key].split("x")[int(dim)].split("_")[0]) if key in window else default
            for key, default in (("stride", 1), ("lhs_dilate", 1), ("rhs_dilate", 1), ("pad", 0))
        )
        taps *= _taps(lhs[dim], rhs[dim], out[dim], stride, padding, lhs_dilation, rhs_dilation)
    return 2 * out["b"] * out["f"] * rhs["i"] * taps


@functools.cache
def _taps(lhs, rhs, out, stride, padding, lhs_dilation, rhs_dilation) -> int:
    """Counts the pairs of output and kernel positions, in one dimension, that meet an input."""
    at = np.arange(out)[:, None] * stride + np.arange(rhs) * rhs_dilation - padding
    return int(np.sum((at >= 0) & (at % lhs_dilation == 0) & (at // lhs_dilation < lhs)))


def _attention_flops(frame: Frame, op: Instruction) -> int:
    """Counts the FLOPs of fused attention. cuDNN's has two products forward (scores, values), and
    five backward (scores again, four gradients); a TPU kernel states what it computes. No other
    custom call here multiplies matrices."""
    target = op.attribute("custom_call_target")
    if "tpu_custom_call" in target:
        stated = re.search(r'"cost_estimate": ?\{"flops": ?"?(\d+)', op.attributes)
        return int(stated[1]) if stated else 0
    if "__cudnn$fmha" not in target:
        return 0
    scores_BHTS = re.search(
        r'"intermediate_tensor_shape".*?"dimensions": ?\[(.*?)\]', op.attributes
    )
    batch, heads, queries, keys = map(int, re.findall(r"\d+", scores_BHTS[1]))
    (_, query), *_ = arrays(frame.shapes(op)[0])
    products = 5 if "Backward" in target else 2
    return products * 2 * math.prod(query) * keys


_FLOPS = {
    "dot": _dot_flops,
    "convolution": _convolution_flops,
    "custom-call": _attention_flops,
}


def _begins(op: Instruction, chains: set[str]) -> bool:
    """Tells whether an instruction is the first piece of a collective. TPU's compiler cuts some up,
    to hide them behind matrix products, into instructions that share a chain."""
    chain = re.search(r'chain_id="(\d+)"', op.attributes)
    if chain and chain[1] in chains:
        return False
    chains.update(chain.groups() if chain else ())
    return True


def _collective(frame: Frame, op: Instruction, kind: str) -> Collective:
    side = arrays(", ".join(frame.shapes(op)))
    if kind == "all-gather":
        start = len(side) if op.opcode == "all-gather-start" else 0  # operands come before results
        side = arrays(op.shape)[start:]
    shapes = ", ".join(f"{dtype}[{','.join(map(str, dims))}]" for dtype, dims in side)
    return Collective(kind, shapes, num_bytes(shapes))
