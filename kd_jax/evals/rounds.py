"""Rounds of a sequential ensemble: a row of rounds.csv each, with the field's column names."""

import csv
from typing import Any

from etils import epath

COLUMNS = (
    "round",
    "teacher_eval_loss",
    "ensemble_eval_loss",
    "student_eval_loss",
    "ensemble_size",
    "round_duration_minutes",
    "total_elapsed_minutes",
    "ensemble_perplexity",
    "student_perplexity",
    "ensemble_kl",
    "student_kl",
    "ensemble_agreement",
    "student_agreement",
    "ensemble_parameters",
    "gain",
)


def rows(teacher: dict[str, Any], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a round. gain: by how much the ensemble's loss is lower than a round before."""
    made, elapsed, before = [], 0.0, None
    for each in found:
        elapsed += each["minutes"]
        row = {
            "round": each["round"],
            "teacher_eval_loss": teacher["loss"],
            "ensemble_size": each["members"],
            "round_duration_minutes": each["minutes"],
            "total_elapsed_minutes": round(elapsed, 2),
            "ensemble_parameters": each["ensemble"]["parameters"],
            "gain": "" if before is None else before - each["ensemble"]["loss"],
        }
        for who in ("ensemble", "student"):
            row[f"{who}_eval_loss"] = each[who]["loss"]
            row |= {f"{who}_{key}": each[who][key] for key in ("perplexity", "kl", "agreement")}
        before = each["ensemble"]["loss"]
        made.append({column: row[column] for column in COLUMNS})
    return made


def write(folder: epath.Path, teacher: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """rounds.csv, written beside its place and renamed."""
    path = folder / "rounds.csv"
    temporary = path.with_name("rounds.csv.tmp")
    with temporary.open("w") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows(teacher, found))
    temporary.replace(path)
