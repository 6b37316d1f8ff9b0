"""Forecasts a run's parameters, FLOPs, hours, memory and communication without weights, data or
accelerators.

Everything is built abstractly, from the config alone: parameters, FLOPs and an estimate of the
memory of each stage, and for a topology each stage's real train step, compiled for chips that need
not be present. That happens in a child process whose JAX sees only CPUs, so that planning does not
depend on this process or touch an accelerator in use.

    python -m kd_jax.recipes.plan < REQUEST    the child: writes the plan as JSON
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.errors import JaxRuntimeError
from ml_collections import ConfigDict

from kd_jax.errors import UserError
from kd_jax.metrics import flops
from kd_jax.models.blueprint import count
from kd_jax.plans import alive, compiled, topology
from kd_jax.run import measure, memory, stage, workdir
from kd_jax.run.run import Run, build
from kd_jax.run.stage import Stage
from kd_jax.train import sharding, state, step
from kd_jax.types import Params

Plan = dict[str, Any]  # keys: see `plan`, `needed` and `compiled_step`
MFU = 0.4  # share of a chip's peak FLOP/s that hours are computed for
LARGEST = 8  # arrays that are listed
_USER_ERROR = 3  # the child's exit status; what the interpreter itself ends with is 1 or 2


def plan(
    config: ConfigDict,
    name: str = "",
    stages: Sequence[str] = (),
    mfu: float = MFU,
    compiles: bool = True,
) -> Plan:
    """Makes the plan of a config.

    Args:
        config: the config of a training recipe.
        name: a topology, or "".
        stages: the names of the stages to plan; none: all.
        mfu: the share of the peak FLOP/s at which hours are computed.
        compiles: whether steps are compiled for the topology, which takes minutes.

    Returns:
        topology; devices; mfu; stages: a dict for each, with the keys of `needed`, those of
        `compiled_step` if compiled, and hours and chip_hours if there is a topology; total: tokens,
        flops and chip_hours of the whole run as far as they are known.

    Raises UserError for mistakes in the config or the topology, and if a step does not fit into the
    memory of a chip.
    """
    chips = topology.find(name) if name else None
    devices = chips.chips if chips else config.mesh.fsdp * config.mesh.model  # as few as it needs
    compiles = compiles and chips is not None
    request = dict(
        config=workdir.resolved(config),
        topology=name,
        stages=[*stages],
        compiles=compiles,
    )
    child = subprocess.run(
        [sys.executable, "-m", "kd_jax.recipes.plan"],
        input=json.dumps(request),
        env=os.environ | topology.ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": str(max(1, devices))},
        capture_output=True,
        text=True,
    )
    if child.returncode == _USER_ERROR:
        raise UserError(child.stderr.strip().splitlines()[-1])
    if child.returncode:
        raise RuntimeError(f"planning ended with status {child.returncode}:\n{child.stderr}")
    found = {"topology": name, "devices": devices, "mfu": mfu, "stages": json.loads(child.stdout)}
    timed = chips is not None and config.precision == "bf16"  # whose peak is known
    for each in found["stages"] if timed else ():
        seconds = each["total_flops"] / (devices * chips.peak_flops * mfu)
        each["hours"], each["chip_hours"] = seconds / 3600, devices * seconds / 3600
    keys = ("total_tokens", "total_flops", *(["chip_hours"] if timed else []))
    found["total"] = {key: sum(each[key] for each in found["stages"]) for key in keys}
    return found


def _child() -> None:
    request = json.load(sys.stdin)
    config, name = ConfigDict(request["config"]), request["topology"]
    try:
        chips = topology.find(name) if name else None
        devices = topology.devices(chips) if request["compiles"] else None
        run = build(config, None, devices, chips.platform if chips else None)
        found = []
        for this in _chosen(run, request["stages"]):
            found.append(needed(run, this))
            if request["compiles"]:
                found[-1] |= compiled_step(run, chips, this)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(_USER_ERROR)
    print(json.dumps(found))


def _chosen(run: Run, names: Sequence[str]) -> list[Stage]:
    for name in names:
        if run.stage(name) is None:
            have = ", ".join(each.name for each in run.stages)
            raise UserError(f"--stage={name}: no such stage; have: {have}")
    return [each for each in run.stages if not names or each.name in names]


def abstract_step(
    run: Run, this: Stage | None = None
) -> tuple[state.TrainState, Any, Any, step.Inputs, step.Program]:
    """Makes the arguments of a stage's last `train_step`: shapes, types and shardings. The stage is
    by default the run's main one."""
    last = this or run.principal
    program = last.program
    teacher = run.models["teacher"].abstract()
    # Do the teacher's layers fit the student?
    plain = last.phases_of is stage.whole and not last.after
    if plain and last.model == "student" and run.config.student.init == "teacher":
        given = {"teacher": teacher.params}
        jax.eval_shape(*stage.initial_params(run, last, given, jax.random.key(0)))

    def placed(shapes: Any, specs: Any) -> Any:
        places = sharding.shardings(specs, run.mesh)
        return jax.tree.map(lambda shape, at: shape.update(sharding=at), shapes, places)

    born = stage.abstract_state(run, last)
    others, batch, _ = last.step_inputs(run, last)
    if last.learns:
        specs = sharding.param_specs(program.table, others.params, run.mesh)
        others = others.replace(params=placed(others.params, specs))
    batch = placed(batch, jax.tree.map(lambda _: sharding.BATCH, batch))
    inputs = dataclasses.replace(last.schedules, seed=0, replacement=None).at(0)
    return born, batch, others if last.learns else None, inputs, program


