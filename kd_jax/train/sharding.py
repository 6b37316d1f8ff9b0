"""Makes the device mesh, and places parameters and batches on it.

Two axes: `data`, plain data parallelism like PyTorch's DDP, and `fsdp`, over which parameters,
gradients and optimizer moments are split as well (ZeRO, Rajbhandari et al., arXiv:1910.02054). A
batch is split over both. Gradients are computed per device inside `shard_map`, so that the only
collectives are those written here: parameters are gathered once, gradients summed once.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax.errors import UserError
from kd_jax.types import Array, Batch, Params

AXES = ("data", "fsdp")
BATCH = P(AXES)  # rows of a batch over all devices
Table = tuple[tuple[str, P], ...]


def make_mesh(fsdp: int = 1, devices: list | None = None) -> Mesh:
    """Makes a mesh data x fsdp over `devices` (all by default); `fsdp` must divide their number."""
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise UserError(f"mesh.fsdp={fsdp} does not divide the {len(devices)} devices")
    shape = (len(devices) // fsdp, fsdp)
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 2)


def path_name(path: tuple) -> str:
    """Converts a tree path to a name for regex tables: "student/backbone/blocks/0/q/kernel"."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "idx", entry))) for entry in path)


def match(table: tuple[tuple[str, Any], ...], tree: Any, what: str) -> Any:
    """Finds the value of the first pattern that matches each parameter's path name: a tree.

    Raises UserError naming the parameters that no pattern covers.
    """
    missing = []

    def look_up(path, leaf):
        name = path_name(path)
        for pattern, value in table:
            if re.search(pattern, name):
                return value
        missing.append(name)

    found = jax.tree_util.tree_map_with_path(look_up, tree)
    if missing:
        raise UserError(f"{what}: no pattern covers {', '.join(missing)}")
    return found


def param_specs(table: Table, params: Params, mesh: Mesh) -> Params:
    """Finds the PartitionSpecs of `params`; a dimension that fsdp does not divide is not split."""
    fsdp = mesh.shape["fsdp"]

    def fitting(spec, leaf):
        names = tuple(spec) + (None,) * (len(leaf.shape) - len(spec))
        whole = fsdp == 1 or any(n and d % fsdp for n, d in zip(names, leaf.shape, strict=True))
        return P() if whole else spec

    specs = match(table, params, "sharding table")
    return jax.tree.map(fitting, specs, params)


def shardings(specs: Any, mesh: Mesh) -> Any:
    """Makes NamedShardings of a tree of PartitionSpecs."""
    return jax.tree.map(functools.partial(NamedSharding, mesh), specs)


def _split_axis(spec: P) -> int | None:
    return next((i for i, name in enumerate(spec) if name == "fsdp"), None)


def gather(params: Params, specs: Params) -> Params:
    """Gathers whole parameters from all devices' shards; inside shard_map."""

    def whole(spec, part):
        axis = _split_axis(spec)
        return part if axis is None else jax.lax.all_gather(part, "fsdp", axis=axis, tiled=True)

    return jax.tree.map(whole, specs, params)


def reduce(grads: Params, specs: Params, mesh: Mesh) -> Params:
    """Sums all devices' gradients, and keeps each device's shard; inside shard_map."""

    def summed(spec, grad):
        axis = _split_axis(spec)
        if axis is None:
            return jax.lax.psum(grad, AXES)
        part = jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=axis, tiled=True)
        return jax.lax.psum(part, "data")

    if mesh.size == 1:
        return grads
    return jax.tree.map(summed, specs, grads)


def per_device(
    run: Callable[..., Any],
    mesh: Mesh,
    table: Table,
    models: tuple[Any, ...],
    batch: Batch,
    *numbers: Any,
    out: Any = BATCH,
) -> Any:
    """Calls `run(*models, batch, *numbers)` on every device with the device's rows of the batch.

    Args:
        run: returns arrays that are equal on all devices, or have a device's rows; see `out`.
        models: `Model`s or other pytrees of `params`, sharded by `table` and gathered for `run`;
            None stays None.
        numbers: arguments that are equal on all devices.
        out: the layout of results: BATCH for rows, P() for equal ones; or a tree of these.
    """
    parts = [None if model is None else model.params for model in models]
    specs = [param_specs(table, params, mesh) for params in parts]

    def local(parts, *rest):
        whole = map(gather, parts, specs)
        pairs = zip(models, whole, strict=True)
        given = [None if model is None else model.replace(params=own) for model, own in pairs]
        return run(*given, *rest)

    in_specs = (specs, BATCH, *[P()] * len(numbers))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out, check_vma=False)
    return mapped(parts, batch, *numbers)


def to_host(params: Params) -> Params:
    """Copies whole parameters, which may be split over processes, to this host; all processes call
    this together."""

    def whole(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, params)


def device_index() -> Array:
    """Returns this device's number on the mesh, uint32; inside shard_map."""
    index = jax.lax.axis_index("data") * jax.lax.axis_size("fsdp") + jax.lax.axis_index("fsdp")
    return index.astype(jnp.uint32)


def place(batch: Batch, mesh: Mesh) -> Batch:
    """Puts this process's rows of a batch (NumPy) on the mesh; returns the global batch."""
    sharding = NamedSharding(mesh, BATCH)
    put = lambda rows: jax.make_array_from_process_local_data(sharding, rows)  # noqa: E731
    return jax.tree.map(put, batch)


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Puts NumPy arrays and scalars, the same in all processes, on every device of the mesh."""
    sharding = NamedSharding(mesh, P())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    put = lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x))  # noqa: E731
    return jax.tree.map(put, tree)
