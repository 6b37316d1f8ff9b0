import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from kd_jax.evals import pictures, plots
from kd_jax.evals.quantities import COST, quality, the_primary
from tests.evals.example_run import classifier, figures


def runs(*students):
    return [
        {"teacher": classifier(0.92, True), "student": classifier(accuracy, False)}
        for accuracy in students
    ]


def scatters(groups):
    everything = [run for members in groups.values() for run in members]
    return pictures.scatters(groups, the_primary(quality(everything), "accuracy"))


def test_a_point_for_each_stage():
    found = {s.cost.key: s for s in scatters({"agnews": runs(0.88, 0.90)})}
    assert list(found) == ["size_mb", "latency_ms", "flops_per_sample"]
    teacher, student = found["latency_ms"].points
    assert (teacher.label, teacher.x, teacher.y, teacher.spread) == ("teacher", 40, 0.92, 0)
    assert (student.label, student.x) == ("student", 20)
    assert (student.y, student.spread) == pytest.approx((0.89, 0.0141421), rel=1e-4)
    assert (
        found["latency_ms"].describe().endswith("teacher 0.9200 at 40.00, student 0.8900 at 20.00")
    )


def test_groups_are_told_apart():
    points = scatters({"a": runs(0.88), "b": runs(0.9)})[0].points
    assert [p.label for p in points] == ["a · teacher", "a · student", "b · teacher", "b · student"]
    assert len({p.colour for p in points}) == 2 and len({p.marker for p in points}) == 2


def test_no_picture_where_all_cost_the_same():
    stages = {"baseline": figures(3.0, False), "student": figures(2.0, False)}
    assert scatters({"a": [stages]}) == []


def test_unknown_costs_are_left_out():
    found = runs(0.88)
    del found[0]["student"]["latency_ms"]
    assert "latency_ms" not in [s.cost.key for s in scatters({"a": found})]


def test_save(tmp_path):
    plots.save(plots.sheet(scatters({"agnews": runs(0.88, 0.90)})), tmp_path / "x.png")
    assert imread(tmp_path / "x.png").shape[1] > 1500


def test_points_that_coincide_are_told_apart():
    points = [
        pictures.Point(name, "#000000", "o", x, 1.0, 0.0)
        for name, x in (("a", 1.0), ("b", 2.0), ("c", 1.0))
    ]
    axes = Figure().subplots()
    pictures.Scatter("t", COST[0], COST[0], points).draw(axes)
    a, b, c = (line.get_markersize() for line in axes.lines)
    assert a > c == b