def needed(run: Run, this: Stage | None = None) -> Plan:
    """Computes a stage's sizes, the FLOPs of one step on the global batch, and its memory by
    arithmetic. The stage is by default the run's main one.

    stage; params_teacher; params_student: of the trained model in the end; reduction_percent; rows
    and tokens of a batch, and positions of a row that reach the head; flops_needed;
    gradient_bytes, of one step in float32; steps (0 where epochs of data decide); total_tokens;
    total_flops, its models' forward passes outside the step included; memory_estimate: bytes of a
    device by kind (run/memory.py); chunk: the rows of the vocabulary loss that have logits at a
    time, and their bytes; writing_flops, where the model writes what a step learns from; if blocks
    are replaced during training, phases: the description of each by `Stage.swaps`.
    """
    this = this or run.principal
    born, batch, teacher_in_step, *_ = abstract_step(run, this)
    teacher = run.models["teacher"].abstract()
    student = run.models[this.model].abstract().params
    rows, tokens, positions = measure.shape_of_step(run, this)
    teacher_size, student_size = count(teacher.params), count(student)
    rounds = run.config.get("rounds", 1)
    counted = run.config.stages[this.name].get("steps", run.config.steps) > 0
    cost = measure.training_cost(run, this, {}) if counted else {"steps": 0, "training_flops": 0}
    found = {
        "stage": this.name,
        "params_teacher": teacher_size,
        "params_student": student_size,
        "reduction_percent": round(100 * (1 - student_size / teacher_size), 2),
        "rows": rows,
        "tokens": tokens,
        "positions": positions,
        "flops_needed": flops.train_step(
            run.models[this.model].counted(),
            this.step_inputs(run, this).computing,
            born.params["objective"],
            *(rows, tokens, positions),
        ),
        "gradient_bytes": 4 * count(born.params),
        "steps": rounds * cost["steps"],
        "total_tokens": rounds * cost["steps"] * rows * tokens,
        "total_flops": rounds * cost["training_flops"],
        "memory_estimate": memory.estimate(run, this, born, batch, teacher_in_step),
        "chunk": memory.chunk(run, this),
    }
    if this.writing is not None:
        found["writing_flops"] = this.writing.flops
    swaps = list(this.swaps)
    return found | ({"phases": swaps} if swaps else {})


