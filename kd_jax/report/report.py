"""Writes the report of a comparison of runs in Markdown, with text, tables and pictures.

`finding` and `best_finding` state which model is better, by how much, and with what confidence.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kd_jax.report import plots, quantities, table, tables
from kd_jax.report.quantities import MISSING, Figure, Paired, count, of, stages_of
from kd_jax.report.runs import Results, Run, leaves, roles
from kd_jax.report.table import Table, escaped

CLEAR = 0.05  # a cost is best only where it is so much better: times vary from run to run

Groups = Mapping[str, Sequence[Run]]


def build(groups: Groups, pictures: plots.Pictures, made: str) -> str:
    """Writes the report on groups of runs; the runs of a group differ only in their seed.

    Args:
        groups: finished runs by label; all have the same task, split and primary figure.
        pictures: plots of the runs, by the names of files next to the report.
        made: a sentence that tells when and by which command the report was made.

    Raises UserError where the primary figure is missing from the results.
    """
    every = [run for runs in groups.values() for run in runs]
    results = [run.results for run in every]
    by_label = {label: [run.results for run in runs] for label, runs in groups.items()}
    split, primary = str(results[0].get("split")), table.primary_of(results)
    best = best_finding(groups, primary, split)
    shown = {
        title: f"![{title}]({file})" for file, title in plots.FILES.items() if file in pictures
    }
    sections: dict[str, list[str | Table | None]] = {
        "Summary": [best, *(finding(*each, primary) for each in groups.items())],
        "Quality": [
            _how(groups),
            table.of_groups(by_label) if len(groups) > 1 else None,
            *(_quality(*each, table.quality_of(results)) for each in by_label.items()),
        ],
        "Classes": [
            block
            for label, each in by_label.items()
            for block in (tables.by_class(label, each), *tables.confusions(each))
        ],
        "Rounds": [
            tables.ensembles(by_label) if len(groups) > 1 else None,
            *(
                block
                for label, each in by_label.items()
                for block in (tables.by_round(label, each), tables.rounds_in_words(each))
            ),
        ],
        "Samples": [block for label, runs in groups.items() for block in _samples(label, runs[0])],
        "Likelihoods": [block for each in groups.items() for block in _methods(*each)],
        "Cost": [_cost(*each) for each in by_label.items()],
        **{title: [picture] for title, picture in shown.items()},
        "Configuration": _keys(groups),
        "Runs": [_provenance(groups), escaped(made)],
    }
    title = next(iter(groups)) if len(groups) == 1 else f"{len(groups)} configurations compared"
    text = f"# {escaped(title)}\n\n{escaped(_subtitle(every, split))}\n"
    for name, blocks in sections.items():
        if there := [b if isinstance(b, str) else b.markdown() for b in blocks if b]:
            text += "\n".join([f"\n## {name}\n", *(f"{block.strip()}\n" for block in there)])
    return text


def _how(groups: Groups) -> str:
    """Explains how to read the tables of quality."""
    if max(map(len, groups.values())) == 1:
        return "There is one seed, so that nothing is known of how much chance does."
    return (
        "Values are means over the seeds, ± their standard deviation. The difference student − "
        "baseline is paired by seed, ± its standard error. Bold is what is better than all others "
        "of its row, the teacher left out, by differences whose 95% interval has no zero in it."
    )


def _subtitle(every: Sequence[Run], split: str) -> str:
    seeds = sorted({run.seed for run in every})
    runs = f"{len(every)} run{'s' * (len(every) > 1)}"
    named = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    tasks = ", ".join(sorted({run.task for run in every}))
    return " · ".join([tasks, f"{split} split", runs, named])


def _quality(label: str, results: Sequence[Results], figures: Sequence[Figure]) -> Table:
    """Makes the table of every stage's metrics, with the paired difference student - baseline."""
    runs, who, several = [run["stages"] for run in results], roles(results[0]), len(results) > 1
    header = [f"{who.student} − {who.baseline}", *(table.SPREAD if several else ())]
    if not any({who.student, who.baseline} <= {*run} for run in runs):
        header = []
    return table.by_stage(
        f"{label}, {f'{len(runs)} seeds' if several else 'one seed'}",
        runs,
        figures,
        header,
        lambda figure: table.differences(figure, results)[: len(header)],
        lambda figure: quantities.shown_best(figure, stages_of(runs), runs, who.teacher),
    )


