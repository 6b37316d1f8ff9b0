"""The report of a comparison: what is said, in which tables and pictures.

`build` makes the document; `document.markdown` and `html.page` write it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kd_jax.evals import (
    by_class,
    by_round,
    document,
    findings,
    methods,
    plots,
    quantities,
    table,
    tradeoff,
)
from kd_jax.evals.document import Details, Document, Matrices, Pictures, Section, Text
from kd_jax.evals.quantities import MISSING, Figure, Stages
from kd_jax.evals.runs import Run
from kd_jax.evals.table import Table

CLEAR = 0.05  # a cost is best only where it is so much better: times vary from run to run
MOST_CLASSES = 30  # a larger confusion matrix shows nothing
TRADE_OFF = "trade_off.png"

Groups = Mapping[str, Sequence[Run]]


def build(groups: Groups, curves: plots.Groups, made: str) -> Document:
    """The report on groups of runs: those of a group differ only in their seed.

    Args:
      groups: finished runs by label; all have the same task, split and primary figure.
      curves: what `plots.draw` drew, by the same labels.
      made: a sentence, when and by which command.

    Raises UserError where the primary figure is missing from the results.
    """
    everything = [run for runs in groups.values() for run in runs]
    first = everything[0].results
    stages = {label: [run.stages for run in runs] for label, runs in groups.items()}
    qualities = quantities.quality(run.stages for run in everything)
    primary = quantities.the_primary(qualities, first.get("primary", "loss"))
    split = str(first.get("split"))
    summary = [findings.of_group(label, runs, primary) for label, runs in groups.items()]
    if best := findings.between(groups, primary, split):
        summary.insert(0, best)
    quality = [_quality(label, runs, qualities) for label, runs in stages.items()]
    if len(groups) > 1:
        quality.insert(0, _overview(groups, primary))
    trade_off = scatters(stages, primary.key)
    sections = [
        Section("Summary", summary),
        Section("Quality", [_how(groups), *quality]),
        Section(
            "Classes", [block for label, runs in stages.items() for block in _classes(label, runs)]
        ),
        Section(
            "Rounds",
            [
                *_ends(groups),
                *(block for label, runs in groups.items() for block in _rounds(label, runs)),
            ],
        ),
        Section(
            "Likelihoods", [each for label, runs in groups.items() for each in _ways(label, runs)]
        ),
        Section("Cost", [each for label, runs in stages.items() for each in _cost(label, runs)]),
        Section(
            "Quality against cost",
            [Pictures("Quality against cost", trade_off, TRADE_OFF)] if trade_off else [],
        ),
        *(_curves(kind, curves) for kind in plots.KINDS),
        Section("Configuration", [*_differing(groups), *_configurations(groups)]),
        Section("Runs", [_provenance(groups), Text(made)]),
    ]
    title = next(iter(groups)) if len(groups) == 1 else f"{len(groups)} configurations compared"
    return Document(title, _subtitle(everything, split), sections)


def scatters(groups: Mapping[str, Sequence[Stages]], primary: str) -> list[tradeoff.Scatter]:
    """The pictures of the primary figure over the costs."""
    qualities = quantities.quality(run for runs in groups.values() for run in runs)
    return tradeoff.scatters(groups, quantities.the_primary(qualities, primary))


def _how(groups: Groups) -> Text:
    """How the tables of quality are to be read."""
    if max(map(len, groups.values())) == 1:
        return Text("There is one seed, so that nothing is known of how much chance does.")
    return Text(
        "Values are means over the seeds, ± their standard deviation. The difference student − "
        "baseline is paired by seed, ± its standard error. Bold is what is better than all others "
        "of its row, the teacher left out, by differences whose 95% interval has no zero in it."
    )


def _subtitle(everything: Sequence[Run], split: str) -> str:
    tasks = sorted({task_of(run) for run in everything})
    seeds = sorted({run.seed for run in everything})
    runs = f"{len(everything)} run{'s' * (len(everything) > 1)}"
    named = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return " · ".join([", ".join(tasks), f"{split} split", runs, named])


def task_of(run: Run) -> str:
    """The name of a run's task."""
    stated = run.results.get("task") or run.config.get("task") or {}
    return stated if isinstance(stated, str) else str(stated.get("name", "unknown task"))


