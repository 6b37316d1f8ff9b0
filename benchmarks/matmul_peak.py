"""Prints the fastest matrix product seen on this machine, in FLOP/s, as one line of JSON.

The better of PyTorch's and XLA's, so that a share of it is one yardstick for both.
"""

import argparse
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def best_seconds(product: Callable[[], object], repeats: int = 20) -> float:
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])  # the first one compiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", required=True, choices=DTYPES)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    size = 128 if args.tiny else {"cpu": 2048, "gpu": 8192}[args.device]
    gpu = args.device == "gpu"
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as in JAX; nothing on CPU

    a_torch, b_torch = torch.randn(
        *(2, size, size),
        dtype=getattr(torch, DTYPES[args.precision]),
        device="cuda" if gpu else "cpu",
    )
    a_jax, b_jax = jax.random.normal(jax.random.key(0), (2, size, size), DTYPES[args.precision])
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    seconds = min(
        best_seconds(lambda: (a_torch @ b_torch, gpu and torch.cuda.synchronize())),
        best_seconds(lambda: multiply(a_jax, b_jax).block_until_ready()),
    )
    print(json.dumps({"flops_per_second": 2 * size**3 / seconds}))


if __name__ == "__main__":
    main()
