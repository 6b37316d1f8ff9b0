import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.ticker import EngFormatter

from kd_jax.report import plots, runs
from tests.report import example_run


@pytest.fixture
def curves(tmp_path):
    return runs.curves(str(example_run.write(tmp_path / "run")))


def panels(groups, kind="training"):
    return {name: panel.lines for name, panel in plots.panels(named(groups), kind).items()}


def named(groups):
    """Groups of curves whose runs have the usual names of stages."""
    return {label: [({}, curves) for curves in members] for label, members in groups.items()}


def draw(groups, out):
    return plots.draw(plots.curves(named(groups)), "example", out)


def test_draws_one_run(tmp_path, curves):
    written = draw({"example": [curves]}, tmp_path / "plots")
    assert written == [str(tmp_path / "plots" / f"{n}.png") for n in ("training", "validation")]
    for path in written:
        pixels = imread(path)
        assert pixels.shape[0] > 400 and pixels.shape[1] > 1000
        assert pixels[..., :3].std() > 0.02


def test_nothing_to_draw(tmp_path):
    assert draw({"example": [{}]}, tmp_path / "plots") == []


def test_panels_of_training(curves):
    found = panels({"example": [curves]})
    # Weighted terms repeat the raw ones on another scale, so they have no panel.
    assert list(found) == ["loss", "ce", "kl", "ratio", "kl_t1", "grad_norm", "learning_rate"]
    assert [line.label for line in found["loss"]] == ["teacher", "baseline", "student"]
    assert [line.label for line in found["kl"]] == ["student"]


def test_panels_of_validation_skip_empty_columns(curves):
    found = panels({"example": [curves]}, "validation")
    assert list(found) == ["loss", "perplexity", "accuracy", "kl", "agreement"]
    assert [line.label for line in found["kl"]] == ["baseline", "student"]


def test_one_line_a_stage_and_group(curves):
    found = panels({"a": [curves, curves], "b": [curves]})["ce"]
    assert [line.label for line in found[:4]] == [
        "a · teacher",
        "a · baseline",
        "a · student",
        "b · teacher",
    ]
    assert [len(line.runs) for line in found] == [2, 2, 2, 1, 1, 1]
    assert len({line.colour for line in found}) == 2
    assert [line.dash for line in found] == [":", "--", "-"] * 2


def test_seeds_of_different_length_are_drawn(tmp_path, curves):
    short = {
        stage: runs.Curves({name: column[:5] for name, column in c.training.items()}, {})
        for stage, c in curves.items()
    }
    assert len(draw({"example": [curves, short]}, tmp_path)) == 2


def scale(values, **settings):
    line = plots.Line("student", "#000000", "-", [(np.arange(3.0), np.array(values))])
    figure = plots.sheet([plots.Panel("loss", "", [line], **settings)], "x")
    return figure.axes[0].get_yscale()


def test_logarithmic_where_values_span_much():
    assert scale([9.0, 5.0, 2.0]) == "log"
    assert scale([3.0, 2.5, 2.0]) == "linear"
    assert scale([9.0, 1.0, 0.0]) == "linear"
    assert scale([9.0, 5.0, 2.0], linear=True) == "linear"


def curves_of(training=None, **validation):
    """A group with one run of a student."""
    columns = {name: np.array(values) for name, values in (training or {}).items()}
    held_out = {name: np.array([value]) for name, value in validation.items()}
    return {"x": [{"student": runs.Curves(columns, held_out)}]}


def test_the_ratio_of_all_distillation_terms_to_the_labels():
    training = {"step": [1.0, 2.0], "ce_weighted": [2.0, 0.0]}
    training |= {"kl_weighted": [1.0, 1.0], "hidden_weighted": [2.0, 1.0]}
    ((steps, values),) = panels(curves_of(training))["ratio"][0].runs
    assert (steps, values) == ([1.0], [1.5])  # nothing to divide by in the second step


def test_no_ratio_without_labels_or_without_a_teacher():
    columns = {"step": [1.0], "ce_weighted": [2.0], "mse_weighted": [2.0]}
    assert "ratio" not in panels(curves_of(columns))
    assert "ratio" not in panels(curves_of({"step": [1.0], "kl_weighted": [2.0]}))


def test_units_are_those_of_the_task():
    tokens = plots.panels(named(curves_of(step=1.0, loss=1.0, perplexity=2.7)), "validation")
    assert tokens["loss"].unit == "nats/token"
    examples = plots.panels(
        named(curves_of(step=1.0, loss=1.0, accuracy=0.5, new=1.0)), "validation"
    )
    assert examples["loss"].unit == "nats/example"
    assert (examples["new"].title, examples["new"].unit) == ("new", "")


def test_long_curves_are_thinned_and_keep_their_ends():
    steps, values = plots._thin(np.arange(9999.0), np.arange(9999.0) * 2)
    assert len(steps) == plots.POINTS and (steps[0], steps[-1]) == (0, 9998)
    np.testing.assert_array_equal(values, steps * 2)


def test_schedules_and_shares_are_never_logarithmic():
    schedule = curves_of({"step": [1.0], "ce": [1.0], "learning_rate": [1.0]})
    training = plots.panels(named(schedule), "training")
    assert {name: panel.linear for name, panel in training.items()} == {
        "ce": False,
        "learning_rate": True,
    }
    assert plots.panels(named(curves_of(step=1.0, accuracy=0.5)), "validation")["accuracy"].linear


def test_a_panel_is_described_in_words(curves):
    panel = plots.panels(named({"example": [curves]}), "training")["kl"]
    assert panel.describe() == (
        "KL(teacher ‖ student), softened, nats / token, over the steps; last values: student 2.95"
    )


def widths(*values):
    lines = [
        plots.Line(name, "#000000", "-", [(np.arange(3.0), np.array(one))])
        for name, one in zip("abc", values, strict=True)
    ]
    panel = plots.Panel("loss", "", lines)
    figure = plots.sheet([panel], "x")
    said = panel.describe().split("; ")[2:]
    return [line.get_linewidth() for line in figure.axes[0].lines], said


def test_curves_that_coincide_are_told_apart():
    same, other = [3.0, 2.0, 1.0], [3.0, 2.5, 1.0]
    (a, b, c), said = widths(same, other, same)
    assert a > c == b and said == ["a and c are the same"]
    (a, b, c), said = widths(same, same, same)
    assert a > b > c and "b and c are the same" in said
    (a, b, c), said = widths(other, same, [1.0, 2.0, 1.0])
    assert a == b == c and said == []


def test_minor_labels():
    labels = [plots._minor_label(value) for value in (0.2, 0.4, 0.5, 3.0, 7.0, 2000.0)]
    assert labels == ["0.2", "", "0.5", "3", "", "2000"]
    steps = EngFormatter(sep="")  # as the axes have it
    assert [steps(step) for step in (0, 500, 1500, 2_000_000)] == ["0", "500", "1.5k", "2M"]


def test_smoothing_keeps_lines_straight():
    line = np.linspace(3.0, 7.0, 1000)
    np.testing.assert_allclose(plots.smooth(line), line)
    short = np.array([1.0, 5.0, 2.0])
    np.testing.assert_array_equal(plots.smooth(short), short)


def test_smoothing_removes_noise():
    noise = np.random.default_rng(0).normal(size=1000)
    # 21 values are averaged, so the deviation falls to 1 / sqrt(21) but for the ends.
    assert plots.smooth(noise).std() < 0.3
