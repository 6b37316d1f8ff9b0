import json
import re
from typing import NamedTuple

import pytest
from etils import epath

from kd_jax.report import plots, report, runs, table, tables
from kd_jax.report.runs import Run
from kd_jax.report.table import Table
from tests.report import example_run
from tests.report.example_run import classifier, figures


@pytest.fixture
def classifiers(tmp_path):
    """Three seeds of a fine-tuning run."""
    folders = [example_run.write_classifier(tmp_path / f"c{i}", seed=i) for i in range(3)]
    return [runs.read(str(folder)) for folder in folders]


class Finding(NamedTuple):
    verdict: str
    lead: str
    text: str


def read_finding(text):
    pattern = r'<div class="finding (\w+)">\n\n\*\*(.*)\*\* (.*)\n\n</div>'
    return Finding(*re.fullmatch(pattern, text).groups())


def read_table(text):
    title, *lines = text.splitlines()
    header, _, *rows = [line[2:-2].split(" | ") for line in lines[1:]]
    best = {(i, j) for i, row in enumerate(rows) for j, cell in enumerate(row) if "**" in cell}
    rows = [[cell.strip("*") for cell in row] for row in rows]
    return Table(title.strip("*"), [header[0].strip(), *header[1:]], rows, best=frozenset(best))


BLOCK = re.compile(
    r"<(?:div|details).*?</(?:div|details)>|\*\*[^\n]*\*\*\n\n(?:\|[^\n]*(?:\n|$))+|[^\n]+",
    re.DOTALL,
)


def sections(groups):
    """The blocks by the title of their section: findings, tables, and others as they stand."""
    curves = {
        label: [(run.results, runs.curves(run.workdir)) for run in members]
        for label, members in groups.items()
    }
    pictures = plots.curves(curves) | plots.trade_off(curves)
    text = report.build(groups, pictures, "Made on a day by a command")
    found = {}
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n\n")
        found[title] = [
            read_finding(block)
            if block.startswith("<div")
            else read_table(block)
            if block.startswith("**")
            else block
            for block in BLOCK.findall(body)
        ]
    return found


def cells(table, row):
    return dict(zip(table.header, next(r for r in table.rows if r[0] == row), strict=True))


def best(table):
    """Names of the row and of the column of each cell in bold."""
    return {(table.rows[i][0], table.header[j]) for i, j in table.best}


def test_sections_of_a_fine_tuning_run(classifiers):
    found = sections({"agnews": classifiers})
    assert {title: [type(block) for block in blocks][-2:] for title, blocks in found.items()} == {
        "Summary": [Finding],
        "Quality": [str, Table],
        "Classes": [Table, Table],
        "Cost": [Table],
        "Training": [str],
        "Validation": [str],
        "Quality against cost": [str],
        "Configuration": [str],
        "Runs": [Table, str],
    }
    assert found["Quality against cost"] == ["![Quality against cost](trade_off.png)"]
    assert found["Configuration"][0].startswith("<details><summary>All keys</summary>")
    assert "| objective.kl.temperature | 4.0 |" in found["Configuration"][0]
    assert found["Summary"][0].verdict == "better"


def test_sections_of_a_language_model(tmp_path):
    found = sections({"bert": [runs.read(str(example_run.write(tmp_path / "run")))]})
    assert list(found) == [
        *("Summary", "Quality", "Cost", "Training", "Validation", "Configuration", "Runs")
    ]
    how, table = found["Quality"]
    assert how.startswith("There is one seed")
    assert table.header == ["", "teacher", "baseline", "student", "student − baseline"]
    assert cells(table, "loss (nats/token)")["student − baseline"] == "−0.5000"


def test_what_the_student_wrote_last(tmp_path):
    folder = example_run.write(tmp_path / "run")
    lines = [
        {"step": step, "prompt": "Once", "text": f"upon\na time {step}", "tokens": 9}
        for step in (10, 20)
    ]
    page = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "student" / "samples.jsonl").write_text(page)
    (table,) = sections({"gpt2": [runs.read(str(folder))]})["Samples"]
    assert table.title == "gpt2: what student writes at step 20"
    assert table.rows == [["Once", "upon a time 20", "9"]]


