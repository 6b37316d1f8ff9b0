"""The report of a comparison: what is said, in which tables and pictures.

`build` makes the document. `finding` and `best_finding` say in words which model is better, by how
much, how surely.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kd_jax.report import pictures, plots, quantities, table, tables
from kd_jax.report.page import (
    Block,
    Details,
    Document,
    Finding,
    Matrices,
    Matrix,
    Pictures,
    Section,
)
from kd_jax.report.quantities import MISSING, Figure, Figures, Paired, Stages, count
from kd_jax.report.runs import Run
from kd_jax.report.table import Table

CLEAR = 0.05  # a cost is best only where it is so much better: times vary from run to run
MOST_CLASSES = 30  # a larger confusion matrix shows nothing
TRADE_OFF = "trade_off.png"
_PAIRED = ("student − baseline", "95% interval", "better in")

Groups = Mapping[str, Sequence[Run]]


def build(groups: Groups, curves: plots.Groups, made: str) -> Document:
    """Makes the report on groups of runs: those of a group differ only in their seed.

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
    best = best_finding(groups, primary, split)
    overview = [_overview(groups, primary)] if len(groups) > 1 else []
    trade_off = scatters(stages, primary.key)
    sections = [
        Section(
            "Summary",
            [*([best] if best else []), *(finding(*each, primary) for each in groups.items())],
        ),
        Section(
            "Quality",
            [_how(groups), *overview, *(_quality(*each, qualities) for each in stages.items())],
        ),
        Section("Classes", [block for each in stages.items() for block in _classes(*each)]),
        Section(
            "Rounds",
            [*_ends(groups), *(block for each in groups.items() for block in _rounds(*each))],
        ),
        Section("Likelihoods", [block for each in groups.items() for block in _methods(*each)]),
        Section("Cost", [block for each in stages.items() for block in _cost(*each)]),
        Section(
            "Quality against cost",
            [Pictures("Quality against cost", trade_off, TRADE_OFF)] if trade_off else [],
        ),
        *(_curves(kind, curves) for kind in plots.KINDS),
        Section("Configuration", [*_differing(groups), *_configurations(groups)]),
        Section("Runs", [_provenance(groups), made]),
    ]
    title = next(iter(groups)) if len(groups) == 1 else f"{len(groups)} configurations compared"
    return Document(title, _subtitle(everything, split), sections)


def scatters(groups: Mapping[str, Sequence[Stages]], primary: str) -> list[pictures.Scatter]:
    """Sets the primary figure against the costs."""
    qualities = quantities.quality(run for runs in groups.values() for run in runs)
    return pictures.scatters(groups, quantities.the_primary(qualities, primary))