def _overview(groups: Groups, figure: Figure) -> Table:
    """Configurations under each other, by the primary figure."""
    stages = {label: [run.stages for run in runs] for label, runs in groups.items()}
    names = [name for name in ("teacher", "baseline", "student") if _have(stages, name)]
    rows, students = [], {}
    for label, runs in stages.items():
        means = [table.mean(figure, [run[name] for run in runs if name in run]) for name in names]
        rows.append([label, str(len(runs)), *means, *_paired(figure, runs, True)])
        for run in groups[label]:
            if "student" in run.stages:
                students.setdefault(run.seed, {})[label] = run.stages["student"]
    best = table.shown_best(figure, [*groups], students.values())
    header = ["configuration", "seeds", *names, "student − baseline", "95% interval", "better in"]
    title = f"{figure.title} of all configurations" + "; bold: the best student" * bool(best)
    return Table(title, header, rows, best=frozenset((row, 1 + len(names)) for row in best))


def _paired(figure: Figure, runs: Sequence[Stages], several: bool) -> list[str]:
    """Difference, interval and wins; the first alone where there are not several seeds."""
    found = table.paired(figure, runs)
    if found is None:
        return [MISSING] * (3 if several else 1)
    wins = f"{found.wins} of {len(found.differences)}"
    return [found.show(), found.show_interval(), wins] if several else [found.show()]


def _have(groups: Mapping[str, Sequence[Stages]], stage: str) -> bool:
    return any(stage in run for runs in groups.values() for run in runs)


def _quality(label: str, runs: Sequence[Stages], figures: Sequence[Figure]) -> Table:
    """Figures of every stage, and the paired difference student - baseline."""
    names = table.stages_of(runs)
    several = len(runs) > 1
    compared = any({"student", "baseline"} <= {*run} for run in runs)
    rows, best = [], set()
    for figure in figures:
        found = [[run[name] for run in runs if name in run] for name in names]
        if not any(stage.get(figure.key) is not None for each in found for stage in each):
            continue
        best |= {(len(rows), 1 + j) for j in table.shown_best(figure, names, runs)}
        paired = _paired(figure, runs, several) if compared else []
        rows.append([figure.title, *(table.mean(figure, each) for each in found), *paired])
    header = ["", *names]
    if compared:
        header += ["student − baseline", *(["95% interval", "better in"] if several else [])]
    seeds = f"{len(runs)} seeds" if several else "one seed"
    return Table(f"{label}, {seeds}", header, rows, best=frozenset(best))


def _classes(label: str, runs: Sequence[Stages]) -> list[document.Block]:
    """Precision, recall and F1 of each class side by side, and the confusion matrices."""
    found = by_class.side_by_side(label, runs)
    if found is None:
        return []
    if len(found.rows) > MOST_CLASSES:
        return [found, Text(f"{len(found.rows)} classes are too many for a confusion matrix.")]
    return [found, Matrices(by_class.confusions(runs))]


def _ends(groups: Groups) -> list[Table]:
    """Several ensembles after their last rounds."""
    ends = {label: [run.results for run in runs] for label, runs in groups.items()}
    if len(ends) == 1 or not all(run.get("rounds") for runs in ends.values() for run in runs):
        return []
    return [by_round.beside(ends)]


def _rounds(label: str, runs: Sequence[Run]) -> list[document.Block]:
    """An ensemble after each round, and what its size does."""
    results = [run.results for run in runs]
    found = by_round.of_runs(label, results)
    if found is None:
        return []
    said = by_round.findings(results)
    return [found, *([Text(said)] if said else [])]


