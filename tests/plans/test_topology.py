import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kd_jax.errors import UserError
from kd_jax.plans import topology

CHIPS = {"v5e": "4x4", "v6e": "4x4", "v5p": "2x2x1", "h100": "8", "h200": "8"}
FOLDER = Path(topology.__file__).parent
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from kd_jax.plans import compiled, topology

found = topology.find(sys.argv[1])
devices = topology.devices(found)
mesh = Mesh(np.array(devices), ("data",))

def local(w_LDD, x_BTD):
    def loss(w_LDD):
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BTD, w_LDD)[0]
        q_BTHK = x.reshape(*x.shape[:2], 4, -1)
        scores_BHTS = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q_BTHK, q_BTHK))
        return jnp.sum(jnp.einsum("bhts,bshk->bthk", scores_BHTS, q_BTHK).astype(jnp.float32) ** 2)
    return jax.lax.psum(jax.grad(loss)(w_LDD), "data")

step = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
shape = lambda dims, spec: jax.ShapeDtypeStruct(
    dims, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
lowered = jax.jit(step).lower(
    shape((5, 256, 256), P()), shape((2 * len(devices), 128, 256), P("data")))
made = lowered.compile(compiler_options=found.compiler_options)
cost = compiled.cost(made.as_text())
same = [topology.find(name) for name in topology.names()]
same = [each for each in same if each.platform == found.platform]
print(json.dumps(dict(
    devices=len(devices), platform=devices[0].platform, flops=cost.flops,
    sizes={each.name: len(topology.devices(each)) for each in same},
    bytes=cost.bytes_by_kind(), unbounded=cost.unbounded,
    arguments=made.memory_analysis().argument_size_in_bytes)))
"""


def compile_for(name):
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, name],
        env={**os.environ, **topology.ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def check(found, chips):
    assert found["devices"] == chips
    assert found["unbounded"] == []
    layer, scores = 2 * 2 * 128 * 256 * 256, 2 * 2 * 128 * 128 * 256
    assert found["flops"] == 3 * (5 * layer + 2 * scores)
    assert found["bytes"] == {"all-reduce": 5 * 256 * 256 * 2}
    assert found["arguments"] >= 5 * 256 * 256 * 2 + 2 * 128 * 256 * 2


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu")
def test_tpu(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # libtpu refuses flags that it does not know
    found = compile_for("v5e:2x4")
    assert found["platform"] == "tpu"
    assert found["sizes"] == {name: topology.find(name).chips for name in found["sizes"]}
    assert {"v5e:1x1", "v5e:4x4", "v6e:16x16", "v5p:4x4x4"} <= set(found["sizes"])
    check(found, 8)


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="no jax[cuda12]")
def test_h100():
    found = compile_for("h100:8")
    assert found["platform"] == "gpu"
    check(found, 8)


def test_names():
    assert {"v5e:4x4", "v6e:4x4", "h100:8"} <= set(topology.names())
    found = topology.find("v5e:4x4")
    assert (found.chips, found.platform, found.compiler_options) == (16, "tpu", {})
    assert topology.find("h100:8").chips == 8
    assert topology.find("h100:8").platform == "gpu"


def test_facts_of_chips():
    chips = {name: topology.find(f"{name}:{shape}") for name, shape in CHIPS.items()}
    assert {name: chip.memory_bytes // 2**30 for name, chip in chips.items()} == {
        **{"v5e": 16, "v6e": 32, "v5p": 95, "h100": 79, "h200": 140}
    }
    ridges = {name: round(chip.peak_flops / chip.bandwidth) for name, chip in chips.items()}
    assert ridges == {"v5e": 241, "v6e": 560, "v5p": 166, "h100": 295, "h200": 201}


@pytest.mark.parametrize("chip", ["h100", "h200"])
def test_a_gpu_is_described_as_the_table_has_it(chip):
    text = (FOLDER / f"{chip}.txtpb").read_text()
    facts = {key: int(value) for key, value in re.findall(r"(\w+): (\d+)$", text, re.M)}
    found = topology.find(f"{chip}:8")
    assert facts["device_memory_size"] == found.memory_bytes
    assert facts["memory_bandwidth"] == pytest.approx(found.bandwidth, rel=1e-3)
    assert found.platform == "gpu"


@pytest.mark.parametrize("name", ["v5e", "v5e:3x3", "h300:8", ""])
def test_an_unknown_topology_lists_what_exists(name):
    with pytest.raises(UserError, match=re.escape(f"unknown topology {name!r}; have: v5e:{{1x1,")):
        topology.find(name)


@pytest.mark.parametrize("name, extra", [("v5e:4x4", "tpu"), ("h100:8", "cuda")])
def test_a_missing_compiler_names_the_extra(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=re.escape(f"pip install 'kd_jax[{extra}]'")):
        topology.devices(topology.find(name))