def test_what_was_scored_by_likelihood(tmp_path):
    run = runs.read(str(example_run.write(tmp_path / "run")))
    assert "Likelihoods" not in sections({"gpt2": [run]})
    for task, scores in (
        ("perplexity", {"perplexity": 7.0, "parameters": 1000}),
        ("hellaswag", {"acc": 0.3, "acc_interval": [0.27, 0.33]}),
    ):
        path = tmp_path / "run" / f"{task}.json"
        path.write_text(json.dumps({"stages": {"teacher": scores, "student": scores}}))
    (table,) = sections({"gpt2": [run]})["Likelihoods"]
    assert [row[0] for row in table.rows] == ["teacher", "student"]


def test_quality(classifiers):
    how, table = sections({"agnews": classifiers})["Quality"]
    assert how.startswith("Values are means over the seeds")
    assert table.title == "agnews, 3 seeds"
    assert cells(table, "accuracy") == {
        "": "accuracy",
        "teacher": "0.9220 ± 0.0020",
        "baseline": "0.8620 ± 0.0020",
        "student": "0.8830 ± 0.0030",
        "student − baseline": "+0.0210 ± 0.0006",
        "95% interval": "+0.0185 to +0.0235",
        "better in": "3 of 3",
    }
    # The teacher is what the others are measured against; where they are equal nobody is best.
    rows = ("loss (nats/example)", "accuracy", "macro F1")
    assert best(table) == {(row, "student") for row in rows}


@pytest.mark.parametrize(("gains", "shown"), [((0.1, 0.2, 0.15), True), ((0.1, -0.2, 0.1), False)])
def test_only_what_is_shown_to_be_best_is_bold(tmp_path, gains, shown):
    groups = {"a": [], "b": []}
    for seed, gain in enumerate(gains):
        for label, more in (("a", gain), ("b", 0.0)):
            folder = example_run.write_classifier(
                tmp_path / f"{label}{seed}", seed=seed, gain=more - 0.02
            )
            groups[label].append(runs.read(str(folder)))
    found = sections(groups)
    first = found["Summary"][0]
    assert (first.verdict == "better") == shown == (best(found["Quality"][1]) == {("a", "student")})
    # The summary says of each configuration whether its student is better than its baseline.
    for said, shown_figures, classes in zip(
        found["Summary"][1:], found["Quality"][2:], found["Classes"][::4], strict=True
    ):
        row = ("accuracy", {"better": "student", "worse": "baseline"}.get(said.verdict))
        assert {each for each in best(shown_figures) if each[0] == "accuracy"} == {row} - {
            ("accuracy", None)
        }
        assert bool(best(classes)) == (said.verdict != "open")
    assert all(not best(each) for each in sections({"a": groups["a"][:1]})["Quality"][1:])


def test_a_difference_needs_both_sides_in_every_seed(classifiers):
    classifiers[1].results["stages"]["baseline"]["kl"] = None
    table = sections({"agnews": classifiers})["Quality"][-1]
    row = cells(table, "KL to teacher (nats/example)")
    assert [row[name] for name in table.header[4:]] == ["-", "-", "-"]
    assert (row["baseline"], row["student"]) == ("-", "0.1000")


def test_classes(classifiers):
    table, _, _, student = sections({"agnews": classifiers})["Classes"]
    assert table.header[:5] == [
        *("class", "examples", "precision teacher", "precision baseline", "precision student")
    ]
    assert table.header[7] == "recall student" and table.header[-1] == "F1 student"
    assert table.rows[1][:5] == ["Sports", "1,000", "0.9220", "0.8620", "0.8830"]
    assert table.rows[1][5:8] == ["0.9230", "0.8630", "0.8840"]
    assert table.best == {(i, j) for i in range(4) for j in (4, 7, 10)}
    assert student.title == "Confusion matrix: student, 3 seeds added up"
    assert student.header == ["true \\ predicted", *example_run.CLASSES]
    assert student.rows[0] == ["World", "2,649", "175", "105", "71"]  # 880 + 883 + 886, ...


