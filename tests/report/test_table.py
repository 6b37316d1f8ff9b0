import html
import re

import pytest
from markdown_it import MarkdownIt

from kd_jax.metrics import span
from kd_jax.report import quantities, table
from tests.report.example_run import classifier, figures


def run(student: float) -> dict:
    return {
        "teacher": figures(2.0, teacher=True),
        "baseline": figures(3.0, teacher=False),
        "student": figures(student, teacher=False),
    }


def of_runs(runs, title="", **results):
    return table.of_runs([{"stages": stages, **results} for stages in runs], title)


def of_groups(groups, **results):
    return table.of_groups(
        {
            label: [{"stages": each, "seed": i, **results} for i, each in enumerate(runs)]
            for label, runs in groups.items()
        }
    )


def cells(found: table.Table, row: str) -> dict[str, str]:
    return dict(zip(found.header, next(r for r in found.rows if r[0] == row), strict=True))


def test_the_results_say_who_is_compared():
    stages = dict(zip(("original", "plain", "small"), run(2.5).values(), strict=True))
    roles = {"teacher": "original", "baseline": "plain", "student": "small"}
    found = of_runs([stages, stages], "x", roles=roles)
    assert cells(found, "loss (nats/token)")["small - plain"] == "−0.5000 ± 0.0000"
    assert found.title.endswith("small's loss lower in 2 of 2")
    assert cells(of_groups({"a": [stages]}, roles=roles), "a")["small"] == "2.5000"
    assert of_runs([run(2.5)], roles={"teacher": "teacher"}).header[-1] == "student"


def test_one_run():
    found = of_runs([run(2.5)], "example")
    assert found.title == "example"
    assert found.header == ["", "teacher", "baseline", "student", "student - baseline"]
    assert cells(found, "loss (nats/token)") == {
        "": "loss (nats/token)",
        "teacher": "2.0000",
        "baseline": "3.0000",
        "student": "2.5000",
        "student - baseline": "−0.5000",
    }
    assert cells(found, "KL to teacher (nats/token)")["teacher"] == "-"
    assert cells(found, "parameters")["student"] == "66.36 M"
    assert cells(found, "parameters")["student - baseline"] == ""
    assert cells(found, "tokens/s")["student"] == "12,346"


def test_several_seeds():
    found = of_runs([run(2.5), run(2.6), run(3.1)], "example")
    loss = cells(found, "loss (nats/token)")
    assert loss["baseline"] == "3.0000"
    assert loss["student"] == "2.7333 ± 0.3215"
    assert loss["student - baseline"] == "−0.2667 ± 0.1856"
    assert found.title.endswith(
        "3 seeds: mean ± standard deviation, differences ± standard error; "
        "student's loss lower in 2 of 3"
    )


def test_differences_are_paired():
    # Baseline and student move together, so their difference has no spread.
    runs = [
        {"baseline": figures(3.0 + i, teacher=False), "student": figures(2.5 + i, teacher=False)}
        for i in range(3)
    ]
    loss = cells(of_runs(runs), "loss (nats/token)")
    assert loss["student"] == "3.5000 ± 1.0000"
    assert loss["student - baseline"] == "−0.5000 ± 0.0000"


def test_an_increase_has_a_sign():
    loss = cells(of_runs([run(3.25)]), "loss (nats/token)")
    assert loss["student - baseline"] == "+0.2500"


def test_no_difference_without_a_baseline():
    stages = run(2.5)
    del stages["baseline"]
    assert of_runs([stages]).header == ["", "teacher", "student"]


def test_groups():
    found = of_groups({"a": [run(2.5), run(2.7)], "b": [run(2.9)]})
    names = ["teacher", "baseline", "student", "student − baseline", "95% interval", "better in"]
    assert found.header == ["configuration", "seeds", *names]
    assert found.title == "loss (nats/token) of all configurations"
    assert found.rows == [
        ["a", "2", "2.0000", "3.0000", "2.6000 ± 0.1414"]
        + ["−0.4000 ± 0.1000", "−1.6706 to +0.8706", "2 of 2"],
        ["b", "1", "2.0000", "3.0000", "2.9000", "−0.1000", "-", "1 of 1"],
    ]


def test_markdown():
    found = table.Table("figures", ["", "x|y\nz"], [["a\nb", "1|2"]])
    rows = "|  | x\\|y z |\n| --- | ---: |\n| a b | 1\\|2 |\n"
    assert found.markdown() == f"**figures**\n\n{rows}"


def test_prints_unwrapped_to_a_file(capsys):
    of_groups({"a long label " * 5: [run(2.5)]}).print()
    assert "a long label " * 5 in capsys.readouterr().out


@pytest.fixture
def screen(monkeypatch, capsys):
    """Lines of a table on a terminal."""

    def show(found, width):
        for name, value in {"FORCE_COLOR": "1", "NO_COLOR": "1", "COLUMNS": str(width)}.items():
            monkeypatch.setenv(name, value)
        found.print()
        return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()

    return show


def test_a_title_is_as_wide_as_the_screen_not_as_the_table(screen):
    title = "a title of many words that says what the table below it is about"
    assert screen(table.Table(title, ["", "a"], [["x", "1"]]), 80)[0] == title


