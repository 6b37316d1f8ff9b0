"""What a compiled program costs, on one of its devices: matrix products and collectives.

XLA's own `cost_analysis()` counts the body of a loop once and says nothing of collectives. Here
each instruction of the program's text counts as often as it runs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

import numpy as np

from kd_jax.plans.hlo import Computation, Frame, Instruction, arrays, main_frame, num_bytes

_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
    r"|collective-broadcast)(-start)?"
)
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=(\S+))"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange between devices. `shapes` and `bytes` are of what one device holds of
    the larger side: the result of an all-gather, the operand of anything else."""

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
        self.flops += times * other.flops
        for collective, count in other.collectives.items():
            self.collectives[collective] += times * count
        self.unbounded += other.unbounded

    def bytes_by_kind(self) -> dict[str, int]:
        """Adds up the bytes that a run exchanges, by kind of collective."""
        total: collections.Counter[str] = collections.Counter()
        for collective, count in self.collectives.items():
            total[collective.kind] += count * collective.bytes
        return dict(total)

    def all_gathers(self) -> list[str]:
        """Lists what is gathered, to see at a glance that it is parameters and nothing else."""
        return sorted(c.shapes for c in self.collectives if c.kind == "all-gather")


def cost(text: str) -> Cost:
    """Adds up the cost of the program whose compiled HLO is `text`.

    A loop whose trips depend on data counts once and is named in `unbounded`; of a conditional
    the branch with the most FLOPs counts.
    """
    return _cost(main_frame(text), set())


def _cost(frame: Frame, chains: set[str]) -> Cost:
    total = Cost()
    for op in frame.computation.instructions.values():
        if op.opcode == "dot":
            total.flops += _dot_flops(frame.computation, op)
        elif op.opcode == "convolution":
            total.flops += _convolution_flops(frame.computation, op)
        elif op.opcode == "custom-call":
            total.flops += _attention_flops(frame.computation, op)
        elif kind := _COLLECTIVE.fullmatch(op.opcode):
            if _begins(op, chains):
                total.collectives[_collective(frame.computation, op, kind[1])] += 1
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


def _dot_flops(computation: Computation, op: Instruction) -> int:
    (_, lhs), *_ = arrays(computation.shapes(op)[0])
    (_, out), *_ = arrays(op.shape)
    contracted = [int(dim) for dim in op.attribute("lhs_contracting_dims").split(",") if dim]
    return 2 * math.prod(out) * math.prod(lhs[dim] for dim in contracted)


def _convolution_flops(computation: Computation, op: Instruction) -> int:
    """On TPU matrix products are convolutions, a batched one with a dilated window most of whose
    taps fall into gaps: only taps that meet an element of the input are multiplications."""
    labels = re.split("_|->", op.attribute("dim_labels"))  # such as 0b1f_0o1i->01bf
    shapes = [arrays(shape)[0][1] for shape in (*computation.shapes(op), op.shape)]
    lhs, rhs, out = (dict(zip(*pair, strict=True)) for pair in zip(labels, shapes, strict=True))
    window = dict(re.findall(r"(\w+)=(\S+)", op.attribute("window")))
    taps = 1
    for dim in map(str, range(len(out) - 2)):
        stride, lhs_dilation, rhs_dilation = (
            int(window[key].split("x")[int(dim)]) if key in window else 1
            for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        padding = window["pad"].split("x")[int(dim)].split("_")[0] if "pad" in window else 0
        taps *= _taps(
            lhs[dim], rhs[dim], out[dim], stride, int(padding), lhs_dilation, rhs_dilation
        )
    return 2 * out["b"] * out["f"] * rhs["i"] * taps


@functools.cache
def _taps(lhs, rhs, out, stride, padding, lhs_dilation, rhs_dilation) -> int:
    """Pairs of an output and a kernel position along one dimension that meet an input element."""
    at = np.arange(out)[:, None] * stride + np.arange(rhs) * rhs_dilation - padding
    return int(np.sum((at >= 0) & (at % lhs_dilation == 0) & (at // lhs_dilation < lhs)))


def _attention_flops(computation: Computation, op: Instruction) -> int:
    """cuDNN's fused attention: scores and values forward; backward the scores again and the four
    gradients. No other custom call of ours multiplies matrices."""
    target = op.attribute("custom_call_target")
    if "__cudnn$fmha" not in target:
        return 0
    scores_BHTS = re.search(
        r'"intermediate_tensor_shape".*?"dimensions": ?\[(.*?)\]', op.attributes
    )
    batch, heads, queries, keys = map(int, re.findall(r"\d+", scores_BHTS[1]))
    (_, query), *_ = arrays(computation.shapes(op)[0])
    products = 5 if "Backward" in target else 2
    return products * 2 * math.prod(query) * keys


def _begins(op: Instruction, chains: set[str]) -> bool:
    """False for the later pieces of a collective that TPU's compiler cut up to hide it behind
    matrix products: the pieces are whole instructions that share a chain."""
    chain = re.search(r'chain_id="(\d+)"', op.attributes)
    if chain and chain[1] in chains:
        return False
    chains.update(chain.groups() if chain else ())
    return True


def _collective(computation: Computation, op: Instruction, kind: str) -> Collective:
    side = arrays(", ".join(computation.shapes(op)))
    if kind == "all-gather":
        start = len(side) if op.opcode == "all-gather-start" else 0  # operands come before results
        side = arrays(op.shape)[start:]
    shapes = ", ".join(f"{dtype}[{','.join(map(str, dims))}]" for dtype, dims in side)
    return Collective(kind, shapes, num_bytes(shapes))