def compiled_step(run: Run, chips: topology.Topology, this: Stage | None = None) -> Plan:
    """Compiles the step of a stage, by default the run's main one, for `chips`.

    flops_compiled, of all chips together; memory_bytes_per_device, in total and by use;
    memory_by_kind: of the arguments, and of the arrays that are alive at the peak; largest: the
    largest of those (shape, bytes, kind, made_by); collectives of one device: kind, shapes, bytes,
    count; collective_bytes; writing_bytes_per_device, of writing what a step learns from, with all
    that waits meanwhile; all_gathers: their shapes; loops that were counted once since their
    trip count depends on data; compile_seconds and compile_cpu_seconds.
    """
    this = this or run.principal
    born, batch, teacher, inputs, program = abstract_step(run, this)
    lowered = step.train_step.lower(born, batch, teacher, inputs, program=program)
    began, cpu = time.perf_counter(), time.process_time()
    made, parts = _compiled(lowered, chips, run, this)
    seconds = [round(each, 1) for each in (time.perf_counter() - began, time.process_time() - cpu)]
    used = _used(parts)
    writing = {}
    if this.writing is not None:
        _, of_writing = _compiled(this.writing.lowered(run, this), chips, run, this)
        # The teacher, the optimizer and the gradients' sums stay where they are.
        waiting = parts["arguments"] - _bytes_per_device(born.student.params)
        writing = {"writing_bytes_per_device": _used(of_writing) + waiting}
    try:
        text = made.as_text()
    except JaxRuntimeError:  # some of libtpu's programs for v6e
        raise UserError(
            f"the step takes {used / 1e9:.2f} of the {chips.memory_bytes / 1e9:.2f} GB of a chip "
            f"of {chips.name}; no more is known, since this libtpu's program cannot be read: take "
            f"--estimate, or chips of another kind"
        ) from None
    spent, kind_of = compiled.cost(text), memory.kinds(born, teacher)
    at_peak = [(each, kind_of(each)) for each in alive.at_peak(text)]
    by_kind = memory.arguments(born, batch, teacher)
    for each, kind in at_peak:
        by_kind[kind] = by_kind.get(kind, 0) + each.bytes
    return {
        "topology": chips.name,
        "devices": chips.chips,
        "flops_compiled": chips.chips * spent.flops,
        "memory_bytes_per_device": used,
        "memory_parts": parts,
        "memory_bytes_of_chip": chips.memory_bytes,
        "memory_by_kind": by_kind,
        "largest": [dataclasses.asdict(each) | {"kind": kind} for each, kind in at_peak[:LARGEST]],
        "collectives": [
            {"kind": c.kind, "shapes": c.shapes, "bytes": c.bytes, "count": times}
            for c, times in spent.collectives.items()
        ],
        "collective_bytes": spent.bytes_by_kind(),
        "all_gathers": spent.all_gathers(),
        "unbounded_loops": spent.unbounded,
        "compile_seconds": seconds[0],
        "compile_cpu_seconds": seconds[1],
    } | writing


def _compiled(
    lowered: jax.stages.Lowered, chips: topology.Topology, run: Run, this: Stage
) -> tuple[jax.stages.Compiled, dict[str, int]]:
    """Compiles a program for chips: returns it, and the bytes of a device by use."""
    try:
        made = lowered.compile(compiler_options=chips.compiler_options)
    except JaxRuntimeError as error:
        raise _does_not_fit(error, chips, run, this) from None
    size = made.memory_analysis()
    return made, {
        "arguments": size.argument_size_in_bytes,
        "temporaries": size.temp_size_in_bytes,
        "outputs": size.output_size_in_bytes,
        "aliased": size.alias_size_in_bytes,
    }


def _used(parts: dict[str, int]) -> int:
    return sum(parts.values()) - 2 * parts["aliased"]


def _bytes_per_device(params: Params) -> int:
    """Sums the bytes of one device's parts of abstract parameters."""
    leaves = jax.tree.leaves(params)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _does_not_fit(
    error: JaxRuntimeError, chips: topology.Topology, run: Run, this: Stage
) -> Exception:
    """Converts the compiler's out-of-memory error to UserError, with what would help; returns other
    errors unchanged."""
    reason = re.search(r"Ran out of memory[^\n]*", str(error))
    if reason is None:
        return error
    accumulate, mesh = run.config.accumulate, run.config.mesh
    rows = this.batch_size // sharding.num_parts(run.mesh)
    helps = []
    if rows > accumulate:
        helps.append(f"raise accumulate to at most {rows}, or lower batch_size")
    if not run.config.remat:
        helps.append("set remat=True")
    if mesh.fsdp * mesh.model < run.mesh.size:
        helps.append(f"split parameters over more chips than {mesh.fsdp * mesh.model} (mesh.fsdp)")
    if rows == 1:
        helps.append("split the work on each row over chips (mesh.model)")
    helps.append("take more chips, or such with more memory")
    return UserError(
        f"stage {this.name}: the step does not fit into a chip of {chips.name}: "
        f"{reason[0].partition(' HLO module')[0]} What helps: {'; '.join(helps)}"
    )


if __name__ == "__main__":
    _child()