def test_many_classes_have_no_confusion_matrix(classifiers, monkeypatch):
    monkeypatch.setattr(tables, "MOST_CLASSES", 3)
    assert "too many" in sections({"agnews": classifiers})["Classes"][-1]


def test_cost(classifiers):
    for run, latency in zip(classifiers, (20.0, 20.5, 21.0), strict=True):
        run.results["stages"]["student"]["latency_ms"] = latency
        run.results["stages"]["student"]["throughput"] = 150.0
    (table,) = sections({"agnews": classifiers})["Cost"]
    assert cells(table, "latency, batch 1 (ms)")["student / teacher"] == "0.51 ×"
    assert cells(table, "steps")["student / teacher"] == ""
    # 2.5% is what two measurements of the same model differ by.
    assert best(table) == {("samples/s, batch 32", "student")}


def test_other_stages_have_their_column(tmp_path):
    path = example_run.write_classifier(tmp_path / "run") / "results.json"
    results = json.loads(path.read_text())
    results["stages"]["assistant"] = results["stages"]["baseline"]
    del results["stages"]["teacher"]
    path.write_text(json.dumps(results))
    table = sections({"agnews": [runs.read(str(path.parent))]})["Quality"][-1]
    assert table.header == ["", "assistant", "baseline", "student", "student − baseline"]


def test_configurations_side_by_side(tmp_path, classifiers):
    folder = example_run.write_classifier(tmp_path / "other", seed=5, weight=0.9, gain=-0.1)
    config = json.loads((folder / "config.json").read_text()) | {"extra": {"key": ""}}
    (folder / "config.json").write_text(json.dumps(config))
    found = sections({"a": classifiers, "b": [runs.read(str(folder))]})
    assert [type(block) for block in found["Summary"]] == [Finding] * 3
    overview = found["Quality"][1]
    assert cells(overview, "b")["student − baseline"] == "−0.0750"
    assert cells(overview, "b")["95% interval"] == "-"
    assert best(overview) == set() and "bold" not in overview.title  # they share no seed
    differing, *_ = found["Configuration"]
    assert differing.header == ["key", "a", "b"]
    assert differing.rows == [["extra.key", "-", '""'], ["objective.kl.weight", "0.5", "0.9"]]


def test_where_the_figures_come_from(classifiers):
    folder = classifiers[1].workdir
    start = {"time": "2026-11-29T10:11:12+00:00"}
    (folder / "manifest.json").write_text(json.dumps({"starts": [start]}))
    (folder / "command.txt").write_text("/a/python -m kd_jax.main --config=/x/y.py\nagain\n")
    table, made = sections({"agnews": classifiers})["Runs"]
    origin = ["agnews (0123abcd)", "1", "89abcdef", "2 cores of A Processor"]
    noted = ["2026-11-29", "1.5", "python -m kd_jax.main --config=/x/y.py"]
    assert table.rows[1] == ["c1", *origin, *noted]
    assert table.rows[0][5:] == ["-", "1.5", "-"]
    assert made == "Made on a day by a command"


def run(seed, **stages):
    return Run(epath.Path(f"run-{seed}"), {}, {"seed": seed, "stages": stages})


def of_accuracy(seed, student, baseline=0.86, **others):
    stages = {"baseline": classifier(baseline, False), "student": classifier(student, False)}
    return run(seed, **stages, **others)


def accuracy(runs):
    return table.primary_of([run.results | {"primary": "accuracy"} for run in runs])


def finding(runs):
    return read_finding(report.finding("agnews", runs, accuracy(runs)))


def best_finding(groups, figure, split):
    return read_finding(report.best_finding(groups, figure, split))


def test_better():
    found = finding([of_accuracy(i, 0.88 + i / 1000) for i in range(3)])
    assert found.verdict == "better"
    assert found.lead == "agnews: the student is better than its baseline."
    assert found.text == (
        "Accuracy is 0.8810 against 0.8600: a difference of +0.0210 ± 0.0006 (mean ± standard "
        "error over 3 seeds, paired), better in 3 of 3. The 95% interval is +0.0185 to +0.0235, "
        "without zero."
    )


