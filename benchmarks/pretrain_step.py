"""One distillation step, side by side: kd_jax and the same mathematics in PyTorch with HF modules.

    python benchmarks/pretrain_step.py --json=step.json
    python benchmarks/pretrain_step.py --device=gpu --steps=20 --json=step_h100.json

A step is the teacher's forward pass, the student's forward and backward pass with dropout, and an
AdamW update (cases.py has the shapes; both systems start from the same weights and batch). Every
row runs in a process of its own; rounds go through the rows in turn (rounds.py), so that a slow
spell of the machine falls on all of them, and a row's figure is the median over rounds of its
median step. PyTorch runs with and without kd_jax's settings of the allocator, and the better of
both counts. With --json the same command continues after an interruption.

ratio says how many times faster kd_jax is at the same precision: in a PyTorch row than this row,
in a kd_jax row than the better of PyTorch eager and compiled. "PyTorch" computes the logits of
every token and takes the losses at the masked ones, "PyTorch, gather" runs its head on the masked
ones alone; kd_jax's ratio is against the former. Peak memory is the process's on a CPU and the
device's on a GPU, where float32 products are TF32 in both systems.

Keep the machine idle: "others" is the share of it that other processes took meanwhile.
"""

import argparse
import collections
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping

import rich.progress
from cases import CASES, ON, TINY
from rounds import Rounds, measured, print_table, times

HERE = pathlib.Path(__file__).parent
PRECISIONS = ("fp32", "bf16")
SYSTEMS = {  # in the order of the table; what computes a row
    "kd_jax": ("kd_jax_step.py",),
    "pytorch-eager": ("pytorch_step.py",),
    "pytorch-compiled": ("pytorch_step.py", "--compile"),
    "pytorch-gather-eager": ("pytorch_step.py", "--gather-first"),
    "pytorch-gather-compiled": ("pytorch_step.py", "--gather-first", "--compile"),
}
LIKE_FOR_LIKE = ("pytorch-eager", "pytorch-compiled")

Row = tuple[str, str, str]  # case, system, precision


def launch(
    arguments: list[str],
    cache: pathlib.Path,
    device: str = "cpu",
    more: Mapping[str, str] = types.MappingProxyType({}),
    python: str = sys.executable,
) -> dict:
    """Runs a script of this folder and returns the JSON of its last line; `more` is added to its
    environment.

    This process imports neither jax nor torch: a child's ru_maxrss starts from its parent's size.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": {"cpu": "cpu", "gpu": "cuda"}[device],
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Later rounds need not compile again.
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        **more,
    }
    command = [python, str(HERE / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else {}


def measure(rows: list[Row], args: argparse.Namespace) -> tuple[Rounds, dict[str, float]]:
    """Results of every row, and the best FLOP/s of a matrix product a precision."""
    peaks = collections.defaultdict(float)
    tiny = ["--tiny"] * args.tiny
    with tempfile.TemporaryDirectory() as folder, rich.progress.Progress() as progress:
        cache = pathlib.Path(folder)
        bar = progress.add_task("", total=None)
        for case in {case: None for case, _, _ in rows}:
            shapes = [f"--case={case}", f"--dropout={args.dropout}", *tiny]
            launch(["hf_models.py", *shapes, f"--out={cache / case}"], cache)
        for precision in {precision: None for _, _, precision in rows}:
            product = ["matmul_peak.py", f"--precision={precision}", f"--device={args.device}"]
            for _ in range(args.rounds):
                found = launch(product + tiny, cache, args.device)
                peaks[precision] = max(peaks[precision], found["flops_per_second"])

        def child(row: Row, environment: Mapping[str, str]) -> dict:
            case, system, precision = row
            arguments = [
                *SYSTEMS[system],
                f"--case={case}",
                f"--precision={precision}",
                f"--models={cache / case}",
                f"--steps={args.steps}",
                f"--device={args.device}",
            ]
            return launch(arguments + tiny, cache, args.device, environment)

        group, both = lambda row: (row[0], row[2]), not args.tiny and args.device == "cpu"
        rounds = measured(args, rows, seconds_of, child, group, (progress, bar), both)
    return rounds, peaks


def seconds_of(row: Row, runs: list[dict]) -> float:
    """A row's step: the median over rounds of its median step."""
    return statistics.median(statistics.median(run["seconds"]) for run in runs)


def summarise(rounds: Rounds, peaks: dict[str, float], tiny: bool) -> list[dict]:
    """One dict a row, as --json writes them."""
    results = rounds.better()
    seconds = {row: seconds_of(row, runs) for row, runs in results.items()}
    summary = []
    for (case, system, precision), runs in results.items():
        row_seconds = seconds[case, system, precision]
        shapes = (TINY if tiny else CASES)[case]
        if system == "kd_jax":
            others = [seconds.get((case, other, precision)) for other in LIKE_FOR_LIKE]
            pytorch = min((s for s in others if s), default=None)
            ratio = pytorch and pytorch / row_seconds
        else:
            kd_jax = seconds.get((case, "kd_jax", precision))
            ratio = kd_jax and row_seconds / kd_jax
        summary.append(
            {
                "case": case,
                "system": system,
                "precision": precision,
                "median_s": row_seconds,
                "tokens_per_s": shapes.rows * shapes.tokens / row_seconds,
                "ratio": ratio,
                "matmul_peak_share": shapes.flops() / row_seconds / peaks[precision],
                "last_loss": statistics.median(run["losses"][-1] for run in runs),
            }
            | rounds.about((case, system, precision), runs)
        )
    return summary


def show(summary: list[dict], peaks: dict[str, float]) -> None:
    labels = "case", "system", "precision"
    found = [
        (
            row,
            [
                *(row[label] for label in labels),
                f"{row['median_s']:.3f}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['matmul_peak_share']:.0%}",
                times(row["ratio"]),
                f"{row['last_loss']:.4f}",
            ],
        )
        for row in summary
    ]
    headings = "s/step", "tokens/s", "of peak", "ratio", "loss"
    print_table("One distillation step", labels, headings, found, sections=1)
    shown = ", ".join(f"{name} {peak / 1e9:,.0f} GFLOP/s" for name, peak in peaks.items())
    print(f"Measured matmul peak: {shown}; {os.cpu_count()} cores")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=ON, default="cpu")
    parser.add_argument("--case", choices=CASES, help="only this one")
    parser.add_argument("--rows", default="", help="only these, as SYSTEM or SYSTEM-PRECISION,...")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of a row")
    parser.add_argument("--dropout", type=float, default=0.1, help="with 0 all losses must agree")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to test the benchmark")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    args = parser.parse_args()

    rows = [
        (case, system, precision)
        for case in ([args.case] if args.case else ON[args.device])
        for precision in PRECISIONS
        for system in SYSTEMS
        if case.startswith("mlm")
        or "gather" not in system  # every position of the CLM case is supervised
    ]
    if args.rows:
        wanted = set(args.rows.split(","))
        names = {name for _, s, p in rows for name in (s, f"{s}-{p}")}
        if wanted - names:
            parser.error(f"--rows: unknown {sorted(wanted - names)}; have {sorted(names)}")
        rows = [(c, s, p) for c, s, p in rows if {s, f"{s}-{p}"} & wanted]
    rounds, peaks = measure(rows, args)
    summary = summarise(rounds, peaks, args.tiny)
    show(summary, peaks)
    rounds.finish(summary, args.json)


if __name__ == "__main__":
    main()
