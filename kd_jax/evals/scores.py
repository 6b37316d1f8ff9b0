"""The figures of scoring by likelihood as a table: accuracies with their errors and intervals,
perplexities, and of how much text they are."""

from collections.abc import Mapping
from typing import Any

from kd_jax.evals.quantities import count
from kd_jax.evals.table import Table

# Key, title, and how it is shown; what a report lacks (or None) is left out.
_ACCURACIES = (("acc", "acc"), ("acc_norm", "acc_norm, by character"))
_FIGURES = (
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


_BESIDE = (
    ("mean_difference", "mean |difference| of log-likelihoods", "{:.4f}"),
    ("largest_difference", "largest one", "{:.3f}"),
    ("acc_retention", "acc, of the teacher's", "{:.1%}"),
    ("acc_norm_retention", "acc_norm, of the teacher's", "{:.1%}"),
)


def of_report(found: Mapping[str, Any], name: str, title: str) -> Table:
    """One model's figures in one task. Accuracies have their standard error behind them, and
    Wilson's interval at 95% beside them."""
    rows = _shares(found, "")
    for group, figures in found.get("groups", {}).items():
        rows += _shares(figures, f"{group}: ")
    for key, heading, show in _FIGURES:
        if found.get(key) is not None:
            rows.append([heading, show(found[key]), ""])
    if any(row[2] for row in rows):
        return Table(title, ["", name, "95% interval"], rows)
    return Table(title, ["", name], [row[:2] for row in rows])


def of_reports(found: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Several models' figures in one task, a column each, and what is left of the teacher's answers
    (report["beside_teacher"]); "-": that an accuracy cannot be kept which is not above chance."""
    columns = {name: _column(report) for name, report in found.items()}
    headings = dict.fromkeys(heading for column in columns.values() for heading in column)
    rows = [[each, *(column.get(each, "-") for column in columns.values())] for each in headings]
    return Table(title, ["", *columns], rows)


def _column(report: Mapping[str, Any]) -> dict[str, str]:
    column = {row[0]: row[1] for row in of_report(report, "", "").rows}
    beside = report.get("beside_teacher", {})
    for key, heading, form in _BESIDE:
        if beside.get(key) is not None:
            column[heading] = form.format(beside[key])
            if f"{key}_error" in beside:
                column[heading] += f" ± {form.format(beside[f'{key}_error'])}"
    return column


def _shares(found: Mapping[str, Any], before: str) -> list[list[str]]:
    rows = []
    for key, heading in _ACCURACIES:
        if key in found:
            low, high = found[f"{key}_interval"]
            value = f"{found[key]:.4f} ± {found[f'{key}_error']:.4f}"
            rows.append([before + heading, value, f"{low:.4f} to {high:.4f}"])
    return rows
