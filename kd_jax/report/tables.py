"""Makes tables by class, by round of an ensemble, by compression method and of likelihoods, and
sentences about them. Several runs are seeds of one configuration."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_jax import storage
from kd_jax.report import quantities
from kd_jax.report.quantities import Figure, Figures, Stages, average, compare, count, mean, of
from kd_jax.report.runs import Results, roles
from kd_jax.report.table import Table

_ROUNDS = [figure for figure in quantities.QUALITY if figure.key in ("loss", "kl", "agreement")]
_KL = _ROUNDS[1]
_EFFORT = [
    Figure("parameters", "parameters", "", "{:,.0f}".format),
    Figure("steps", "steps", "", "{:,.0f}".format),
    Figure("training_flops", "FLOPs of training", "T", lambda n: f"{n / 1e12:,.2f}"),
]
_MEMBERS = (  # what results call them, what tables do, and how many of the figures are shown
    ("ensemble", "all members", 3),
    ("student", "last member alone", 2),
)
CONFUSION = "true \\ predicted"  # the corner of a confusion matrix
MOST_CLASSES = 30  # a larger confusion matrix shows nothing
SCORED = ("perplexity", "hellaswag")
_PERPLEXITY = Figure("perplexity", "perplexity", "", "{:.3f}".format, -1)
_APART = Figure("apart", "absolute Δ log-likelihood", "nats", "{:.3f}".format, -1)
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
_KEPT = (  # of what the teacher knows
    ("mean_difference", "mean |difference| of log-likelihoods", "{:.4f}".format),
    ("largest_difference", "largest one", "{:.3f}".format),
    ("acc_retention", "acc, of the teacher's", "{:.1%}".format),
    ("acc_norm_retention", "acc_norm, of the teacher's", "{:.1%}".format),
)


def by_class(label: str, results: Sequence[Results]) -> Table | None:
    """Makes a table of precision, recall and F1 by class, a column for each stage, or None."""
    runs, found = [run["stages"] for run in results], _with_classes(results)
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
            figure = Figure(key, key, "", "{:.4f}".format, 1)
            shown = quantities.shown_best(figure, names, of_class, roles(results[0]).teacher)
            best |= {(len(rows), len(row) + j) for j in shown}
            row += [figure.show(average(figure, of(stage, of_class))) for stage in names]
        rows.append(row)
    seeds = f", means over {len(runs)} seeds" if len(runs) > 1 else ""
    header = ["class", "examples"]
    header += [f"{key} {name}".strip() for key in ("precision", "recall", "F1") for name in names]
    return Table(f"{label}: classes{seeds}", header, rows, best=frozenset(best))


def confusions(results: Sequence[Results]) -> list[Table | str]:
    """Makes a confusion matrix for every stage, summed over seeds: a row for each true class, a
    column for each predicted one; for too many classes a sentence instead."""
    tables = []
    for stage, found in _with_classes(results).items():
        each = [figures["confusion"] for figures in found if figures.get("confusion")]
        if (classes := len(found[0]["classes"])) > MOST_CLASSES:
            return [f"{classes} classes are too many for a confusion matrix."]
        if each:
            seeds = f", {len(each)} seeds added up" if len(each) > 1 else ""
            rows = [
                [name, *(f"{sum(cells):,}" for cells in zip(*rows, strict=True))]
                for name, *rows in zip(found[0]["classes"], *each, strict=True)
            ]
            header = [CONFUSION, *found[0]["classes"]]
            tables.append(Table(f"Confusion matrix: {stage}{seeds}", header, rows))
    return tables


def _with_classes(results: Sequence[Results]) -> dict[str, list[Figures]]:
    """Finds the stages that have metrics by class: their metrics in all seeds."""
    runs = [run["stages"] for run in results]
    found = {
        stage: [figures for figures in of(stage, runs) if figures.get("classes")]
        for stage in quantities.stages_of(runs)
    }
    return {stage: figures for stage, figures in found.items() if figures}


def by_round(label: str, runs: Sequence[Results]) -> Table | None:
    """Makes a table of an ensemble with a row after each round: means over the seeds ± standard
    deviation; None if the runs have no rounds."""
    if not runs or not all(run.get("rounds") for run in runs):
        return None
    shown = [(who, whose, fig) for who, whose, n in _MEMBERS for fig in _ROUNDS[:n]]
    rows = []
    for each in zip(*(run["rounds"] for run in runs), strict=True):
        sizes = each[0]["members"], each[0]["ensemble"]["parameters"]
        row = [str(each[0]["round"]), str(sizes[0]), count(sizes[1])]
        rows.append(row + [mean(figure, of(who, each)) for who, _, figure in shown])
    seeds = f", {len(runs)} seeds: mean ± standard deviation" if len(runs) > 1 else ""
    header = ["round", "members", "parameters"]
    header += [f"{whose} {figure.name}" for _, whose, figure in shown]
    return Table(f"{label}: rounds{seeds}", header, rows)


def ensembles(groups: Mapping[str, Sequence[Results]]) -> Table | None:
    """Makes a table of final ensembles, a row for each configuration: means over the seeds ±
    standard deviation, and the difference of KL from the first one, paired by seed, ± standard
    error; None if a run has no rounds."""
    if not all(run.get("rounds") for runs in groups.values() for run in runs):
        return None
    first = {run["seed"]: run["stages"]["ensemble"] for run in next(iter(groups.values()))}
    rows = []
    for label, runs in groups.items():
        by_seed = {run["seed"]: run["stages"]["ensemble"] for run in runs}
        common = [seed for seed in by_seed if seed in first] if rows else []
        change = compare(_KL, [by_seed[seed] for seed in common], [first[s] for s in common])
        means = [mean(figure, [*by_seed.values()]) for figure in (*_EFFORT, *_ROUNDS)]
        members = str(runs[0]["rounds"][-1]["members"])
        rows.append([label, members, *means, change.show() if change else ""])
    header = ["", "members", *(figure.title for figure in _EFFORT), *(f.name for f in _ROUNDS)]
    return Table("", [*header, "KL − the first row's"], rows)


def rounds_in_words(runs: Sequence[Results]) -> str:
    """Writes how much KL falls from the first to the last round, paired by seed, and the fit over
    the ensemble's sizes; "" for fewer than two rounds."""
    last = len(runs[0].get("rounds", ()))
    if last < 2:
        return ""
    before, after = ([run["rounds"][i]["ensemble"] for run in runs] for i in (0, last - 1))
    change = compare(_KL, after, before)
    text = f"KL to the teacher, round {last} − round 1: {change.show()} nats a token."
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
    """Reads metrics of tasks scored by likelihood from RUN/TASK.json: task -> stage -> metrics.
    Tasks not scored for all stages together are left out; these commands do that:

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
    """Merges groups of runs into one mapping for each seed: stage -> metrics; later groups replace
    stages of earlier ones. "apart" is the mean |difference| of an ending's log-likelihood from the
    teacher's."""
    found: dict[int, dict[str, Figures]] = {}
    for run in (run for group in groups for run in group):
        for stage, score in run["scores"]["perplexity"].items():
            choices, effort = run["scores"]["hellaswag"][stage], run["stages"].get(stage, {})
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
    """Makes a table of compression methods, a row for each: means over `by_seed` ± standard
    deviation. The interval of an accuracy is that of one run (the mean of Wilson's bounds), since
    all seeds answer the same questions."""
    rows, figures = [], (*_EFFORT, _PERPLEXITY, _APART)
    for stage in seeds[0]:
        each = of(stage, seeds)
        shares = [(one["acc"], *one["acc_interval"]) for one in each]
        accuracy, low, high = map(statistics.fmean, zip(*shares, strict=True))
        means = [mean(figure, each) for figure in figures]
        rows.append([stage, *means, f"{accuracy:.3f} ({low:.3f} to {high:.3f})"])
    header = ["model", *(figure.title for figure in figures), "HellaSwag (95%)"]
    return Table(title, header, rows)