def _how(groups: Groups) -> str:
    """How the tables of quality are to be read."""
    if max(map(len, groups.values())) == 1:
        return "There is one seed, so that nothing is known of how much chance does."
    return (
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
    """Names a run's task."""
    stated = run.results.get("task") or run.config.get("task") or {}
    return stated if isinstance(stated, str) else str(stated.get("name", "unknown task"))


def _overview(groups: Groups, figure: Figure) -> Table:
    """Configurations under each other, by the primary figure."""
    stages = {label: [run.stages for run in runs] for label, runs in groups.items()}
    there = table.stages_of(run for runs in stages.values() for run in runs)
    names = [name for name in ("teacher", "baseline", "student") if name in there]
    rows, students = [], {}
    for label, runs in stages.items():
        means = [table.mean(figure, table.of(name, runs)) for name in names]
        rows.append([label, str(len(runs)), *means, *_paired(figure, runs)])
        for run in groups[label]:
            if "student" in run.stages:
                students.setdefault(run.seed, {})[label] = run.stages["student"]
    best = table.shown_best(figure, [*groups], students.values())
    header = ["configuration", "seeds", *names, *_PAIRED]
    title = f"{figure.title} of all configurations" + "; bold: the best student" * bool(best)
    return Table(title, header, rows, best=frozenset((row, 1 + len(names)) for row in best))


def _paired(figure: Figure, runs: Sequence[Stages]) -> list[str]:
    """Difference, interval and wins."""
    found = table.paired(figure, runs)
    if found is None:
        return [MISSING] * 3
    return [found.show(), found.show_interval(), f"{found.wins} of {len(found.differences)}"]


def _quality(label: str, runs: Sequence[Stages], figures: Sequence[Figure]) -> Table:
    """Figures of every stage, and the paired difference student - baseline."""
    names, several = table.stages_of(runs), len(runs) > 1
    compared = any({"student", "baseline"} <= {*run} for run in runs)
    header = (_PAIRED if several else _PAIRED[:1]) if compared else ()
    return table.by_stage(
        f"{label}, {f'{len(runs)} seeds' if several else 'one seed'}",
        runs,
        figures,
        header,
        lambda figure: _paired(figure, runs)[: len(header)],
        lambda figure: table.shown_best(figure, names, runs),
    )


def _classes(label: str, runs: Sequence[Stages]) -> list[Block]:
    """Precision, recall and F1 of each class side by side, and the confusion matrices."""
    found = tables.by_class(label, runs)
    if found is None:
        return []
    if len(found.rows) > MOST_CLASSES:
        return [found, f"{len(found.rows)} classes are too many for a confusion matrix."]
    matrices = tables.confusions(runs).items()
    return [found, Matrices([Matrix(title, *matrix) for title, matrix in matrices])]


def _ends(groups: Groups) -> list[Table]:
    """Several ensembles after their last rounds."""
    ends = {label: [run.results for run in runs] for label, runs in groups.items()}
    if len(ends) == 1 or not all(run.get("rounds") for runs in ends.values() for run in runs):
        return []
    return [tables.ensembles(ends)]


def _rounds(label: str, runs: Sequence[Run]) -> list[Block]:
    """An ensemble after each round, and what its size does."""
    results = [run.results for run in runs]
    found = tables.by_round(label, results)
    return [found, *filter(None, [tables.rounds_in_words(results)])] if found else []


def _methods(label: str, runs: Sequence[Run]) -> list[Block]:
    """What was scored by likelihood of all stages, where it was."""
    found = [run.results | {"scores": tables.read_scores(run.workdir)} for run in runs]
    if not all(each["scores"] for each in found):
        return []
    seeds = tables.by_seed(found)
    return [tables.methods(label, seeds), *filter(None, [tables.methods_in_words(seeds)])]


def _cost(label: str, runs: Sequence[Stages]) -> list[Table]:
    """What the stages cost, and how the student stands to its teacher."""
    names = table.stages_of(runs)
    both = {"student", table.REFERENCE} <= {*names}

    def average(figure: Figure, name: str) -> float | None:
        return table.average(figure, table.of(name, runs))

    def best(figure: Figure) -> list[int]:
        rivals = [None if name == table.REFERENCE else average(figure, name) for name in names]
        return table.best(figure, rivals, CLEAR)

    def ratio(figure: Figure) -> list[str]:
        student, teacher = (average(figure, name) for name in ("student", table.REFERENCE))
        known = figure.better and student and teacher
        return [f"{student / teacher:.2f} ×" if known else ""] if both else []

    header = ["student / teacher"] if both else []
    found = table.by_stage(f"{label}: cost", runs, quantities.cost(runs), header, ratio, best)
    return [found] if found.rows else []


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
    """Yields ("objective.kl.weight", 0.5), ... of nested dictionaries."""
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


def finding(label: str, runs: Sequence[Run], figure: Figure) -> Finding:
    """Says whether the student of one configuration beats its baseline."""
    both = [run.stages for run in runs if {"student", "baseline"} <= {*run.stages}]
    students = [stages["student"] for stages in both]
    found = quantities.compare(figure, students, [stages["baseline"] for stages in both])
    if found is None:
        missing = f"No run has {figure.title} of both a student and a baseline"
        return Finding("open", f"{label}: nothing to compare.", f"{missing}.")
    lead = f"{label}: {_claim(found, 'the student', 'its baseline')}"
    values = [_mean(figure, [stages[name] for stages in both]) for name in ("student", "baseline")]
    text = f"{_name(figure)} is {figure.show(values[0])} against {figure.show(values[1])}: "
    text += _evidence(found)
    if all("teacher" in stages for stages in both):
        text += _beside_teacher(figure, values, [stages["teacher"] for stages in both], students)
    return Finding(found.verdict, lead, text)


def best_finding(groups: Mapping[str, Sequence[Run]], figure: Figure, split: str) -> Finding | None:
    """Says whether the best student of several configurations beats the next one."""
    ranked = {}
    for label, runs in groups.items():
        by_seed = {run.seed: run.stages["student"] for run in runs if "student" in run.stages}
        if by_seed and all(stage.get(figure.key) is not None for stage in by_seed.values()):
            ranked[label] = by_seed
    if len(ranked) < 2:
        return None

    def goodness(label: str) -> float:
        return figure.better * _mean(figure, [*ranked[label].values()])

    first, second = sorted(ranked, key=goodness, reverse=True)[:2]
    seeds = sorted({*ranked[first]} & {*ranked[second]})
    of_first, of_second = ([ranked[name][seed] for seed in seeds] for name in (first, second))
    found = quantities.compare(figure, of_first, of_second)
    means = [figure.show(_mean(figure, [*ranked[name].values()])) for name in (first, second)]
    text = f"{_name(figure)} of the students is {means[0]} for {first}, {means[1]} for {second}"
    if found is None:
        return Finding("open", "No common seeds.", f"{text}; they share no seed.")
    lead = f"Best of {len(ranked)} students: {_claim(found, first, second)}"
    text += f": {_evidence(found)}"
    if split == "test":
        text += " Choosing by the test split makes the best one look better than it is."
    return Finding(found.verdict, lead, text)


def _claim(found: Paired, one: str, other: str) -> str:
    if found.error is None:
        gain = found.figure.better * found.mean
        word = "better than" if gain > 0 else "worse than" if gain < 0 else "equal to"
        return f"{one} is {word} {other} in the only seed."
    if found.verdict == "open":
        return f"{one} is not shown to be better than {other}."
    return f"{one} is {found.verdict} than {other}."


def _evidence(found: Paired) -> str:
    n = len(found.differences)
    if found.error is None:
        return f"a difference of {found.show()}. One seed does not tell how much of it is chance."
    text = f"a difference of {found.show()} (mean ± standard error over {n} seeds, paired), "
    text += f"better in {found.wins} of {n}. "
    zero = "with zero in it" if found.verdict == "open" else "without zero"
    return text + f"The 95% interval is {found.show_interval()}, {zero}."


def _beside_teacher(figure: Figure, values, teachers, students) -> str:
    """How much of the way from baseline to teacher the student has gone, and at what size."""
    text = ""
    if all(teacher.get(figure.key) is not None for teacher in teachers):
        student, baseline = values
        goal = _mean(figure, teachers)
        text = f" The teacher has {figure.show(goal)}"
        if figure.better * (goal - baseline) > 0:
            share = (student - baseline) / (goal - baseline)
            if share > 0:
                text += f"; the student closes {share:.0%} of the gap between baseline and teacher"
        text += "."
    sizes = [models[0].get("parameters") for models in (students, teachers)]
    if all(sizes):
        text += f" It has {count(sizes[0])} parameters, {sizes[0] / sizes[1]:.0%} of the teacher's"
        times = [[m.get("latency_ms") for m in models] for models in (students, teachers)]
        if None not in times[0] + times[1]:
            speed = statistics.fmean(times[1]) / statistics.fmean(times[0])
            text += f", and answers a single example {speed:.1f} times as fast"
        text += "."
    return text


def _mean(figure: Figure, stages: Sequence[Figures]) -> float:
    return statistics.fmean(stage[figure.key] for stage in stages)


def _name(figure: Figure) -> str:
    return figure.title[0].upper() + figure.title[1:]
