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
