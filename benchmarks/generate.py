"""Times how fast texts are written: kd_jax against transformers' generate, on the CPU, in turns.

    python benchmarks/generate.py --model=$KD_JAX_DATA/../models/stories260K \
      --json=FILE

Both write --tokens tokens after each of --prompts prompts of --length random ids, greedily and
sampled at temperature 1 from the whole vocabulary; no text ends early. Each round runs one process
of each side; a process warms up, then takes the median of --calls calls; a side's figure is the
median of its rounds.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np

WAYS = {"greedy": 0.0, "sampled": 1.0}
SIDES = ("transformers", "kd_jax")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of an HF checkpoint")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--length", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new ones of each")
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(timed(args)))
        return
    found = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side, runs in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], f"--side={side}"]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.append(json.loads(out.splitlines()[-1]))
    rows = []
    for way in WAYS:
        seconds = {
            side: statistics.median(run[way] for run in runs) for side, runs in found.items()
        }
        for side, each in seconds.items():
            row = {"written": way, "system": side, "median_s": each, "rounds": found[side]}
            row |= {key: getattr(args, key) for key in ("prompts", "length", "tokens")}
            rows.append(row | {"ratio": each / seconds["kd_jax"]})
            print(f"{way}, {side}: {each:.4f} s, {each / seconds['kd_jax']:.2f} times kd_jax's")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def timed(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a call of one side, by way."""
    write = (of_kd_jax if args.side == "kd_jax" else of_transformers)(args)
    found = {}
    for way, temperature in WAYS.items():
        seconds = []
        for _ in range(args.calls + 2):
            start = time.perf_counter()
            shape = write(temperature)
            seconds.append(time.perf_counter() - start)
            assert shape == (args.prompts, args.tokens), shape
        found[way] = statistics.median(seconds[2:])
    return found


def prompts_of(args: argparse.Namespace, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, size, (args.prompts, args.length))


def of_kd_jax(args: argparse.Namespace):
    from kd_jax.cli import start_jax

    start_jax()
    import jax

    from kd_jax.models.generate import Sampling, generate
    from kd_jax.recipes.generate import checkpoint

    own, _ = checkpoint(args.model, None, "fp32")
    model = own.described.abstract().replace(params=jax.tree.map(jax.numpy.asarray, own.params))
    rows = prompts_of(args, own.described.config.vocab_size).tolist()

    def write(temperature: float) -> tuple[int, int]:
        found = generate(model, rows, Sampling(args.tokens, temperature))
        return np.stack(found).shape

    return write


def of_transformers(args: argparse.Namespace):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(args.model).eval()
    model.generation_config.eos_token_id = None
    rows = torch.tensor(prompts_of(args, model.config.vocab_size))
    fixed = dict(attention_mask=torch.ones_like(rows), max_new_tokens=args.tokens, pad_token_id=0)

    def write(temperature: float) -> tuple[int, int]:
        how = dict(temperature=temperature, top_k=0) if temperature else {}
        found = model.generate(rows, do_sample=bool(temperature), **fixed, **how)
        return tuple(found[:, args.length :].shape)

    return write


if __name__ == "__main__":
    main()
