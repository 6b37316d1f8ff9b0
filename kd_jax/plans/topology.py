"""Describes accelerators to compile for without having them: TPU slices, the GPUs of a machine.

XLA's compilers run anywhere. libtpu holds the one for TPUs; for NVIDIA GPUs jax[cuda12] needs a
description of the chip, h100.txtpb or h200.txtpb (XLA's device description of the SXM boards).

Call `devices` in a process whose environment holds ENVIRONMENT from its start: libtpu looks for a
real TPU otherwise, and JAX for a GPU.
"""

import dataclasses
import importlib.resources
import importlib.util
import math

import jax
from jax.experimental import topologies

from kd_jax.errors import UserError

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # nothing runs on what is compiled for
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask for a TPU
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock file keeps a TPU to one process
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # no driver to ask for its version
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of connected chips of one kind."""

    name: str  # such as v5e:4x4
    chips: int
    memory_bytes: int  # of one chip
    peak_flops: float  # bf16 FLOP/s of one chip, dense
    bandwidth: float  # bytes/s of one chip's memory

    @property
    def platform(self) -> str:
        """Names the platform as precision.policy_for does: gpu or tpu."""
        return "gpu" if self.name.startswith("h") else "tpu"

    @property
    def compiler_options(self) -> dict[str, str]:
        """Returns options for `lowered.compile()`: no kernels can be timed without a GPU."""
        return {"xla_gpu_autotune_level": "0"} if self.platform == "gpu" else {}


_SHAPES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_GPUS = ("1", "2", "4", "8")
# Memory, bf16 FLOP/s without sparsity and memory bandwidth of a chip, as Google and NVIDIA (SXM)
# state them; the numbers of chips that are connected.
_CHIPS = {
    "v5e": (16 * 2**30, 197e12, 819e9, _SHAPES_2D),
    "v6e": (32 * 2**30, 918e12, 1640e9, _SHAPES_2D),
    "v5p": (95 * 2**30, 459e12, 2765e9, ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")),
    "h100": (84_942_979_072, 989e12, 3352e9, _GPUS),
    "h200": (150_754_820_096, 989e12, 4917e9, _GPUS),
}


def names() -> list[str]:
    """Lists the names of all topologies."""
    return [f"{chip}:{shape}" for chip, (*_, shapes) in _CHIPS.items() for shape in shapes]


def find(name: str) -> Topology:
    """Finds a topology by its name. Raises UserError listing all names."""
    if name not in names():
        have = "; ".join(f"{chip}:{{{','.join(shapes)}}}" for chip, (*_, shapes) in _CHIPS.items())
        raise UserError(f"unknown topology {name!r}; have: {have}")
    chip, _, shape = name.partition(":")
    return Topology(name, math.prod(map(int, shape.split("x"))), *_CHIPS[chip][:3])


def devices(topology: Topology) -> list[jax.Device]:
    """Makes devices for `jit(...).lower(...).compile()`, which cannot run anything.

    Raises UserError naming the extra to install where the compiler is missing.
    """
    if topology.platform == "gpu":
        _need("jax_cuda12_plugin", "cuda", topology)
        file = f"{topology.name.partition(':')[0]}.txtpb"
        chip = importlib.resources.files(__package__).joinpath(file).read_text()
        found = topologies.get_topology_desc(
            "", platform="cuda", target_config=chip, topology=f"1x1x{topology.chips}"
        )
    else:
        _need("libtpu", "tpu", topology)
        found = topologies.get_topology_desc(topology.name, platform="tpu")
    return list(found.devices)


def _need(module: str, extra: str, topology: Topology) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"compiling for {topology.name} needs {module}: pip install 'kd_jax[{extra}]'"
        )