def _methods(label: str, runs: Sequence[Run]) -> list[str | Table]:
    """Makes the tables of tasks that were scored by likelihood for all stages, if any."""
    found = [run.results | {"scores": tables.read_scores(run.workdir)} for run in runs]
    if not all(each["scores"] for each in found):
        return []
    seeds = tables.by_seed(found)
    return [tables.methods(label, seeds), escaped(tables.methods_in_words(seeds))]


def _samples(label: str, run: Run) -> list[Table]:
    """Makes a table of the last texts that each stage of a run wrote by itself, if any."""
    found = []
    for file in sorted(run.workdir.glob("*/samples.jsonl")):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        last = [line for line in lines if line["step"] == lines[-1]["step"]]
        title = (
            f"{label}: what {file.parent.name} writes at step {lines[-1]['step']}" if last else ""
        )
        rows = [
            [*(" ".join(line[key].split()) for key in ("prompt", "text")), str(line["tokens"])]
            for line in last
        ]
        found += [Table(title, ["prompt", "text", "tokens"], rows, labels=2)] if last else []
    return found


def _cost(label: str, results: Sequence[Results]) -> Table | None:
    """Makes the table of the stages' costs, and of the student's relative to its teacher's."""
    runs, who = [run["stages"] for run in results], roles(results[0])
    names = stages_of(runs)
    both = {who.student, who.teacher} <= {*names}

    def average(figure: Figure, name: str) -> float | None:
        return quantities.average(figure, of(name, runs))

    def best(figure: Figure) -> list[int]:
        rivals = [None if name == who.teacher else average(figure, name) for name in names]
        return quantities.best(figure, rivals, CLEAR)

    def ratio(figure: Figure) -> list[str]:
        student, teacher = (average(figure, name) for name in (who.student, who.teacher))
        known = figure.better and student and teacher
        return [f"{student / teacher:.2f} ×" if known else ""] if both else []

    header = [f"{who.student} / {who.teacher}"] if both else []
    found = table.by_stage(f"{label}: cost", runs, quantities.cost(runs), header, ratio, best)
    return found if found.rows else None


def _keys(groups: Groups) -> list[str | Table]:
    """Makes a table of the keys in which configurations differ, a column for each, and a collapsed
    table of all keys."""
    flat = [
        {key: '""' if value == "" else str(value) for key, value in leaves(runs[0].config)}
        for runs in groups.values()
    ]
    keys = sorted({key for config in flat for key in config} - {"seed"})
    rows = [[key, *(config.get(key, MISSING) for config in flat)] for key in keys]
    header = ["key", *groups]
    differing = [row for row in rows if len({*row[1:]}) > 1]
    title = "Keys in which the configurations differ"
    everything = Table("", header, rows, labels=len(header)).markdown()
    return [
        *([Table(title, header, differing, labels=len(header))] if len(groups) > 1 else []),
        f"<details><summary>All keys</summary>\n\n{everything}\n</details>",
    ]


def _provenance(groups: Groups) -> Table:
    """Makes a table of the folders, seeds, commits and machines behind the figures."""
    header = ["run", "configuration", "seed", "commit", "machine", "date", "minutes", "command"]
    rows = []
    for label, run in ((label, run) for label, runs in groups.items() for run in runs):
        found, seconds = run.results, run.results.get("seconds")
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


