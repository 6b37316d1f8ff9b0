"""Tables of single subjects: classes, rounds of ensembles, ways to a small model, likelihoods; and
what is said of them in words. Several runs are seeds of one configuration."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_jax import storage
from kd_jax.report import quantities, table
from kd_jax.report.quantities import Figure, Figures, Stages, count
from kd_jax.report.table import Table

Results = Mapping[str, Any]  # of a run: "seed", "stages", "rounds", "trend", "scores"

_LOSS = Figure("loss", "loss", "{:.4f}".format, -1)
_KL = Figure("kl", "KL to teacher", "{:.4f}".format, -1)
_AGREEMENT = Figure("agreement", "top-1 agreement", "{:.4f}".format, 1)
_MEMBERS = {  # heading -> what results call it, what is shown of it
    "all members": ("ensemble", (_LOSS, _KL, _AGREEMENT)),
    "last member alone": ("student", (_LOSS, _KL)),
}
SCORED = ("perplexity", "hellaswag")
METHODS = {
    "teacher": "original",
    "substitute": "substitution",
    "prune": "L1 pruning, fine-tuned",
    "student": "distillation",
}
_PERPLEXITY = Figure("perplexity", "perplexity", "{:.3f}".format, -1)
_APART = Figure("apart", "likelihoods apart (nats)", "{:.3f}".format, -1)
_LEFT_OUT = ("model", "stage", "commit", "machine", "seconds", "batch_size")
_ACCURACIES = (("acc", "acc"), ("acc_norm", "acc_norm, by character"))
_SCORES = (  # key, title, how it is shown; what a report lacks (or None) is left out
    ("chance", "chance", "{:.4f}".format),
    ("loss", "loss (nats/token)", "{:.4f}".format),
    ("perplexity", "perplexity, a token", "{:.3f}".format),
    ("word_perplexity", "perplexity, a word", "{:.3f}".format),
    ("questions", "questions", "{:,}".format),
    ("endings", "endings", "{:,}".format),
    ("truncated", "endings whose context was cut", "{:,}".format),
    ("left_out", "questions left out: too long", "{:,}".format),
    ("tokens", "tokens scored", "{:,}".format),
    ("words", "words", "{:,}".format),
    ("windows", "windows", "{:,}".format),
    ("parameters", "parameters", count),
    ("size_mb", "size (MB)", "{:.1f}".format),
)
_KEPT = (  # of the teacher's answers
    ("mean_difference", "mean |difference| of log-likelihoods", "{:.4f}"),
    ("largest_difference", "largest one", "{:.3f}"),
    ("acc_retention", "acc, of the teacher's", "{:.1%}"),
    ("acc_norm_retention", "acc_norm, of the teacher's", "{:.1%}"),
)


def by_class(label: str, runs: Sequence[Stages]) -> Table | None:
    """Shows precision, recall and F1 of each class, a column for each stage; None without any."""
    found = _with_classes(runs)
    if not found:
        return None
    names, first = list(found), next(iter(found.values()))[0]["classes"]
    rows, best = [], set()
    for name in first:
        row = [name, f"{first[name]['support']:,.0f}"]
        of_class = [
            {stage: run[stage]["classes"][name] for stage in run if run[stage].get("classes")}
            for run in runs
        ]
        for key in ("precision", "recall", "f1"):
            figure = Figure(key, key, "{:.4f}".format, 1)
            shown = table.shown_best(figure, names, of_class)
            best |= {(len(rows), len(row) + j) for j in shown}
            row += [figure.show(table.average(figure, table.of(s, of_class))) for s in names]
        rows.append(row)
    spans = (("", 1), *((kind, len(names)) for kind in ("precision", "recall", "F1")))
    seeds = f", means over {len(runs)} seeds" if len(runs) > 1 else ""
    header = ["class", "examples", *names * 3]
    return Table(f"{label}: classes{seeds}", header, rows, 1, frozenset(best), spans)


def confusions(runs: Sequence[Stages]) -> dict[str, tuple[list[str], list[list[int]]]]:
    """Adds up the confusion matrix of every stage over the seeds: title -> (classes, counts)."""
    matrices = {}
    for stage, found in _with_classes(runs).items():
        each = [figures["confusion"] for figures in found if figures.get("confusion")]
        if each:
            seeds = f", {len(each)} seeds added up" if len(each) > 1 else ""
            counts = [
                [sum(cells) for cells in zip(*rows, strict=True)]
                for rows in zip(*each, strict=True)
            ]
            matrices[f"Confusion matrix: {stage}{seeds}"] = list(found[0]["classes"]), counts
    return matrices


def _with_classes(runs: Sequence[Stages]) -> dict[str, list[Figures]]:
    """Finds the stages that were evaluated class by class, over the seeds."""
    found = {
        stage: [figures for figures in table.of(stage, runs) if figures.get("classes")]
        for stage in table.stages_of(runs)
    }
    return {stage: figures for stage, figures in found.items() if figures}


def by_round(label: str, runs: Sequence[Results]) -> Table | None:
    """Shows an ensemble after each round, a row each: means over the seeds ± standard deviation.
    None where the runs have no rounds."""
    if not runs or not all(run.get("rounds") for run in runs):
        return None
    rows = []
    for each in zip(*(run["rounds"] for run in runs), strict=True):
        sizes = each[0]["members"], each[0]["ensemble"]["parameters"]
        row = [str(each[0]["round"]), str(sizes[0]), count(sizes[1])]
        for who, figures in _MEMBERS.values():
            row += [table.mean(figure, table.of(who, each)) for figure in figures]
        rows.append(row)
    titles = [figure.title for _, figures in _MEMBERS.values() for figure in figures]
    spans = (("", 2), *((whose, len(figures)) for whose, (_, figures) in _MEMBERS.items()))
    seeds = f", {len(runs)} seeds: mean ± standard deviation" if len(runs) > 1 else ""
    header = ["round", "members", "parameters", *titles]
    return Table(f"{label}: rounds{seeds}", header, rows, spans=spans)


def ensembles(groups: Mapping[str, Sequence[Results]]) -> Table:
    """Shows the ends of several configurations, a row each: means over the seeds ± standard
    deviation, and KL less that of the first one, paired by seed, ± standard error."""
    first = {run["seed"]: run for run in next(iter(groups.values()))}
    rows = []
    for label, runs in groups.items():
        whole = [run["stages"]["ensemble"] for run in runs]
        both = [run for run in runs if run["seed"] in first] if rows else []
        others = [first[run["seed"]]["stages"]["ensemble"] for run in both]
        change = quantities.compare(_KL, [run["stages"]["ensemble"] for run in both], others)
        rows.append(
            [
                *(label, str(runs[0]["rounds"][-1]["members"]), f"{whole[0]['parameters']:,}"),
                *(f"{whole[0]['steps']:,}", f"{whole[0]['training_flops'] / 1e12:.2f}"),
                *(table.mean(figure, whole) for figure in (_LOSS, _KL, _AGREEMENT)),
                change.show() if change else "",
            ]
        )
    header = ["", "members", "parameters", "steps", "operations (T)"]
    header += [figure.title for figure in (_LOSS, _KL, _AGREEMENT)]
    return Table("", [*header, "KL, less the first row's"], rows)


def rounds_in_words(runs: Sequence[Results]) -> str:
    """Says how far KL has come from the first to the last round, paired by seed, and what the fit
    over sizes is; "" for a single round."""
    last = len(runs[0]["rounds"])
    if last < 2:
        return ""
    before, after = ([run["rounds"][i]["ensemble"] for run in runs] for i in (0, last - 1))
    change = quantities.compare(_KL, after, before)
    text = f"KL to the teacher, round {last} less round 1: {change.show()} nats a token."
    if all(run.get("trend") for run in runs):
        for name, title in (("kl", "KL"), ("loss", "Loss")):
            fits = [run["trend"][name] for run in runs]
            limit, slope = (
                f"{statistics.fmean(fit[key] for fit in fits):.4f} ± "
                f"{max(fit[f'{key}_error'] for fit in fits):.4f}"
                for key in ("limit", "slope")
            )
            text += f" {title} of n members, fitted: {limit} + ({slope}) / n."
    return text


def read_scores(workdir: Path) -> dict[str, dict[str, Figures]]:
    """Reads what was scored by likelihood, RUN/TASK.json: task -> stage -> figures; empty where a
    task was not scored of all stages together, as these commands do:

    python -m kd_jax.evaluate --workdir=RUN --task=perplexity --data=FILE --json=RUN/perplexity.json
    python -m kd_jax.evaluate --workdir=RUN --task=hellaswag --json=RUN/hellaswag.json
    """
    found = {}
    for task in SCORED:
        file = Path(workdir) / f"{task}.json"
        stages = storage.read_json(file).get("stages") if file.exists() else None
        if not stages:
            return {}
        found[task] = {
            stage: {key: value for key, value in figures.items() if key not in _LEFT_OUT}
            for stage, figures in stages.items()
        }
    return found


def by_seed(*groups: Sequence[Results]) -> list[dict[str, Figures]]:
    """Gathers the scores of each seed: stage -> figures. A stage of a later group replaces an
    earlier one's; "apart" is the mean |difference| of an ending's log-likelihood from the
    original's."""
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


