"""Forecasts a run's parameters, FLOPs, memory and communication without weights, data or
accelerators.

Everything is built abstractly, from the config alone: parameters and FLOPs, and for a topology the
student's real train step, compiled for chips that need not be present. That happens in a child
process whose JAX sees only CPUs, so that planning does not depend on this process or touch an
accelerator in use.

    python -m kd_jax.recipes.plan TOPOLOGY < config.json    the child: writes the plan as JSON
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from typing import Any

import jax
from jax.errors import JaxRuntimeError
from ml_collections import ConfigDict

from kd_jax.errors import UserError
from kd_jax.metrics import flops
from kd_jax.models.blueprint import count
from kd_jax.plans import compiled, topology
from kd_jax.report.table import Table
from kd_jax.run import measure, stage, workdir
from kd_jax.run.run import Run, build
from kd_jax.train import sharding, state, step

Plan = dict[str, Any]  # keys: see `needed` and `compiled_step`
_USER_ERROR = 3  # the child's exit status; what the interpreter itself ends with is 1 or 2


def plan(config: ConfigDict, name: str = "") -> Plan:
    """Makes the plan of a config; if `name` is a topology, with its compiled step.

    Raises UserError for mistakes in the config or the topology, and if the step does not fit into
    the memory of a chip.
    """
    if name:
        topology.find(name)
    cpus = str(max(1, config.mesh.fsdp))  # without a topology, as few as the mesh needs
    child = subprocess.run(
        [sys.executable, "-m", "kd_jax.recipes.plan", name],
        input=json.dumps(workdir.resolved(config)),
        env=os.environ | topology.ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": cpus},
        capture_output=True,
        text=True,
    )
    if child.returncode == _USER_ERROR:
        raise UserError(child.stderr.strip().splitlines()[-1])
    if child.returncode:
        raise RuntimeError(f"planning ended with status {child.returncode}:\n{child.stderr}")
    return json.loads(child.stdout)


def _child(name: str) -> None:
    config = ConfigDict(json.load(sys.stdin))
    try:
        chips = topology.find(name) if name else None
        devices = topology.devices(chips) if chips else None
        run = build(config, None, devices, chips.platform if chips else None)
        found = needed(run)
        if chips:
            found |= compiled_step(run, chips)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(_USER_ERROR)
    print(json.dumps(found))


def abstract_step(run: Run) -> tuple[state.TrainState, Any, Any, step.Inputs, step.Program]:
    """Makes the arguments of the planned stage's last `train_step`: shapes, types and shardings."""
    last, program = run.principal, run.principal.program
    teacher = run.models["teacher"].abstract()
    # Do the teacher's layers fit the student?
    if last.model == "student" and run.config.student.init == "teacher" and not last.after:
        given = {"teacher": teacher.params}
        jax.eval_shape(*stage.initial_params(run, last, given, jax.random.key(0)))

    def placed(shapes: Any, specs: Any) -> Any:
        places = sharding.shardings(specs, run.mesh)
        return jax.tree.map(lambda shape, at: shape.update(sharding=at), shapes, places)

    born = stage.abstract_state(run, last)
    others, batch, _ = last.step_inputs(run, last)
    specs = sharding.param_specs(program.table, others.params, run.mesh)
    others = others.replace(params=placed(others.params, specs))
    batch = placed(batch, jax.tree.map(lambda _: sharding.BATCH, batch))
    inputs = dataclasses.replace(last.schedules, seed=0, replacement=None).at(0)
    return born, batch, others, inputs, program


def needed(run: Run) -> Plan:
    """Computes sizes of the models, and the FLOPs of one step on the global batch.

    stage: the planned stage; params_teacher; params_student: of the trained model in the end;
    reduction_percent; rows and tokens of a batch, and positions of a row that reach the head;
    flops_needed; gradient_bytes, of one step in float32; if blocks are replaced during training,
    phases: the description of each by `Stage.swaps`.
    """
    born, *_ = abstract_step(run)
    teacher = run.models["teacher"].abstract()
    student = born.params["student"]
    rows, tokens, positions = measure.shape_of_step(run, run.principal)
    teacher_size, student_size = count(teacher.params), count(student)
    found = {
        "stage": run.principal.name,
        "params_teacher": teacher_size,
        "params_student": student_size,
        "reduction_percent": round(100 * (1 - student_size / teacher_size), 2),
        "rows": rows,
        "tokens": tokens,
        "positions": positions,
        "flops_needed": flops.train_step(
            student,
            run.principal.step_inputs(run, run.principal).computing,
            born.params["objective"],
            *(rows, tokens, positions),
        ),
        "gradient_bytes": 4 * count(born.params),
    }
    swaps = list(run.principal.swaps)
    return found | ({"phases": swaps} if swaps else {})