def methods_in_words(seeds: Sequence[Stages]) -> str:
    """Writes how the first compression method differs from the others, paired by seed: mean and
    standard error."""
    said = []
    ours, *others = [stage for stage in seeds[0] if seeds[0][stage]["apart"] is not None] or [""]
    for other in others:
        shown = [
            f"{figure.title} {change.show()}"
            for figure in (_PERPLEXITY, _APART)
            if (change := quantities.compare_stages(figure, ours, other, seeds))
        ]
        said.append(f"{ours} − {other}: {', '.join(shown)}.")
    return " ".join(said)


def scores(found: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Makes a table of one task scored by likelihood, a column for each model: accuracies with
    standard error and Wilson's 95% interval, and the closeness to the teacher
    (report["beside_teacher"]); a retention is "-" if the teacher is not above chance."""
    columns = {name: _column(report) for name, report in found.items()}
    headings = dict.fromkeys(heading for column in columns.values() for heading in column)
    rows = [[each, *(column.get(each, "-") for column in columns.values())] for each in headings]
    return Table(title, ["", *columns], rows)


def _column(report: Mapping[str, Any]) -> dict[str, str]:
    column = {}
    for before, group in {"": report, **report.get("groups", {})}.items():
        for key, heading in _ACCURACIES:
            if key in group:
                low, high = group[f"{key}_interval"]
                value = f"{group[key]:.4f} ± {group[f'{key}_error']:.4f}"
                place = f"{before}: {heading}" if before else heading
                column[place] = f"{value} ({low:.4f} to {high:.4f})"
    for found, shown in ((report, _SCORES), (report.get("beside_teacher", {}), _KEPT)):
        for key, heading, show in shown:
            if found.get(key) is not None:
                column[heading] = show(found[key])
                if f"{key}_error" in found:
                    column[heading] += f" ± {show(found[f'{key}_error'])}"
    return column
