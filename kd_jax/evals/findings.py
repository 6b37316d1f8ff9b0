"""What a comparison says, in sentences: which model is better, by how much, how surely."""

import statistics
from collections.abc import Mapping, Sequence

from kd_jax.evals import quantities
from kd_jax.evals.document import Finding
from kd_jax.evals.quantities import Figure, Figures, Paired, count
from kd_jax.evals.runs import Run


def of_group(label: str, runs: Sequence[Run], figure: Figure) -> Finding:
    """Whether the student of one configuration beats its baseline."""
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


def between(groups: Mapping[str, Sequence[Run]], figure: Figure, split: str) -> Finding | None:
    """Whether the best student of several configurations beats the next one."""
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
