import numpy as np
import pytest

from kd_jax.evals.runs import by_evaluation

VALIDATION = {"step": np.array([2.0, 4.0]), "loss": np.array([1.5, 1.0])}


def columns(**values):
    return {"step": np.arange(1.0, 5.0)} | {k: np.array(v, float) for k, v in values.items()}


def test_means_since_the_last_evaluation():
    training = columns(loss=[1, 2, 3, 5], kl=[1, np.nan, 2, 4])
    first, second = by_evaluation(training, VALIDATION)
    assert first == {"step": 2, "train_loss": 1.5, "train_kl": 1.0, "loss": 1.5}
    assert second == {"step": 4, "train_loss": 4.0, "train_kl": 3.0, "loss": 1.0}


def test_what_distillation_weighs_against_the_labels():
    training = columns(
        ce_weighted=[1, 1, 2, 2], kl_weighted=[2, 4, 1, 1], hidden_weighted=[1, 1, 1, 1]
    )
    assert [row["kd_to_ce"] for row in by_evaluation(training, VALIDATION)] == [4.0, 1.0]
    scores = columns(mse_weighted=[2] * 4, logit_mse_weighted=[1] * 4)
    assert by_evaluation(scores, VALIDATION)[0]["kd_to_ce"] == 0.5


@pytest.mark.parametrize("names", [("ce",), ("kl",), ("ce", "mse")])
def test_no_ratio_without_both(names):
    training = columns(**{f"{name}_weighted": [1] * 4 for name in names})
    assert not any("kd_to_ce" in row for row in by_evaluation(training, VALIDATION))
    none = columns(ce_weighted=[0] * 4, kl_weighted=[1] * 4)
    assert "kd_to_ce" not in by_evaluation(none, VALIDATION)[0]


def test_what_was_not_recorded():
    assert by_evaluation(columns(loss=[1] * 4), {}) == []
    assert by_evaluation(
        {"step": np.array([3.0])}, {"step": np.array([2.0]), "loss": np.array([1.0])}
    ) == [{"step": 2, "loss": 1.0}]


def test_a_damaged_table_of_training_leaves_the_held_out_figures():
    assert by_evaluation({}, columns(step=[2], loss=[0.5])) == [{"step": 2, "loss": 0.5}]
