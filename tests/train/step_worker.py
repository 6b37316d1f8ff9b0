"""One process of a run that trains and evaluates: `step_worker.py --out=FILE.npz FLAGS`."""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kd_jax import flags
from kd_jax.data.loader import Stream
from kd_jax.models import family
from kd_jax.objectives.objective import held_out_objective
from kd_jax.precision import Policy
from kd_jax.train import distributed, optim, sharding, state, step
from kd_jax.train.passes import evaluate
from tests.train import tiny_step
from tests.train.test_optim import config

ROWS, BATCH = 44, 16
SETTINGS = {
    "ce": {"weight": 1.0},
    "kl": {"weight": 0.5, "temperature": 2.0},
    "hidden": {"weight": 0.25},
}


def whole(tree, mesh) -> dict[str, np.ndarray]:
    """Every array of a tree on this host, whole, by its path."""
    tree = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {sharding.path_name(path): np.asarray(leaf.addressable_data(0)) for path, leaf in leaves}


def work(devices: int, *fsdp_sizes: int) -> dict[str, np.ndarray]:
    """Gradients on meshes of so many devices, and a little training."""
    rows = tiny_step.batch("mlm", ROWS)
    make = lambda ids, epochs: jax.tree.map(lambda x: x[ids], rows)  # noqa: E731
    processes = dict(process_index=jax.process_index(), process_count=jax.process_count())
    stream = Stream(ROWS, make, BATCH, seed=5, **processes)
    student, teacher = tiny_step.models("mlm")
    found = {"local_ids": np.stack([stream[i].ids_B for i in range(4)])}
    for fsdp in fsdp_sizes:
        program, schedules = tiny_step.program(SETTINGS, devices, fsdp)
        inputs = jax.tree.map(np.asarray, tiny_step.inputs(schedules))
        own = program.objective.init(jax.random.key(0), *tiny_step.SPECS)
        start = jax.tree.map(np.asarray, tiny_step.state(student, own))
        frozen = jax.tree.map(np.asarray, teacher)
        batch = sharding.place(stream[0], program.mesh)
        run = jax.jit(step.gradient, static_argnames="program")
        grads, terms = run(start, batch, frozen, inputs, program)
        values = {name: ratio.value() for name, ratio in terms.items()}
        found |= whole({f"fsdp {fsdp}": {"gradient": grads, "terms": values}}, program.mesh)
    # Two steps and figures, on the last mesh.
    make_optimizer = functools.partial(optim.make_optimizer, config(epsilon=1e-2))
    table, graphdef = family.PARTITION, student.graphdef
    born = state.create(lambda x: x, start.params, graphdef, make_optimizer, table, program.mesh)
    specs = sharding.param_specs(table, frozen.params, program.mesh)
    placed = jax.device_put(frozen.params, sharding.shardings(specs, program.mesh))
    frozen = frozen.replace(params=placed)
    for i in range(2):
        batch = sharding.place(stream[i], program.mesh)
        found |= whole({f"global_ids {i}": batch.ids_B}, program.mesh)
        born, metrics = step.train_step(born, batch, frozen, inputs, program=program)
    found |= whole({"loss": metrics["loss"], "params": born.params}, program.mesh)
    held_out = step.Program(held_out_objective(Policy()), program.mesh, table)
    once = Stream(ROWS, make, BATCH, **processes)
    return found | {"held_out": np.array(evaluate(born.student, once, None, held_out)["loss"])}


if __name__ == "__main__":
    parser = flags.Parser("worker", __doc__)
    parser.add_argument("--out", required=True, help="where the results go")
    parser.add_processes()
    args = vars(parser.parse())
    out = args.pop("out")
    distributed.initialize(**args)
    np.savez(out, **work(len(jax.devices()), 4, 2))