def test_a_gain_within_the_noise_is_no_gain():
    found = finding([of_accuracy(i, x) for i, x in enumerate((0.90, 0.85, 0.87))])
    assert found.verdict == "open"
    assert found.lead == "agnews: the student is not shown to be better than its baseline."
    assert "better in 2 of 3" in found.text and "with zero in it" in found.text


def test_worse():
    found = finding([of_accuracy(i, 0.80 + i / 1000) for i in range(3)])
    assert found.verdict == "worse"
    assert found.lead == "agnews: the student is worse than its baseline."


def test_one_seed_is_not_enough():
    found = finding([of_accuracy(0, 0.9)])
    assert found.verdict == "open"
    assert found.lead == "agnews: the student is better than its baseline in the only seed."
    assert "One seed does not tell" in found.text


def test_smaller_losses_are_better():
    runs = [
        run(i, baseline=figures(3.0, False), student=figures(2.5 + i / 100, False))
        for i in range(3)
    ]
    loss = table.primary_of([run.results for run in runs])
    found = read_finding(report.finding("bert", runs, loss))
    assert found.verdict == "better"
    assert found.text.startswith(
        "Loss (nats/token) is 2.5100 against 3.0000: a difference of −0.49"
    )


def test_beside_its_teacher():
    found = finding([of_accuracy(0, 0.89, teacher=classifier(0.92, True))])
    assert found.text.endswith(
        "The teacher has 0.9200; the student closes 50% of the gap between baseline and teacher. "
        "It has 66.36 M parameters, 61% of the teacher's, and answers a single example 2.0 times "
        "as fast."
    )


@pytest.mark.parametrize("student", [0.80, 0.86])
def test_no_gap_is_closed_by_a_student_that_gains_nothing(student):
    assert "gap" not in finding([of_accuracy(0, student, teacher=classifier(0.92, True))]).text


def test_no_baseline():
    found = finding([run(0, student=classifier(0.9, False))])
    assert found.lead == "agnews: nothing to compare."


def test_the_best_of_several():
    groups = {
        name: [of_accuracy(i, accuracy + i / 100) for i in range(3)]
        for name, accuracy in (("low", 0.80), ("best", 0.88), ("next", 0.87))
    }
    figure = accuracy(groups["low"])
    found = best_finding(groups, figure, "test")
    assert found.lead == "Best of 3 students: best is better than next."
    assert "0.8900 for best, 0.8800 for next: a difference of +0.0100" in found.text
    assert found.text.endswith(
        "Choosing by the test split makes the best one look better than it is."
    )
    assert "Choosing" not in best_finding(groups, figure, "validation").text


def test_the_best_of_several_losses_is_the_smallest():
    groups = {
        name: [run(i, student=figures(loss + i / 100, False)) for i in range(2)]
        for name, loss in (("a", 2.5), ("b", 2.3), ("c", 2.4))
    }
    loss = table.primary_of([run.results for run in groups["a"]])
    found = best_finding(groups, loss, "validation")
    assert found.lead == "Best of 3 students: b is better than c."


def test_only_common_seeds_are_paired():
    groups = {
        "a": [of_accuracy(0, 0.90), of_accuracy(1, 0.91)],
        "b": [of_accuracy(1, 0.90), of_accuracy(2, 0.70)],
    }
    found = best_finding(groups, accuracy(groups["a"]), "validation")
    assert "a difference of +0.0100. One seed" in found.text
    apart = {"a": groups["a"][:1], "b": groups["b"]}
    assert best_finding(apart, accuracy(groups["a"]), "test").text.endswith("share no seed.")


def test_one_student_has_no_rival():
    groups = {"a": [of_accuracy(0, 0.9)], "b": [run(0, baseline=classifier(0.9, False))]}
    assert report.best_finding(groups, accuracy(groups["a"]), "test") == ""
