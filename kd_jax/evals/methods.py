"""Ways to a small model beside each other, as scored by likelihood in several runs, a seed each.

    python -m kd_jax.evaluate --workdir=RUN --task=perplexity --data=FILE --json=RUN/perplexity.json
    python -m kd_jax.evaluate --workdir=RUN --task=hellaswag --json=RUN/hellaswag.json

"Likelihoods apart" is the mean |difference| of an ending's log-likelihood from the original's.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_jax import storage
from kd_jax.evals import quantities, table
from kd_jax.evals.quantities import Figure
from kd_jax.evals.table import Table

TASKS = ("perplexity", "hellaswag")
NAMES = {
    "teacher": "original",
    "substitute": "substitution",
    "prune": "L1 pruning, fine-tuned",
    "student": "distillation",
}
_PERPLEXITY = Figure("perplexity", "perplexity", "{:.3f}".format, -1)
_APART = Figure("apart", "likelihoods apart (nats)", "{:.3f}".format, -1)
_LEFT_OUT = ("model", "stage", "commit", "machine", "seconds", "batch_size")

Results = Mapping[str, Any]  # of a run: "seed", "stages", "scores"
Figures = dict[str, Any]


def scores(workdir: Path) -> dict[str, dict[str, Figures]]:
    """Task -> stage -> figures, of RUN/TASK.json; empty where a task was not scored of all stages
    together."""
    found = {}
    for task in TASKS:
        file = Path(workdir) / f"{task}.json"
        stages = storage.read_json(file).get("stages") if file.exists() else None
        if not stages:
            return {}
        found[task] = {stage: _kept(figures) for stage, figures in stages.items()}
    return found


def _kept(figures: Mapping[str, Any]) -> Figures:
    return {key: value for key, value in figures.items() if key not in _LEFT_OUT}


def together(*groups: Sequence[Results]) -> list[dict[str, Figures]]:
    """For each seed, stage -> figures; a stage of a later group replaces an earlier one's."""
    found: dict[int, dict[str, Figures]] = {}
    for run in (run for group in groups for run in group):
        for stage, score in run["scores"]["perplexity"].items():
            choices = run["scores"]["hellaswag"][stage]
            effort = run["stages"].get(stage, {})
            found.setdefault(run["seed"], {})[stage] = {
                "steps": effort.get("steps"),
                "training_flops": effort.get("training_flops"),
                "parameters": score["parameters"],
                "perplexity": score["perplexity"],
                "apart": choices.get("beside_teacher", {}).get("mean_difference"),
                "acc": choices["acc"],
                "acc_interval": choices["acc_interval"],
            }
    return list(found.values())


def of_runs(title: str, runs: Sequence[Mapping[str, Figures]]) -> Table:
    """A row for each way, means over the seeds ± standard deviation. The interval of an accuracy is
    that of one run (the mean of Wilson's bounds): all seeds answer the same questions."""
    rows = []
    for stage in (stage for stage in NAMES if stage in runs[0]):
        each = [run[stage] for run in runs]
        first = each[0]
        low, high = zip(*(one["acc_interval"] for one in each), strict=True)
        accuracy, low, high = map(statistics.fmean, ([one["acc"] for one in each], low, high))
        trained = first["training_flops"]
        rows.append(
            [
                *(NAMES[stage], f"{first['parameters']:,}"),
                f"{first['steps']:,}" if first["steps"] else "",
                f"{trained / 1e12:,.2f}" if trained else "",
                table.mean(_PERPLEXITY, each),
                "" if stage == "teacher" else table.mean(_APART, each),
                f"{accuracy:.3f} ({low:.3f} to {high:.3f})",
            ]
        )
    header = ["model", "parameters", "steps", "operations of training (T)"]
    return Table(title, [*header, _PERPLEXITY.title, _APART.title, "HellaSwag (95%)"], rows)


def findings(runs: Sequence[Mapping[str, Figures]]) -> str:
    """Substitution less the others, paired by seed: mean and standard error."""
    said = []
    for stage in ("prune", "student"):
        if {stage, "substitute"} <= runs[0].keys():
            ours, others = ([run[name] for run in runs] for name in ("substitute", stage))
            shown = (
                f"{figure.title} {quantities.compare(figure, ours, others).show()}"
                for figure in (_PERPLEXITY, _APART)
            )
            said.append(f"Substitution less {NAMES[stage]}: {', '.join(shown)}.")
    return " ".join(said)
