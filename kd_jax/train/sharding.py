"""Makes the device mesh, and places parameters and batches on it.

The axes are those of kd_jax/axes.py: `data`, plain data parallelism like PyTorch's DDP; `fsdp`,
over which parameters, gradients and optimizer moments are split as well; `model`, over which the
work on a row is split. Gradients are computed per device inside `shard_map`, so that the only
collectives are those written down: modules gather parameters where they use them, and sum the
gradients of these parts there; `reduce` sums the rest.
"""

import collections
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import axes
from kd_jax.errors import UserError
from kd_jax.tensors import LazyTensor
from kd_jax.types import Batch, Params

BATCH = P(axes.ROWS)  # rows of a batch over all devices, but those along `model`
Table = tuple[tuple[str, P], ...]


def make_mesh(fsdp: int = 1, devices: list | None = None, model: int = 1) -> Mesh:
    """Makes a mesh data x fsdp x model over `devices` (all by default).

    Raises UserError if `fsdp` x `model` does not divide the number of devices, or `model` the
    number of each process's.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or model < 1 or len(devices) % (fsdp * model):
        sizes = f"mesh.fsdp={fsdp}" + (f" x mesh.model={model}" if model != 1 else "")
        verb = "do" if model != 1 else "does"
        raise UserError(f"{sizes} {verb} not divide the {len(devices)} devices")
    own = collections.Counter(device.process_index for device in devices)
    if any(count % model for count in own.values()):
        raise UserError(
            f"mesh.model={model} does not divide the {min(own.values())} devices of a process, "
            f"which share their rows"
        )
    shape = (len(devices) // (fsdp * model), *_rings(devices, fsdp), model)
    placed = _placed(devices, shape)
    return Mesh(placed, axes.AXES, axis_types=(AxisType.Auto,) * len(axes.AXES))


def _rings(devices: list, fsdp: int) -> tuple[int, int]:
    """Divides `fsdp` into two axes, each along one dimension of a TPU slice's torus, where that is
    possible; elsewhere the second one is 1."""
    coords = np.array([getattr(device, "coords", (0,)) for device in devices])
    sides = sorted(np.ptp(coords, axis=0) + 1, reverse=True)
    fitting = [int(side) for side in sides if side > 1 and fsdp % side == 0]
    first = fitting[0] if fitting and fitting[0] < fsdp else fsdp
    return first, fsdp // first


def _placed(devices: list, shape: tuple[int, ...]) -> np.ndarray:
    """Arranges devices so that neighbors on an axis are neighbors in a TPU's torus, as long as each
    process keeps consecutive rows of a batch; elsewhere in their order."""
    if hasattr(devices[0], "coords"):
        found = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        processes = [device.process_index for device in found.flat]
        if processes == sorted(processes):
            return found
    return np.asarray(devices).reshape(shape)


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
    """Finds the PartitionSpecs of `params`. A spec is that of an array's last dimensions (stacked
    parameters have more); a dimension that its axes do not divide is not split over the last of
    them."""

    def fitting(spec, leaf):
        names = (None,) * (len(leaf.shape) - len(spec)) + tuple(spec)
        split = [_fitting(n, d, mesh) for n, d in zip(names, leaf.shape, strict=True)]
        return P(*split) if any(split) else P()

    specs = match(table, params, "sharding table")
    return jax.tree.map(fitting, specs, params)


def _fitting(names: Any, size: int, mesh: Mesh) -> tuple[str, ...] | None:
    """Chooses the axes over which a dimension is split: those that are not of size 1, if all of
    them together divide it; of tables over `model` and `fsdp` perhaps `model` alone."""
    names = tuple(name for name in _names(names) if mesh.shape[name] > 1)
    while names and size % math.prod(mesh.shape[name] for name in names):
        names = tuple(name for name in names if name == axes.MODEL) if len(names) > 1 else ()
    return names or None


def _names(entry: Any) -> tuple[str, ...]:
    """Lists the axes in an entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def shardings(specs: Any, mesh: Mesh) -> Any:
    """Makes NamedShardings of a tree of PartitionSpecs."""
    return jax.tree.map(functools.partial(NamedSharding, mesh), specs)


def reduce(grads: Params, specs: Params) -> Params:
    """Sums all devices' gradients of the parameters that each of them holds; inside shard_map.
    Modules have summed those of parts over the devices with which they share them."""

    def summed(spec, grad):
        split = {name for names in spec for name in _names(names)}
        return axes.total(grad, tuple(axis for axis in axes.ROWS if axis not in split))

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
        models: `Model`s or other pytrees of `params`, sharded by `table`: each device has its
            parts, which modules gather where they need them; None stays None.
        numbers: arguments that are equal on all devices.
        out: the layout of results: BATCH for rows, P() for equal ones; or a tree of these.
    """
    parts = [None if model is None else model.params for model in models]
    specs = [param_specs(table, params, mesh) for params in parts]

    def local(parts, *rest):
        pairs = zip(models, parts, strict=True)
        given = [None if model is None else model.replace(params=own) for model, own in pairs]
        return run(*given, *rest)

    in_specs = (specs, BATCH, *[P()] * len(numbers))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out, check_vma=False)
    return mapped(parts, batch, *numbers)


def put(params: Params, specs: Params, mesh: Mesh) -> Params:
    """Puts parameters on the mesh: lazy tensors, of which each process reads only its own parts,
    NumPy arrays that are the same in all processes, or arrays on any devices."""

    def placed(leaf, sharding):
        local = getattr(leaf, "is_fully_addressable", False)
        if isinstance(leaf, jax.Array) and (sharding.is_fully_addressable or not local):
            return jax.device_put(leaf, sharding)
        # jax.device_put would send whole arrays to all processes, to compare them.
        read = leaf.read if isinstance(leaf, LazyTensor) else np.asarray(leaf).__getitem__
        parts: dict[str, np.ndarray] = {}  # of which several devices have the same

        def part(index):
            if str(index) not in parts:
                parts[str(index)] = read(index)
            return parts[str(index)]

        return jax.make_array_from_callback(leaf.shape, sharding, part, dtype=leaf.dtype)

    return jax.tree.map(placed, params, shardings(specs, mesh))


def to_host(params: Params) -> Params:
    """Copies whole parameters, which may be split over processes, to this host; all processes call
    this together."""
    return jax.tree.map(whole, params)


def whole(leaf: Any) -> np.ndarray:
    """Copies a whole parameter, which may be split over processes, to this host; all processes call
    this together."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def gathered(params: Params) -> Params | None:
    """Copies whole parameters to the host of the first process, one by one; None in the others. All
    processes call this together."""
    if jax.process_index() == 0:
        return jax.tree.map(whole, params)
    for leaf in jax.tree.leaves(params):
        take_part(leaf)
    return None


def take_part(leaf: Any) -> np.ndarray:
    """Helps the first process to copy a whole parameter that is split over processes."""
    return whole(leaf) if isinstance(leaf, jax.Array) else np.empty(0)


def num_parts(mesh: Mesh) -> int:
    """Counts the parts into which a batch's rows are cut."""
    return mesh.size // mesh.shape[axes.MODEL]


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
