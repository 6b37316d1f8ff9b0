"""Writes a run directory as the pretrain recipe leaves it, with made-up figures."""

import csv
import json
from pathlib import Path

STAGES = {"teacher": 2.0, "baseline": 3.0, "student": 2.5}  # loss on the test split


def write(workdir: Path, seed: int = 0, weight: float = 0.5, shift: float = 0.0) -> Path:
    """`shift` is added to the losses; the student's moves with the seed too (seed / 10)."""
    workdir.mkdir(parents=True)
    config = {"recipe": "pretrain", "seed": seed, "objective": {"kl": {"weight": weight}}}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "command.txt").write_text("python -m kd_jax.main --config=configs/example.py\n")
    stages = {}
    for stage, loss in STAGES.items():
        loss += shift + (seed / 10 if stage == "student" else 0)
        stages[stage] = figures(loss, teacher=stage == "teacher")
        terms = ["ce", "kl"] if stage == "student" else ["ce"]
        names = [name for term in terms for name in (term, f"{term}_weighted")]
        to_teacher = [] if stage == "teacher" else ["kl_t1"]
        header = ["step", "loss", *names, *to_teacher, "learning_rate", "grad_norm"]
        _csv(
            workdir / stage / "metrics.csv",
            header,
            [[10 * i] + [loss + 9 / (i + 1)] * (len(header) - 1) for i in range(20)],
        )
        _csv(
            workdir / stage / "eval.csv",
            ["step", "loss", "perplexity", "accuracy", "kl", "agreement"],
            [[i, loss, 10 * loss, 0.5, *([1, 1] if to_teacher else ["", ""])] for i in (0, 50)],
        )
    results = {
        "config": "example",
        "config_hash": "0123abcd",
        "commit": "89abcdef",
        "seed": seed,
        "split": "test",
        "stages": stages,
    }
    (workdir / "results.json").write_text(json.dumps(results))
    return workdir


ACCURACY = {"teacher": 0.92, "baseline": 0.86, "student": 0.88}
CLASSES = ("World", "Sports", "Business", "Sci/Tech")


def write_classifier(workdir: Path, seed: int = 0, weight: float = 0.5, gain: float = 0.0) -> Path:
    """A fine-tuning run; `gain` is added to the student's accuracy, which moves with the seed."""
    workdir.mkdir(parents=True)
    config = {"recipe": "finetune", "seed": seed, "task": {"name": "agnews"}}
    config |= {"objective": {"ce": {"weight": 1.0}, "kl": {"weight": weight, "temperature": 4.0}}}
    (workdir / "config.json").write_text(json.dumps(config))
    stages = {}
    for stage, accuracy in ACCURACY.items():
        accuracy += seed / 500 + (gain + seed / 1000 if stage == "student" else 0)
        stages[stage] = classifier(accuracy, teacher=stage == "teacher")
        names = ["ce_weighted", "kl_weighted"] if stage == "student" else ["ce_weighted"]
        _csv(
            workdir / stage / "metrics.csv",
            ["step", "loss", *names, "learning_rate"],
            [[i, *[1 / (i + 1 + j) for j in range(2 + len(names))]] for i in range(30)],
        )
        _csv(
            workdir / stage / "eval.csv",
            ["step", "loss", "accuracy", "macro_f1"],
            [[i, 1 / (i + 1), accuracy - 0.1 / (i + 1), accuracy - 0.01] for i in (10, 20, 30)],
        )
    results = {
        "config": "agnews",
        "config_hash": "0123abcd",
        "commit": "89abcdef",
        "seed": seed,
        "task": "agnews",
        "primary": "accuracy",
        "split": "test",
        "machine": {"platform": "cpu", "cpu": "A Processor", "cores": 2},
        "seconds": 90.0,
        "stages": stages,
    }
    (workdir / "results.json").write_text(json.dumps(results))
    return workdir


def classifier(accuracy: float, teacher: bool) -> dict:
    """A stage's entry of results.json, for 4 classes of 1,000 examples."""
    right = round(1000 * accuracy)
    wrong = [round((1000 - right) * share) for share in (0.5, 0.3)]
    wrong.append(1000 - right - sum(wrong))
    confusion = [[*wrong[:i], right, *wrong[i:]] for i in range(4)]
    return {
        "loss": 1 - accuracy,
        "accuracy": accuracy,
        "macro_f1": accuracy - 0.001,
        "kl": None if teacher else 0.1,
        "agreement": None if teacher else 0.9,
        "classes": {
            name: {
                "precision": accuracy,
                "recall": accuracy + 0.001 * i,
                "f1": accuracy + 0.0005 * i,
                "support": 1000,
            }
            for i, name in enumerate(CLASSES)
        },
        "confusion": confusion,
        "parameters": 109_000_000 if teacher else 66_362_880,
        "size_mb": 438.0 if teacher else 253.15,
        "flops_per_sample": 2.2e10 if teacher else 1.1e10,
        "latency_ms": 40.0 if teacher else 20.0,
        "throughput": 60.0 if teacher else 120.0,
        "steps": 200,
        "best_step": 150,
    }


def figures(loss: float, teacher: bool) -> dict:
    """A stage's entry of results.json."""
    return {
        "loss": loss,
        "perplexity": 10 * loss,
        "accuracy": 0.5,
        "kl": None if teacher else 1.0,
        "agreement": None if teacher else 0.75,
        "parameters": 66_362_880,
        "size_mb": 253.15,
        "tokens_per_second": 12_345.6,
        "steps": 200,
        "best_step": 150,
    }


def _csv(path: Path, header: list[str], rows: list[list]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
