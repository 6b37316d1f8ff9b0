import numpy as np
import pytest
import scipy.stats

from kd_jax.report import quantities
from kd_jax.report.quantities import Figure

UP = Figure("accuracy", "accuracy", "", "{:.4f}".format, 1)
DOWN = Figure("loss", "loss", "", "{:.4f}".format, -1)


def paired(*differences, figure=UP):
    return quantities.Paired(figure, list(differences))


def test_against_the_paired_t_test():
    a, b = np.random.default_rng(0).normal(size=(2, 6))
    found = quantities.compare(
        UP, [{"accuracy": x} for x in a.tolist()], [{"accuracy": x} for x in b.tolist()]
    )
    test = scipy.stats.ttest_rel(a, b)
    assert found.mean == pytest.approx((a - b).mean())
    assert found.mean / found.error == pytest.approx(test.statistic)
    assert found.interval == pytest.approx(tuple(test.confidence_interval(0.95)))


def test_verdicts():
    assert paired(0.1, 0.11, 0.12).verdict == "better"
    assert paired(-0.1, -0.11, -0.12).verdict == "worse"
    assert paired(0.1, 0.11, 0.12, figure=DOWN).verdict == "worse"
    assert paired(0.1, -0.2, 0.3).verdict == "open"
    assert paired(0.1, 0.1).verdict == "better"  # no spread, no doubt
    assert paired(0.0, 0.0).verdict == "open"


def test_one_seed_shows_nothing():
    found = paired(0.5)
    assert (found.error, found.interval, found.verdict) == (None, None, "open")
    assert (found.show(), found.show_interval()) == ("+0.5000", "-")


def test_wins_go_by_the_figure():
    assert paired(0.1, -0.2, 0.3, 0.0).wins == 2
    assert paired(0.1, -0.2, 0.3, 0.0, figure=DOWN).wins == 1


def test_shown():
    found = paired(-0.1, -0.3)
    assert found.show() == "−0.2000 ± 0.1000"
    assert found.show_interval() == "−1.4706 to +1.0706"


def test_nothing_to_compare():
    assert quantities.compare(UP, [{"accuracy": 0.5}], [{"accuracy": None}]) is None
    assert quantities.compare(UP, [], []) is None