def methods(title: str, seeds: Sequence[Stages]) -> Table:
    """Shows ways to a small model, a row each: means over `by_seed` ± standard deviation. The
    interval of an accuracy is that of one run (the mean of Wilson's bounds): all seeds answer the
    same questions."""
    rows = []
    for stage in (stage for stage in METHODS if stage in seeds[0]):
        each = [run[stage] for run in seeds]
        first, trained = each[0], each[0]["training_flops"]
        shares = [(one["acc"], *one["acc_interval"]) for one in each]
        accuracy, low, high = map(statistics.fmean, zip(*shares, strict=True))
        rows.append(
            [
                *(METHODS[stage], f"{first['parameters']:,}"),
                f"{first['steps']:,}" if first["steps"] else "",
                f"{trained / 1e12:,.2f}" if trained else "",
                table.mean(_PERPLEXITY, each),
                "" if stage == "teacher" else table.mean(_APART, each),
                f"{accuracy:.3f} ({low:.3f} to {high:.3f})",
            ]
        )
    header = ["model", "parameters", "steps", "operations of training (T)"]
    return Table(title, [*header, _PERPLEXITY.title, _APART.title, "HellaSwag (95%)"], rows)


def methods_in_words(seeds: Sequence[Stages]) -> str:
    """Says how substitution differs from the others, paired by seed: mean and standard error."""
    said = []
    for stage in ("prune", "student"):
        if {stage, "substitute"} <= seeds[0].keys():
            ours, others = (table.of(name, seeds) for name in ("substitute", stage))
            shown = (
                f"{figure.title} {quantities.compare(figure, ours, others).show()}"
                for figure in (_PERPLEXITY, _APART)
            )
            said.append(f"Substitution less {METHODS[stage]}: {', '.join(shown)}.")
    return " ".join(said)