def compiled_step(run: Run, chips: topology.Topology) -> Plan:
    """Compiles the step for `chips`.

    flops_compiled, of all chips together; memory_bytes_per_device, in total and by use; collectives
    of one device: kind, shapes, bytes, count; collective_bytes; all_gathers: their shapes; loops
    that were counted once since their trip count depends on data; compile_seconds.
    """
    *arguments, last = abstract_step(run)
    lowered = step.train_step.lower(*arguments, program=last)
    began = time.perf_counter()
    try:
        program = lowered.compile(compiler_options=chips.compiler_options)
    except JaxRuntimeError as error:
        raise _does_not_fit(error, chips) from None
    seconds = round(time.perf_counter() - began, 1)
    memory = program.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
    }
    spent = compiled.cost(program.as_text())
    return {
        "topology": chips.name,
        "devices": chips.chips,
        "flops_compiled": chips.chips * spent.flops,
        "memory_bytes_per_device": sum(parts.values()) - 2 * parts["aliased"],
        "memory_parts": parts,
        "memory_bytes_of_chip": chips.memory_bytes,
        "collectives": [
            {"kind": c.kind, "shapes": c.shapes, "bytes": c.bytes, "count": times}
            for c, times in spent.collectives.items()
        ],
        "collective_bytes": spent.bytes_by_kind(),
        "all_gathers": spent.all_gathers(),
        "unbounded_loops": spent.unbounded,
        "compile_seconds": seconds,
    }


def _does_not_fit(error: JaxRuntimeError, chips: topology.Topology) -> Exception:
    """Converts the compiler's out-of-memory error to UserError; returns other errors unchanged."""
    reason = re.search(r"Ran out of memory[^\n]*", str(error))
    if reason is None:
        return error
    return UserError(
        f"the step does not fit into a chip of {chips.name}: "
        f"{reason[0].partition(' HLO module')[0]} Lower batch_size, raise accumulate, set "
        f"remat=True, or split parameters with mesh.fsdp"
    )


def table(found: Plan) -> Table:
    """Makes a table of a plan."""
    rows = [
        ["teacher", f"{found['params_teacher']:,} parameters"],
        [found["stage"], f"{found['params_student']:,} parameters"],
        ["reduction", f"{found['reduction_percent']:.2f}%"],
        ["batch", f"{found['rows']} x {found['tokens']} tokens, {found['positions']} to the head"],
        ["FLOPs needed a step", f"{found['flops_needed']:.4g}"],
    ]
    if "topology" in found:
        used, memory = found["memory_bytes_per_device"], found["memory_parts"]
        parts = [f"{name} {size / 1e9:.2f}" for name, size in memory.items()]
        ratio = found["flops_compiled"] / found["flops_needed"]
        share = used / found["memory_bytes_of_chip"]
        verdict = "fits" if share <= 1 else "does not fit"
        rows += [
            ["FLOPs compiled", f"{found['flops_compiled']:.4g}, {ratio:.3f} of those needed"],
            ["memory a chip", f"{used / 1e9:.2f} GB ({', '.join(parts)}), {share:.0%}: {verdict}"],
        ]
        for kind, size in found["collective_bytes"].items():
            share = size / found["gradient_bytes"]
            rows.append([kind, f"{size / 1e9:.3f} GB a chip, {share:.3f} of the gradients'"])
        if found["unbounded_loops"]:
            rows.append(["loops counted once", ", ".join(found["unbounded_loops"])])
        rows.append(["compiled in", f"{found['compile_seconds']} s"])
    return Table(found.get("topology", "one step"), ["", f"stage {found['stage']}"], rows)


def phases(found: Plan) -> Table | None:
    """Makes a table of the model after each swap; None if no blocks are replaced in training."""
    if "phases" not in found:
        return None
    rows = [["0", "", "", f"{found['params_teacher']:,}", "0.00%"]]
    for row in found["phases"]:
        first, last = row["steps"]
        rows.append(
            [
                str(row["phase"]),
                f"{first:,} to {last:,}",
                "by importance" if row["blocks"] is None else ", ".join(map(str, row["blocks"])),
                f"{row['parameters']:,}",
                f"{row['reduction_percent']:.2f}%",
            ]
        )
    return Table("phases", ["phase", "steps", "blocks replaced", "parameters", "reduction"], rows)


if __name__ == "__main__":
    _child(sys.argv[1])
