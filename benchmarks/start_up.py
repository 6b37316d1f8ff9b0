"""Measures the memory and time that weights take at the start of a run of two processes.

    python benchmarks/start_up.py [--layers=24 --width=1024] [--precision=fp32] [--json=FILE]

A GPT-2 of random weights (336 million by default) is written once, float32 safetensors. Two
processes with a CPU device each, on a mesh with fsdp=2, open it as a frozen teacher, then make a
student of half its layers from it (without an optimizer). Each reports seconds and the growth of
its anonymous memory, polled: pages of the file that are mapped belong to the system's cache and do
not count (they are given as well). Growth is in units of the whole model in float32. The sums
of all absolute values tell whether parameters are those of the file.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 16_000


def write(folder: Path, layers: int, width: int) -> None:
    """Writes a checkpoint of random weights."""
    from kd_jax.models import family, hf
    from kd_jax.precision import Policy

    sizes = dict(n_embd=width, n_head=width // 64, n_layer=layers, n_positions=1024)
    kind, config = family.read({"model_type": "gpt2", "vocab_size": VOCABULARY} | sizes)
    rng, params = np.random.default_rng(0), family.abstract(kind, config, "clm", Policy()).params
    flat = {
        path: rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02)
        for path, leaf in family.flatten(params).items()
    }
    hf.save(folder, family.unflatten(flat, params), kind, config, "clm")


def memory(key: str) -> int:
    """This process's bytes: RssAnon or RssFile."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


@contextlib.contextmanager
def watched(whole: int) -> Iterator[dict[str, float]]:
    """Measures a block: seconds, and the growth of memory as a share of `whole` bytes."""
    found: dict[str, float] = {}
    keys, done = ("RssAnon", "RssFile"), threading.Event()
    start = {key: memory(key) for key in keys}
    peak = dict(start)

    def poll() -> None:
        while not done.wait(0.002):
            peak.update({key: max(peak[key], memory(key)) for key in keys})

    thread = threading.Thread(target=poll)
    thread.start()
    began = time.perf_counter()
    yield found
    found["seconds"] = round(time.perf_counter() - began, 2)
    done.set()
    thread.join()
    for key in keys:
        found[key] = round((peak[key] - start[key]) / whole, 3)


def work(folder: Path, layers: int, precision: str) -> dict[str, Any]:
    """One process's part: the teacher, and a student made from it."""
    import jax
    import jax.numpy as jnp
    import optax
    from ml_collections import ConfigDict

    from kd_jax.models import blueprint, family
    from kd_jax.models.blueprint import count
    from kd_jax.precision import policy_for
    from kd_jax.run import stage, teaching
    from kd_jax.train import sharding, state

    policy = policy_for(precision, "cpu")
    section = ConfigDict({"model": str(folder), "revision": "", "architecture": {}})
    teacher = blueprint.describe(section, "teacher", "clm", policy)
    small = ConfigDict({"model": "", "revision": "", "architecture": {"n_layer": layers // 2}})
    student = blueprint.describe(small, "student", "clm", policy, base=teacher.hf_json)
    sections = {"teacher": section, "student": ConfigDict({"init": "teacher", "layers": "uniform"})}
    run = SimpleNamespace(
        mesh=sharding.make_mesh(jax.device_count()),
        policy=policy,
        models={"teacher": teacher, "student": student},
        section=sections.get,
        config=SimpleNamespace(seed=0),
        order=lambda name: None,
    )
    made = SimpleNamespace(model="student", after="")
    add = jax.jit(lambda params: sum(jnp.abs(x).sum() for x in jax.tree.leaves(params)))
    with watched(4 * count(teacher.abstract().params)) as of_teacher:
        given = teaching.given_params(run, "teacher")
        model = teaching.frozen(run, "teacher", given)
        jax.block_until_ready(model.params)
    total = float(add(model.params))
    del model
    with watched(4 * count(teacher.abstract().params)) as of_student:
        init, inputs = stage.initial_params(run, made, {"teacher": given}, jax.random.key(0))
        born = state.create(
            lambda inputs: {"student": init(inputs), "objective": {}},
            inputs,
            student.abstract().graphdef,
            lambda params: optax.identity(),
            family.PARTITION,
            run.mesh,
        )
        jax.block_until_ready(born.params)
    sums = {"teacher": total, "student": float(add(born.params))}
    return {"teacher": of_teacher, "student": of_student, "sums": sums}


def measure(layers: int, width: int, precision: str = "fp32") -> list[dict[str, Any]]:
    """Runs both processes: what each reports."""
    with tempfile.TemporaryDirectory(prefix="start_up_") as place:
        folder = Path(place, "model")
        sizes = [f"--layers={layers}", f"--width={width}", f"--precision={precision}"]
        command = [sys.executable, __file__, f"--folder={folder}", *sizes]
        # glibc gives every free page back, so that what is counted is in use.
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
        }
        subprocess.run(command, env=environment, check=True)
        with socket.create_server(("", 0)) as server:
            at = f"--coordinator=127.0.0.1:{server.getsockname()[1]}"
        processes = [
            subprocess.Popen(
                [*command, at, f"--process_id={i}"], env=environment, stdout=subprocess.PIPE
            )
            for i in range(2)
        ]
        try:
            outputs = [process.communicate(timeout=600)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(process.returncode for process in processes):
            raise RuntimeError("a process failed, see above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24, help="of the teacher")
    parser.add_argument(
        "--width", type=int, default=1024, help="of the teacher, 64 times its heads"
    )
    parser.add_argument("--precision", default="fp32", help="fp32 or bf16")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON")
    for name in ("folder", "coordinator", "process_id"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.coordinator:
        import jax

        jax.distributed.initialize(args.coordinator, 2, int(args.process_id))
        print(json.dumps(work(Path(args.folder), args.layers, args.precision)))
        return
    if args.folder:
        write(Path(args.folder), args.layers, args.width)
        return
    report = {key: getattr(args, key) for key in ("layers", "width", "precision")}
    report["processes"] = measure(args.layers, args.width, args.precision)
    print(json.dumps(report, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