def finding(label: str, runs: Sequence[Run], figure: Figure) -> str:
    """Writes a paragraph on whether the student of one configuration beats its baseline."""
    who = roles(runs[0].results)
    both = [run.stages for run in runs if {who.student, who.baseline} <= {*run.stages}]
    found = quantities.compare_stages(figure, who.student, who.baseline, both)
    if found is None:
        text = f"No run has {figure.title} of both a student and a baseline."
        return _finding("open", f"{label}: nothing to compare.", text)
    student, baseline = (
        quantities.average(figure, of(name, both)) for name in (who.student, who.baseline)
    )
    text = f"{_name(figure)} is {figure.show(student)} against {figure.show(baseline)}: "
    text += _evidence(found)
    if all(who.teacher in stages for stages in both):
        models = of(who.student, both), of(who.teacher, both)
        text += _gap(figure, student, baseline, models[1]) + _size(*models)
    lead = f"{label}: {_claim(found, 'the student', 'its baseline')}"
    return _finding(found.verdict, lead, text)


def best_finding(groups: Groups, figure: Figure, split: str) -> str:
    """Writes a paragraph on whether the best student of several configurations beats the next best;
    "" for one configuration."""
    ranked, means = {}, {}
    for label, runs in groups.items():
        who = roles(runs[0].results)
        by_seed = {run.seed: run.stages[who.student] for run in runs if who.student in run.stages}
        middle = quantities.average(figure, [*by_seed.values()])
        if middle is not None:
            ranked[label], means[label] = by_seed, middle
    if len(ranked) < 2:
        return ""
    first, second = sorted(ranked, key=lambda label: figure.better * means[label], reverse=True)[:2]
    seeds = sorted({*ranked[first]} & {*ranked[second]})
    of_first, of_second = ([ranked[name][seed] for seed in seeds] for name in (first, second))
    found = quantities.compare(figure, of_first, of_second)
    shown = " for ".join([figure.show(means[first]), first])
    shown += f", {figure.show(means[second])} for {second}"
    text = f"{_name(figure)} of the students is {shown}"
    if found is None:
        return _finding("open", "No common seeds.", f"{text}; they share no seed.")
    text += f": {_evidence(found)}"
    if split == "test":
        text += " Choosing by the test split makes the best one look better than it is."
    lead = f"Best of {len(ranked)} students: {_claim(found, first, second)}"
    return _finding(found.verdict, lead, text)


def _finding(verdict: str, lead: str, text: str) -> str:
    """Writes a paragraph that begins with the answer in a few words; `verdict` tells the HTML page
    how to mark it."""
    return f'<div class="finding {verdict}">\n\n**{escaped(lead)}** {escaped(text)}\n\n</div>'


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


def _gap(figure: Figure, student: float, baseline: float, teachers: Sequence) -> str:
    """Writes how much of the gap between baseline and teacher the student closes."""
    goal = quantities.average(figure, teachers)
    if goal is None:
        return ""
    share = (student - baseline) / (goal - baseline) if goal != baseline else 0.0
    closes = share > 0 and figure.better * (goal - baseline) > 0
    gap = f"; the student closes {share:.0%} of the gap between baseline and teacher"
    return f" The teacher has {figure.show(goal)}{gap * closes}."


def _size(students: Sequence, teachers: Sequence) -> str:
    """Writes how large and how fast the student is, relative to its teacher."""
    sizes = [models[0].get("parameters") for models in (students, teachers)]
    if not all(sizes):
        return ""
    text = f" It has {count(sizes[0])} parameters, {sizes[0] / sizes[1]:.0%} of the teacher's"
    times = [[m.get("latency_ms") for m in models] for models in (students, teachers)]
    if None not in times[0] + times[1]:
        speed = statistics.fmean(times[1]) / statistics.fmean(times[0])
        text += f", and answers a single example {speed:.1f} times as fast"
    return f"{text}."


def _name(figure: Figure) -> str:
    return figure.title[0].upper() + figure.title[1:]
