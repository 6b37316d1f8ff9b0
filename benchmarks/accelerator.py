"""Distillation on one GPU or TPU chip, in at most six minutes: kd_jax beside PyTorch.

    python benchmarks/accelerator.py --json=rows.json       # then: benchmarks/results.py benchmark
    python benchmarks/accelerator.py --tiny                 # the same code on a CPU, in a minute

Work: a step of BERT-base to 6 layers at 512 tokens, of GPT-2 to 6 layers at 1,024, and of
Qwen2.5-1.5B to 0.5B at 2,048; the loss of the last one alone; and greedy generation by
Qwen2.5-0.5B. A step is the teacher's forward pass, the student's forward and backward pass and an
AdamW update, in bf16, with cross-entropy and KL at T = 2. Weights are random: times do not depend
on them. PyTorch, where it finds a GPU: HF's modules with SDPA and a fused AdamW, compiled, with the
loss in chunks of rows; and with Liger's fused losses where liger_kernel is installed.

Every row runs in a process of its own, kd_jax's first; what six minutes do not suffice for is named
at the end. MFU is of the FLOPs that the mathematics needs (kd_jax/metrics/flops.py).
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from accelerator_cases import WORK

HERE = pathlib.Path(__file__).parent
SYSTEMS = {  # in the order of the table; what computes a row
    "kd_jax": ("accelerator_kd_jax.py",),
    "pytorch-compiled": ("accelerator_pytorch.py", "--compile"),
    "pytorch-eager": ("accelerator_pytorch.py",),
    "pytorch-liger": ("accelerator_pytorch.py", "--liger"),
}
NO_MEANING = "tiny shapes: these figures mean nothing"


def possible(tiny: bool) -> list[str]:
    """Names the systems that can run here; this process imports neither jax nor torch."""
    found = ["kd_jax"]
    if tiny:
        return [*found, "pytorch-eager"]
    gpu = any(pathlib.Path("/dev").glob("nvidia[0-9]*"))
    if gpu and importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        found += ["pytorch-compiled", "pytorch-eager"]
        found += ["pytorch-liger"] if importlib.util.find_spec("liger_kernel") else []
    return found


def launch(system: str, work: str, args: argparse.Namespace, seconds: float, cache: str) -> dict:
    """Runs one row in a process of its own: the JSON of its last line, or {"error"}."""
    script, *flags = SYSTEMS[system]
    command = [sys.executable, str(HERE / script), f"--work={work}", *flags]
    command += ["--tiny"] * args.tiny + ["--small"] * args.small
    environment = {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch"}
    environment |= {"JAX_PLATFORMS": "cpu"} if args.tiny else {}
    try:
        ran = subprocess.run(
            command,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=max(1.0, seconds),
        )
    except subprocess.TimeoutExpired:
        return {"error": "no time left"}
    if ran.returncode:
        lines = ran.stderr.strip().splitlines() or ["no message"]
        return {"error": lines[-1][:200]}
    return json.loads(ran.stdout.strip().splitlines()[-1])


def rows_of(found: dict[tuple[str, str], dict]) -> list[dict]:
    """Makes the rows of the table: speed, MFU, memory, and how many times faster kd_jax is."""
    rows = []
    for (work, system), row in found.items():
        kd_jax = found.get((work, "kd_jax"), {})
        flops, peak = kd_jax.get("flops"), kd_jax.get("peak_flops")
        mfu = flops / row["median_s"] / peak if flops and peak else None
        rows.append(
            {
                "accelerator": work,
                "system": system,
                "device": kd_jax.get("device", ""),
                "median_s": row["median_s"],
                "tokens_per_s": row["tokens"] / row["median_s"],
                "mfu": mfu,
                "peak_bytes": row["peak_bytes"],
                "ratio": row["median_s"] / kd_jax["median_s"] if kd_jax else 1.0,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU, to test this")
    parser.add_argument("--small", action="store_true", help="fewer rows, for chips of 16 GB")
    parser.add_argument("--work", action="append", choices=WORK, help="only this")
    parser.add_argument("--system", action="append", choices=SYSTEMS, help="only this")
    parser.add_argument("--minutes", type=float, default=6.0, help="to take at most")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    systems = args.system or possible(args.tiny)
    found, missing = {}, []
    with tempfile.TemporaryDirectory() as cache:
        for system in systems:
            for work in args.work or WORK:
                left = end - time.monotonic()
                row = launch(system, work, args, left, cache) if left > 5 else {}
                if "median_s" in row:
                    found[work, system] = row
                    print(f"{work}, {system}: {1e3 * row['median_s']:.1f} ms", flush=True)
                else:
                    missing.append(f"{work}, {system}: {row.get('error', 'no time left')}")
    rows = sorted(rows_of(found), key=lambda row: [*WORK].index(row["accelerator"]))
    for row in rows:
        mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
        speed = f"{row['tokens_per_s']:,.0f} tokens/s{mfu}, {row['peak_bytes'] / 1e9:.2f} GB"
        print(f"{row['accelerator']:9} {row['system']:17} {speed}, {row['ratio']:.2f} x kd_jax's")
    for each in missing:
        print(f"missing: {each}")
    if args.tiny:
        print(NO_MEANING)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(0 if found else 1)


if __name__ == "__main__":
    main()
