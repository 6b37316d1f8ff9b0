import pytest
from etils import epath

from kd_jax.evals import report
from kd_jax.evals.quantities import quality, the_primary
from kd_jax.evals.runs import Run
from tests.evals.example_run import classifier, figures


def run(seed, **stages):
    return Run(epath.Path(f"run-{seed}"), {}, {"seed": seed, "stages": stages})


def of_accuracy(seed, student, baseline=0.86, **others):
    stages = {"baseline": classifier(baseline, False), "student": classifier(student, False)}
    return run(seed, **stages, **others)


def accuracy(runs):
    return the_primary(quality(run.stages for run in runs), "accuracy")


def finding(runs):
    return report.finding("agnews", runs, accuracy(runs))


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
    loss = the_primary(quality(run.stages for run in runs), "loss")
    found = report.finding("bert", runs, loss)
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
    found = report.best_finding(groups, figure, "test")
    assert found.lead == "Best of 3 students: best is better than next."
    assert "0.8900 for best, 0.8800 for next: a difference of +0.0100" in found.text
    assert found.text.endswith(
        "Choosing by the test split makes the best one look better than it is."
    )
    assert "Choosing" not in report.best_finding(groups, figure, "validation").text


def test_the_best_of_several_losses_is_the_smallest():
    groups = {
        name: [run(i, student=figures(loss + i / 100, False)) for i in range(2)]
        for name, loss in (("a", 2.5), ("b", 2.3), ("c", 2.4))
    }
    loss = the_primary(quality(run.stages for run in groups["a"]), "loss")
    found = report.best_finding(groups, loss, "validation")
    assert found.lead == "Best of 3 students: b is better than c."


def test_only_common_seeds_are_paired():
    groups = {
        "a": [of_accuracy(0, 0.90), of_accuracy(1, 0.91)],
        "b": [of_accuracy(1, 0.90), of_accuracy(2, 0.70)],
    }
    found = report.best_finding(groups, accuracy(groups["a"]), "validation")
    assert "a difference of +0.0100. One seed" in found.text
    apart = {"a": groups["a"][:1], "b": groups["b"]}
    assert report.best_finding(apart, accuracy(groups["a"]), "test").text.endswith("share no seed.")


def test_one_student_has_no_rival():
    groups = {"a": [of_accuracy(0, 0.9)], "b": [run(0, baseline=classifier(0.9, False))]}
    assert report.best_finding(groups, accuracy(groups["a"]), "test") is None
