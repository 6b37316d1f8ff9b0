"""Finds what fills the memory of a compiled program: the arrays that are alive together at its
peak.

An HLO text that XLA has scheduled lists instructions in the order in which they run, so an array
is alive from its instruction to the last one that reads it. The sum differs a little from XLA's own
figure, which knows more about sharing and fragments.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator

from kd_jax.plans.compiled import Frame, Instruction, arrays, main_frame, num_bytes

_ARRAY = re.compile(r"\b[a-z]\w*\[[\d,<=]*\](?:\{[^}]*\})?")
# Instructions whose results lie in their operands' memory.
_VIEWS = ("bitcast", "get-tuple-element", "tuple", "while", "opt-barrier", "dynamic-update-slice")
_VIEWS += ("call", "conditional")
_ELSEWHERE = ("parameter", "constant", "after-all", "partition-id", "replica-id")

Place = tuple[str, int]  # an instruction, and the element of its result


@dataclasses.dataclass(frozen=True)
class Alive:
    """An array in a chip's main memory."""

    shape: str  # such as f32[1024,151936]
    bytes: int
    made_by: str  # the operation of the traced program, as XLA noted it

    @property
    def dims(self) -> tuple[int, ...]:
        """Returns the sizes of its dimensions but those of 1, sorted: layouts and orders go."""
        return tuple(sorted(size for size in arrays(self.shape)[0][1] if size != 1))


def at_peak(text: str) -> list[Alive]:
    """Lists the temporary arrays of a compiled program, HLO text, that are alive where their sum is
    largest, the largest first. Arguments, and results that are written over them, do not count."""
    return sorted(_peak(main_frame(text)), key=lambda each: -each.bytes)


def total(found: list[Alive]) -> int:
    """Sums the bytes of arrays."""
    return sum(each.bytes for each in found)


def main_memory(shape: str) -> list[str]:
    """Lists the arrays of an HLO shape that lie in main memory; TPUs have a faster one, S(1)."""
    return [each for each in _ARRAY.findall(shape) if "S(1)" not in each]


def _peak(frame: Frame) -> list[Alive]:
    """Goes through a computation in its order. An array whose last reader is an instruction that
    makes one of the same shape hands its memory on to that one."""
    ops, owners = list(frame.instructions.values()), _owners(frame)
    last: dict[Place, int] = {}
    for at, op in enumerate(ops):
        reads = () if op.opcode in ("get-tuple-element", "tuple", "bitcast") else op.operands
        for place in _together(owners[name] for name in (op.name, *reads)):
            last[place] = at
    results = _together([owners[frame.root.name]])
    now: dict[Place, Alive] = {}
    best: list[Alive] = []
    for at, op in enumerate(ops):
        dying = [place for place in now if last[place] <= at]
        for element, each in _made(frame, op):
            heir = next((place for place in dying if now[place].shape == each.shape), None)
            if heir is not None:
                dying.remove(heir)
                del now[heir]
            if (op.name, element) not in results:
                now[op.name, element] = each
        inside = max((_peak(inner) for inner in _entered(frame, op)), key=total, default=[])
        if total(whole := [*now.values(), *inside]) > total(best):
            best = whole
        for place in [place for place in now if last[place] <= at]:
            del now[place]
    return best


def _owners(frame: Frame) -> dict[str, list[set[Place]]]:
    """Finds where the results of instructions lie: for each element of a result, the places of the
    arrays in it."""
    found: dict[str, list[set[Place]]] = {}
    for op in frame.instructions.values():
        operands = [found.get(name, [set()]) for name in op.operands]
        if op.opcode == "tuple":
            found[op.name] = [_together([each]) for each in operands]
        elif op.opcode == "get-tuple-element":
            element = int(op.attribute("index"))
            whole = operands[0]
            found[op.name] = [whole[element] if element < len(whole) else _together([whole])]
        elif op.opcode in ("while", "bitcast", "opt-barrier", "copy-done"):
            found[op.name] = operands[0]
        elif _is_view(frame, op):
            found[op.name] = [_together(operands)]
        else:
            count = len(_elements(op.shape))
            found[op.name] = [{(op.name, element)} for element in range(count)]
            if op.opcode.endswith("-start"):  # what it reads must stay until it is done
                found[op.name][0] |= _together(operands)
    return found


def _together(elements: Iterable[list[set[Place]]]) -> set[Place]:
    return {place for each in elements for places in each for place in places}


def _elements(shape: str) -> list[str]:
    """Splits the shape of a tuple into those of its elements."""
    if not shape.startswith("("):
        return [shape]
    parts, depth = [""], 0
    for char in re.sub(r"/\*.*?\*/", "", shape)[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def _is_view(frame: Frame, op: Instruction) -> bool:
    if op.opcode in _VIEWS or op.opcode.endswith(("-done", "-update")):
        return True
    return op.opcode == "fusion" and frame.enter(op).root.opcode == "dynamic-update-slice"


def _made(frame: Frame, op: Instruction) -> Iterator[tuple[int, Alive]]:
    """Yields the arrays that an instruction makes, with their elements of its result."""
    if op.opcode in _ELSEWHERE or _is_view(frame, op):
        return
    note = re.search(r'op_name="([^"]*)"', op.attributes)
    for element, shape in enumerate(_elements(op.shape)):
        if op.opcode.endswith("-start") and element == (op.opcode == "copy-start"):
            continue  # its operands
        for each in main_memory(shape):
            if size := num_bytes(each):
                yield element, Alive(each.partition("{")[0], size, note[1] if note else op.opcode)


def _entered(frame: Frame, op: Instruction) -> list[Frame]:
    """Lists the computations that run while `op` does, with arrays of their own."""
    if op.opcode == "while":
        return [frame.loop(op)[0]]
    if op.opcode == "call":
        return [frame.enter(op)]
    if op.opcode != "conditional":
        return []
    listed = re.findall(r"(?:branch_computations=\{|_computation=)([^}]*)", op.attributes)
    names = [name for each in listed for name in re.findall(r"%([\w.\-]+)", each)]
    return [Frame(frame.computations, name) for name in dict.fromkeys(names)]