def _ways(label: str, runs: Sequence[Run]) -> list[document.Block]:
    """What was scored by likelihood of all stages, where it was."""
    found = [run.results | {"scores": methods.scores(run.workdir)} for run in runs]
    if not all(each["scores"] for each in found):
        return []
    seeds = methods.together(found)
    said = methods.findings(seeds)
    return [methods.of_runs(label, seeds), *([Text(said)] if said else [])]


def _cost(label: str, runs: Sequence[Stages]) -> list[Table]:
    """What the stages cost, and how the student stands to its teacher."""
    names = table.stages_of(runs)
    beside = {"student", table.REFERENCE} <= {*names}
    rows, best = [], set()
    for figure in quantities.cost(runs):
        found = [[run[name] for run in runs if name in run] for name in names]
        means = {n: table.average(figure, each) for n, each in zip(names, found, strict=True)}
        rivals = [None if n == table.REFERENCE else mean for n, mean in means.items()]
        best |= {(len(rows), 1 + j) for j in table.best(figure, rivals, CLEAR)}
        row = [figure.title, *(table.mean(figure, each) for each in found)]
        if beside:
            values = [means[n] for n in ("student", table.REFERENCE)]
            known = figure.better and all(values)
            row.append(f"{values[0] / values[1]:.2f} ×" if known else "")
        rows.append(row)
    header = ["", *names, *(["student / teacher"] if beside else [])]
    return [Table(f"{label}: cost", header, rows, best=frozenset(best))] if rows else []


def _curves(kind: str, curves: plots.Groups) -> Section:
    found = [*plots.panels(curves, kind).values()]
    title = plots.KINDS[kind][0]
    pictures = Pictures(f"{title} curves", found, f"{kind}.png")
    return Section(title, [pictures] if found else [])


def _differing(groups: Groups) -> list[Table]:
    """The keys of the configuration in which the groups differ, a column for each."""
    if len(groups) < 2:
        return []
    flat = [dict(leaves(runs[0].config)) for runs in groups.values()]
    keys = sorted({key for config in flat for key in config} - {"seed"})
    keys = [key for key in keys if len({str(config.get(key)) for config in flat}) > 1]
    rows = [[key, *(_shown(config, key) for config in flat)] for key in keys]
    header = ["key", *groups]
    return [Table("Keys in which the configurations differ", header, rows, labels=len(header))]


def _configurations(groups: Groups) -> list[Details]:
    """Everything that each configuration says."""
    found = []
    for label, runs in groups.items():
        flat = dict(leaves(runs[0].config))
        rows = [[key, _shown(flat, key)] for key in sorted(flat.keys() - {"seed"})]
        found.append(Details(Table(f"All keys of {label}", ["key", "value"], rows, labels=2)))
    return found


def _shown(config: Mapping[str, Any], key: str) -> str:
    value = config.get(key, MISSING)
    return '""' if value == "" else str(value)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """("objective.kl.weight", 0.5), ... of nested dictionaries."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree


def _provenance(groups: Groups) -> Table:
    """Where the figures come from."""
    header = ["run", "configuration", "seed", "commit", "machine", "date", "minutes", "command"]
    rows = []
    for label, runs in groups.items():
        for run in runs:
            found = run.results
            seconds = found.get("seconds")
            rows.append(
                [
                    run.workdir.name,
                    f"{label} ({found.get('config_hash', MISSING)})",
                    str(run.seed),
                    str(found.get("commit") or MISSING)[:9],
                    _machine(found.get("machine") or {}),
                    run.began or MISSING,
                    f"{seconds / 60:.1f}" if seconds else MISSING,
                    run.command or MISSING,
                ]
            )
    return Table("The runs", header, rows, labels=len(header))


def _machine(machine: Mapping[str, Any]) -> str:
    if machine.get("platform", "cpu") == "cpu":
        return f"{machine['cores']} cores of {machine['cpu']}" if "cpu" in machine else MISSING
    return f"{machine['devices']} × {machine['device']}"