def test_a_table_that_is_too_wide_comes_in_parts_with_whole_figures(screen):
    header = ["run", "stage", "seeds", "loss (nats/token)", "perplexity", "accuracy"]
    header += ["KL to teacher (nats/token)", "top-1 agreement", "loss - baseline's"]
    means = ["2.7333 ± 0.3215", "27.333 ± 3.215", "0.5000", "1.0000", "0.7500", "−0.2667 ± 0.1856"]
    rows = [
        [label, stage, "3", *means]
        for label in ("a label of several words", "b")
        for stage in ("teacher", "baseline", "student")
    ]
    found = table.Table("", header, rows, labels=2)
    for width in (80, 120):
        lines = screen(found, width)
        assert max(map(len, lines)) <= width
        for row in found.rows:
            for cell in row[2:]:
                assert any(cell in line for line in lines)
        headings = [line for line in lines if line.startswith("┏")]
        assert len(headings) == {80: 3, 120: 2}[width]
        assert sum("baseline" in line.split() for line in lines) >= 2 * (len(headings) - 1)


def test_names_are_shown_as_they_are(screen):
    found = table.Table("[bold]", ["", "[a]"], [["[/b]", "1"]])
    text = "\n".join(screen(found, 80))
    assert all(name in text for name in ("[bold]", "[a]", "[/b]"))


def test_the_best_cells_stand_out():
    found = table.Table("", ["", "a", "b"], [["x", "1", "2"]], best=frozenset({(0, 2)}))
    assert found.markdown().endswith("| x | 1 | **2** |\n")


def test_nothing_in_a_cell_is_markup():
    cells = ["[['a.*', 1], ['.*', 0]]", "<b> & `c` ~d~", "_x_ a_b", "a \\ b \\| c"]
    text = table.Table("*t*", cells, [cells]).markdown()
    shown = MarkdownIt("commonmark").enable("table").render(text)
    read = [html.unescape(cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", shown)]
    assert read == cells * 2
    assert "<strong>*t*</strong>" in shown and " a_b |" in text


def keys(*stages):
    return {figure.key: figure for figure in quantities.quality([dict(enumerate(stages))])}


def test_units_follow_the_figures():
    assert keys({"loss": 1, "perplexity": 2})["loss"].title == "loss (nats/token)"
    assert keys({"loss": 1, "accuracy": 2})["loss"].title == "loss (nats/example)"
    assert keys({"loss": 1, "pearson": 2})["loss"].title == "mean squared error"
    assert keys({"f1": 0.912345})["f1"].show(0.912345) == "0.9123"
    assert keys({"f1": 91.2345, "exact_match": 85.0})["f1"].show(91.2345) == "91.23"


def test_little_is_not_nothing():
    shown = {figure.key: figure.show for figure in quantities.COST}
    assert [shown["size_mb"](x) for x in (253.15, 1.04, 0.03)] == ["253.2", "1.0", "0.03"]
    assert [shown["flops_per_sample"](x) for x in (4.0961e9, 1e8, 3.21e6, 5e3)] == [
        *("4.096 G", "0.100 G", "3.21 M", "0.005 M")
    ]
    assert [shown["training_flops"](x) for x in (4.7e12, 5.5e11, 5.5e8, 0)] == [
        *("4.7 T", "550.000 G", "0.550 G", "0 M")
    ]


def test_every_figure_of_quality_has_a_better_side():
    names = "loss perplexity accuracy f1 macro_f1 matthews_correlation pearson spearman exact_match"
    found = keys(dict.fromkeys([*names.split(), "kl", "agreement"], 1.0))
    smaller = {key for key, figure in found.items() if figure.better < 0}
    assert smaller == {"loss", "perplexity", "kl"}
    assert {figure.better for figure in found.values()} == {-1, 1}


def test_wins_go_by_the_primary_figure():
    stages = [
        {"baseline": classifier(0.8, False), "student": classifier(accuracy, False)}
        for accuracy in (0.7, 0.9, 0.81)
    ]
    found = of_runs(stages, "agnews", primary="accuracy")
    assert found.title.endswith("student's accuracy higher in 2 of 3")
    assert cells(found, "latency, batch 1 (ms)")["student"] == "20.00"
    both = of_groups({"a": stages[:1]}, primary="accuracy")
    assert both.title.startswith("accuracy") and cells(both, "a")["student − baseline"] == "−0.1000"


def test_squads_figures_are_all_shown():
    golds = {"a": ["Paris"], "b": []}
    found = span.figures({"a": "Paris", "b": ""}, golds, unanswerable=True)
    assert {*found} <= {*keys(found)}


def test_a_figure_that_is_not_finite_is_shown_as_missing():
    nan = float("nan")
    stages = {"teacher": {"loss": 1.0}, "student": {"loss": 2.0, "kl": nan, "accuracy": None}}
    stages["baseline"] = {"loss": 2.5, "kl": 0.5, "accuracy": 0.5}
    for runs in ([stages], [stages, stages]):
        rows = {row[0]: row[1:] for row in of_runs(runs).rows}
        assert rows["KL to teacher (nats/example)"] == ["-", "-", "0.5000", "-"]
        assert rows["accuracy"][1] == "-"
        assert of_groups({"a": runs}, primary="kl").rows


def test_the_primary_figure_of_one_seed_is_missing():
    runs = [run(2.5), run(2.6)]
    runs[1]["student"]["loss"] = None
    found = of_runs(runs, "example")
    assert cells(found, "loss (nats/token)")["student"] == "-"
    assert found.title == (
        "example, 2 seeds: mean ± standard deviation, differences ± standard error"
    )
