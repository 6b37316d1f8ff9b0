from types import SimpleNamespace

from kd_jax.run import results


def stage(name, model, learns=False, made=""):
    return SimpleNamespace(name=name, model=model, learns=learns, made=made, batches_of=None)


def roles(*stages, principal=-1, teachers=("teacher", "second")):
    run = SimpleNamespace(stages=stages, principal=stages[principal], teachers=teachers)
    found = results.roles(run)
    return found["teacher"], found["baseline"], found["student"]


TEACHER = stage("teacher", "teacher")
PLAIN, SMALL = stage("plain", "student"), stage("small", "student", learns=True)


def test_the_baseline_trains_the_students_model_on_the_labels():
    assert roles(TEACHER, stage("other", "assistant"), PLAIN, SMALL) == (
        "teacher",
        "plain",
        "small",
    )
    assert roles(stage("other", "assistant"), SMALL) == ("teacher", "", "small")


def test_a_run_without_a_student():
    assert roles(TEACHER, PLAIN) == ("teacher", "plain", "")
    assert roles(TEACHER, stage("second", "second")) == ("teacher", "", "")


def test_a_model_made_of_the_teacher_is_a_student_on_whatever_it_is_trained():
    cut = stage("cut", "cut", made="cut and trained on")
    assert roles(TEACHER, cut) == ("teacher", "", "cut")
    assert roles(TEACHER, cut, PLAIN, SMALL, principal=1) == ("teacher", "", "cut")
