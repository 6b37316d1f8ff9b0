"""The least time that compiled TPU programs can take, by kind of operation: results/roofline.json.

    python benchmarks/roofline.py [--only=TEXT] [--top=N]
    python benchmarks/roofline.py --hlo=FILE --topology=v5e:4x4    # of any program's text

An operation needs at least the longer of two times: its FLOPs at the chip's peak, and its bytes to
and from HBM at the bandwidth of that; its sum over all operations as XLA scheduled them, those of a
loop as often as it runs, is the roofline. Exchanges between chips do not count, as if they were
hidden. A fusion reads of an operand only the slices that it takes, and a kernel written by hand
(Pallas) reads and writes each operand once.
"""

import argparse
import collections
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kd_jax.plans import compiled, topology
from kd_jax.plans.alive import main_memory
from kd_jax.plans.compiled import Frame, Instruction

_NO_WORK = ("tuple", "get-tuple-element", "parameter", "bitcast", "constant", "after-all")
_NO_WORK += ("partition-id", "iota", "opt-barrier")
_EXCHANGE = re.compile(r"(all-|reduce-scatter|collective|ragged-|send|recv)")
_SLICES = ("dynamic-slice", "slice", "gather")
# Results of these inside a fusion are no work of its own: memory that it passes on.
_PASSED = ("parameter", "custom-call", "all-gather", "all-reduce", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Work:
    """An operation of a program: what it needs in one run, and how often it runs."""

    kind: str
    shape: str
    times: int
    flops: int
    bytes: int

    def seconds(self, chip: topology.Topology) -> float:
        """The least time of all of its runs."""
        return self.times * max(self.flops / chip.peak_flops, self.bytes / chip.bandwidth)


def works(text: str, kind_of: Callable[[Frame, Instruction, int], str]) -> Iterator[Work]:
    """Yields the operations of a compiled program."""
    yield from _works(compiled.main_frame(text), 1, kind_of)


def _works(frame: Frame, times: int, kind_of: Callable) -> Iterator[Work]:
    for op in frame.instructions.values():
        if op.opcode in _NO_WORK or op.opcode.endswith(("-done", "-update")):
            continue
        if op.opcode == "while":
            body, _, trips = frame.loop(op)
            yield from _works(body, times * (1 if trips is None else trips), kind_of)
        elif op.opcode == "call":
            yield from _works(frame.enter(op), times, kind_of)
        elif not _EXCHANGE.match(op.opcode) and op.opcode != "conditional":
            flops = compiled.flops(frame, op)
            work = Work(kind_of(frame, op, flops), op.shape, times, flops, _bytes(frame, op))
            yield work


def _size(shape: str) -> int:
    """Bytes of an HLO shape in HBM."""
    return sum(map(compiled.num_bytes, main_memory(shape)))


def _bytes(frame: Frame, op: Instruction) -> int:
    """Bytes that an instruction reads from HBM and writes to it."""
    if op.opcode == "fusion":
        return _read(frame, op) + _written(frame, op)
    if op.opcode == "custom-call" and "AllocateBuffer" in op.attributes:
        return 0
    if op.opcode in _SLICES:
        return 2 * _size(op.shape)
    if op.opcode.endswith("-start"):  # a copy between HBM and the chip's fast memory
        return _size(op.shape)
    return _size(op.shape) + sum(map(_size, frame.shapes(op)))


def _read(frame: Frame, op: Instruction) -> int:
    inner, total = frame.enter(op).instructions, 0
    names = {int(each.literal): name for name, each in inner.items() if each.opcode == "parameter"}
    for number, shape in enumerate(frame.shapes(op)):
        users = [each for each in inner.values() if names.get(number) in each.operands]
        sliced = [each.opcode in _SLICES and each.operands[0] == names[number] for each in users]
        passed = [each.opcode in ("tuple", *_PASSED) for each in users]
        changed = [
            each.opcode == "dynamic-update-slice" and each.operands[0] == names[number]
            for each in users
        ]
        if all(passed) or all(changed):
            continue
        own = sum(compiled.num_bytes(each.shape) for each in users) if all(sliced) else math.inf
        total += min(_size(shape), own)
    return int(total)


def _written(frame: Frame, op: Instruction) -> int:
    called = frame.enter(op)
    inner, root, total = called.instructions, called.root, 0
    for name in root.operands if root.opcode == "tuple" else [root.name]:
        result = inner[name]
        while result.opcode in ("bitcast", "get-tuple-element"):
            result = inner[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            total += compiled.num_bytes(inner[result.operands[1]].shape)
        elif result.opcode not in _PASSED:
            total += _size(inner[name].shape)
    # Where a result goes to fast memory, the call says so and its inside does not.
    return min(total, _size(op.shape))


def kinds(tokens: int, vocabularies: set[int]) -> Callable[[Frame, Instruction, int], str]:
    """Makes a function that names an operation's kind, by the sizes in its shapes."""
    sizes = "|".join(map(str, sorted(vocabularies)))
    scores = re.compile(rf"\[(?:\d+,)*{tokens},(?:\d+,)*{tokens}[,\]]")
    vocabulary = re.compile(rf"\b(?:{sizes})\b" if sizes else r"$^")

    def kind(frame: Frame, op: Instruction, flops: int) -> str:
        shapes = " ".join([op.shape, *frame.shapes(op)])
        what = "products" if flops else "elementwise"
        if "tpu_custom_call" in op.attributes:
            return "kernels"
        if vocabulary.search(shapes):
            return f"vocabulary {what}"
        if scores.search(shapes):
            return f"scores {what}"
        return "copies" if op.opcode.startswith("copy") else f"other {what}"

    return kind


def summary(name: str, chips: topology.Topology, found: list[Work]) -> dict[str, Any]:
    """Sums up a program's roofline as a row of results/roofline.json."""
    parts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for each in found:
        own = {
            "ms": 1e3 * each.seconds(chips),
            "tflop": each.times * each.flops / 1e12,
            "gb": each.times * each.bytes / 1e9,
        }
        parts[each.kind].update(own)
    ordered = sorted(parts.items(), key=lambda item: -item[1]["ms"])
    total = sum(each.flops * each.times for each in found)
    return {
        "roofline": name,
        "topology": chips.name,
        "ms": sum(part["ms"] for part in parts.values()),
        "flops_ms": 1e3 * total / chips.peak_flops,
        "kinds": {kind: dict(part) for kind, part in ordered},
    }


def of_step(config: str, chips: topology.Topology) -> tuple[str, Callable]:
    """Compiles the step of a config's main stage."""
    from kd_jax import experiments
    from kd_jax.recipes import plan
    from kd_jax.run.run import build
    from kd_jax.train import step

    read = experiments.read(config)
    run = build(read, None, topology.devices(chips), chips.platform)
    *arguments, program = plan.abstract_step(run)
    lowered = step.train_step.lower(*arguments, program=program)
    sizes = {model.config.vocab_size for model in run.models.values()}
    return lowered.compile().as_text(), kinds(read.task.seq_len, sizes)


def of_loss(chips: topology.Topology, rows: int = 2048) -> tuple[str, Callable]:
    """Compiles the vocabulary loss of Qwen2.5-7B to 1.5B with its gradients, on one chip."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from kd_jax.objectives import ce, kl, vocab
    from kd_jax.objectives.logits import Head
    from kd_jax.precision import policy_for

    policy = policy_for("bf16", chips.platform)
    terms = (vocab.RowTerm("ce", ce.make()), vocab.RowTerm("kl", kl.make()))
    engine = vocab.Engine(terms, policy, policy)
    here = SingleDeviceSharding(topology.devices(chips)[0])

    def shape(*dims: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=here)

    number = shape(dtype="float32")
    rows_N = shape(rows, dtype="float32")
    student = Head(shape(rows, 1536), shape(151_936, 1536), None)
    teacher = Head(shape(rows, 3584), shape(151_936, 3584), None)
    weights, scales = {"ce": rows_N, "kl": rows_N}, {"ce": number, "kl": number}

    def loss(features_ND, unembed_VD, teacher, labels_N, weights, scales):
        head = Head(features_ND, unembed_VD, None)
        return vocab.vocab_loss(engine, head, teacher, labels_N, weights, scales, {})

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    labels_N = shape(rows, dtype="int32")
    given = student.features_ND, student.unembed_VD, teacher, labels_N, weights, scales
    return both.lower(*given).compile().as_text(), kinds(rows, {151_936})


PROGRAMS: dict[str, tuple[str, Callable]] = {
    "GPT-2 to 6 layers, 2 x 4 x 1,024 a chip, v5e": (
        "v5e:4x4",
        lambda chips: of_step("pretrain_gpt2", chips),
    ),
    "loss alone, 2,048 rows, V = 151,936, v5e": ("v5e:1x1", of_loss),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="programs whose name has this text")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="prints the N longest")
    parser.add_argument("--hlo", type=Path, help="the text of a compiled program, to read instead")
    parser.add_argument("--topology", default="v5e:1x1", help="of --hlo")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.child:  # libtpu reads the environment when a process starts
        command = [sys.executable, __file__, "--child", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=os.environ | topology.ENVIRONMENT).returncode)
    if args.hlo:
        chips = topology.find(args.topology)
        found = list(works(args.hlo.read_text(), kinds(-1, set())))
        return show(summary(args.hlo.name, chips, found), chips, found, args.top)

    import results

    rows = {row["roofline"]: row for row in results.rows_of("roofline")}
    for name, (where, make) in PROGRAMS.items():
        if args.only not in name:
            continue
        chips = topology.find(where)
        text, kind_of = make(chips)
        found = list(works(text, kind_of))
        rows[name] = summary(name, chips, found)
        show(rows[name], chips, found, args.top)
        kept = [rows[each] for each in PROGRAMS if each in rows]
        note = "Lower bounds of compiled programs, which have not been run."
        results.keep_rows("roofline", kept, "python benchmarks/roofline.py", note)


def show(row: dict, chips: topology.Topology, found: list[Work], top: int) -> None:
    """Prints a row, and its longest operations."""
    print(json.dumps(row, indent=1))
    for each in sorted(found, key=lambda work: -work.seconds(chips))[:top]:
        print(
            f"{1e3 * each.seconds(chips):7.2f} ms  {each.times:5} x {each.kind}: {each.shape[:90]}"
        )


if __name__ == "__main__":
    main()
