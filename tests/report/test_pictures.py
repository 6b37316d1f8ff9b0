import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from kd_jax.report import pictures, plots
from tests.report.example_run import classifier, figures


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that were saved."""
    saved, save = [], Figure.savefig

    def keep(self, *args, **settings):
        saved.append(self)
        save(self, *args, **settings)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def notes(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def frames(figure):
    return [p.get_xy() for p in figure.axes[0].patches if isinstance(p, Rectangle)]


def test_confusion_matrix(tmp_path, drawn):
    path = tmp_path / "new" / "confusion.png"
    written = pictures.confusion_matrix(["no", "yes"], [[9000, 1000], [1, 3]], path, "student")
    assert written == str(path)
    assert imread(path)[..., :3].std() > 0.05
    assert notes(drawn[0]) == ["9,000", "1,000", "1", "3"]
    shares = drawn[0].axes[0].images[0].get_array()
    np.testing.assert_allclose(shares, [[0.9, 0.1], [0.25, 0.75]])
    assert frames(drawn[0]) == []


def test_a_class_that_never_occurs(tmp_path, drawn):
    pictures.confusion_matrix(["a", "b"], [[0, 0], [1, 3]], tmp_path / "c.png")
    assert drawn[0].axes[0].images[0].get_array()[0].tolist() == [0, 0]


@pytest.mark.parametrize(("better", "corner"), [(1, (0.5, -0.5)), (-1, (-0.5, 0.5))])
def test_heat_map_marks_the_best(tmp_path, drawn, better, corner):
    values = [[0.91, 0.93], [0.90, np.nan]]
    path = tmp_path / "sweep.png"
    labels = ("alpha", "temperature", "accuracy")
    pictures.heat_map(["0.5", "1"], ["1", "2"], values, path, "sst2", labels, better)
    assert path.exists()
    assert notes(drawn[0]) == ["0.9100", "0.9300", "0.9000", ""]
    assert frames(drawn[0]) == [corner]
    axes = drawn[0].axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("alpha", "temperature")


def test_a_heat_map_of_nothing(tmp_path, drawn):
    pictures.heat_map(["1"], ["1"], [[np.nan]], tmp_path / "sweep.png")
    assert notes(drawn[0]) == [""] and frames(drawn[0]) == []


def test_large_matrices_carry_no_numbers(tmp_path, drawn):
    names = [f"intent_{i}" for i in range(77)]
    pictures.confusion_matrix(names, np.eye(77), tmp_path / "c.png")
    assert notes(drawn[0]) == []


def runs(*students):
    return [
        {"teacher": classifier(0.92, True), "student": classifier(accuracy, False)}
        for accuracy in students
    ]


def trade_off(groups):
    results = {
        label: [({"primary": "accuracy", "stages": stages}, {}) for stages in members]
        for label, members in groups.items()
    }
    return plots.trade_off(results).get("trade_off.png", [])


def test_a_point_for_each_stage():
    found = {panel.over: panel for panel in trade_off({"agnews": runs(0.88, 0.90)})}
    assert list(found) == ["size (MB)", "latency, batch 1 (ms)", "FLOPs of a sample"]
    panel = found["latency, batch 1 (ms)"]
    teacher, student = panel.lines
    assert (teacher.label, *teacher.end()) == ("teacher", 40, 0.92)
    assert (student.label, *student.end()) == ("student", 20, 0.89)
    assert panel.unit == "accuracy, higher is better"
    assert panel.describe().endswith("teacher 0.92 at 40, student 0.89 at 20")
    axes = Figure().subplots()
    bars = panel.draw(axes)["student"][2][0].get_segments()[0]
    assert bars[1][1] - bars[0][1] == pytest.approx(2 * 0.0141421, rel=1e-4)


def test_groups_are_told_apart():
    points = trade_off({"a": runs(0.88), "b": runs(0.9)})[0].lines
    assert [p.label for p in points] == ["a · teacher", "a · student", "b · teacher", "b · student"]
    assert len({p.colour for p in points}) == 2 and len({p.marker for p in points}) == 2


def test_no_picture_where_all_cost_the_same():
    accuracy = {"accuracy": 0.5}
    stages = {"baseline": figures(3.0, False), "student": figures(2.0, False) | accuracy}
    assert trade_off({"a": [stages]}) == []


def test_unknown_costs_are_left_out():
    found = runs(0.88)
    del found[0]["student"]["latency_ms"]
    assert "latency, batch 1 (ms)" not in [panel.over for panel in trade_off({"a": found})]


def test_save(tmp_path):
    plots.save(plots.sheet(trade_off({"agnews": runs(0.88, 0.90)})), tmp_path / "x.png")
    assert imread(tmp_path / "x.png").shape[1] > 1500


def test_points_that_coincide_are_told_apart():
    points = [
        plots.Line(name, "#000000", "", [(np.array([x]), np.array([1.0]))], "o")
        for name, x in (("a", 1.0), ("b", 2.0), ("c", 1.0))
    ]
    axes = Figure().subplots()
    plots.Panel("t", "", points).draw(axes)
    a, b, c = (line.get_markersize() for line in axes.lines)
    assert a > c == b