def scores(found: Mapping[str, Any], name: str, title: str) -> Table:
    """Shows one model's figures in one task scored by likelihood. Accuracies have their standard
    error behind them, and Wilson's interval at 95% beside them."""
    rows = _shares(found, "")
    for group, figures in found.get("groups", {}).items():
        rows += _shares(figures, f"{group}: ")
    for key, heading, show in _SCORES:
        if found.get(key) is not None:
            rows.append([heading, show(found[key]), ""])
    if any(row[2] for row in rows):
        return Table(title, ["", name, "95% interval"], rows)
    return Table(title, ["", name], [row[:2] for row in rows])


def scores_of_models(found: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Shows several models' figures in one task, a column each, and what is left of the teacher's
    answers (report["beside_teacher"]); "-": that an accuracy cannot be kept which is not above
    chance."""
    columns = {name: _column(report) for name, report in found.items()}
    headings = dict.fromkeys(heading for column in columns.values() for heading in column)
    rows = [[each, *(column.get(each, "-") for column in columns.values())] for each in headings]
    return Table(title, ["", *columns], rows)


def _column(report: Mapping[str, Any]) -> dict[str, str]:
    column = {row[0]: row[1] for row in scores(report, "", "").rows}
    kept = report.get("beside_teacher", {})
    for key, heading, form in _KEPT:
        if kept.get(key) is not None:
            column[heading] = form.format(kept[key])
            if f"{key}_error" in kept:
                column[heading] += f" ± {form.format(kept[f'{key}_error'])}"
    return column


def _shares(found: Mapping[str, Any], before: str) -> list[list[str]]:
    rows = []
    for key, heading in _ACCURACIES:
        if key in found:
            low, high = found[f"{key}_interval"]
            value = f"{found[key]:.4f} ± {found[f'{key}_error']:.4f}"
            rows.append([before + heading, value, f"{low:.4f} to {high:.4f}"])
    return rows
