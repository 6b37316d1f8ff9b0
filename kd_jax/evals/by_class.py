"""How the stages of runs do on each class of a classification."""

from collections.abc import Sequence

from kd_jax.evals import table
from kd_jax.evals.document import Matrix
from kd_jax.evals.quantities import Figure, Figures, Stages
from kd_jax.evals.table import Table


def side_by_side(label: str, runs: Sequence[Stages]) -> Table | None:
    """Precision, recall and F1 of each class, a column for each stage; None without classes."""
    found = _with_classes(runs)
    if not found:
        return None
    names, found = list(found), list(found.values())
    classes = list(found[0][0]["classes"])
    rows, best = [], set()
    for name in classes:
        row = [name, f"{found[0][0]['classes'][name]['support']:,.0f}"]
        for key in ("precision", "recall", "f1"):
            figure = Figure(key, key, "{:.4f}".format, 1)
            of_class = [[stage["classes"][name] for stage in each] for each in found]
            shown = table.shown_best(figure, names, _of_class(name, runs))
            best |= {(len(rows), len(row) + j) for j in shown}
            row += [figure.show(table.average(figure, each)) for each in of_class]
        rows.append(row)
    spans = (("", 1), *((kind, len(names)) for kind in ("precision", "recall", "F1")))
    seeds = f", means over {len(runs)} seeds" if len(runs) > 1 else ""
    title = f"{label}: classes{seeds}"
    return Table(title, ["class", "examples", *names * 3], rows, 1, frozenset(best), spans)


def _of_class(name: str, runs: Sequence[Stages]) -> list[Stages]:
    """The runs with a class's figures in the place of a stage's."""
    return [
        {stage: run[stage]["classes"][name] for stage in run if run[stage].get("classes")}
        for run in runs
    ]


def confusions(runs: Sequence[Stages]) -> list[Matrix]:
    """The confusion matrix of every stage that has one, added up over the seeds."""
    each = [_confusion(name, found) for name, found in _with_classes(runs).items()]
    return [matrix for matrix in each if matrix]


def _with_classes(runs: Sequence[Stages]) -> dict[str, list[Figures]]:
    """The stages that were judged class by class, over the seeds."""
    found = {
        name: [run[name] for run in runs if run.get(name, {}).get("classes")]
        for name in table.stages_of(runs)
    }
    return {name: stages for name, stages in found.items() if stages}


def _confusion(stage: str, found: Sequence[Figures]) -> Matrix | None:
    each = [figures["confusion"] for figures in found if figures.get("confusion")]
    if not each:
        return None
    counts = [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*each, strict=True)]
    seeds = f", {len(each)} seeds added up" if len(each) > 1 else ""
    return Matrix(f"Confusion matrix: {stage}{seeds}", list(found[0]["classes"]), counts)
