"""What is found out about a fine-tuning run before it begins."""

import pytest
from etils import epath

from kd_jax.errors import UserError
from kd_jax.run.run import build
from tests.recipes import finetuning

pytestmark = pytest.mark.usefixtures("caches")

ONLINE = dict(max_gb=0.0, folder="")


LABEL = tuple(f"LABEL_{i}" for i in range(4))


def mistakes():
    """name -> (what is changed in the config, message)."""

    def model(**changes):
        return lambda c, _: c.teacher.update(changes)

    def second(**changes):
        def change(c, _):
            head = "span" if c.task.name == "squad" else "classification"
            path = finetuning.checkpoint("other", head)
            c.teachers.other = finetuning.teacher(path, **changes)

        return change

    def states(c, folder):
        second()(c, folder)
        c.objective = dict(hidden=dict(weight=1.0, kind="mse", layers=((0, 0),)))

    def no_weights(c, folder):
        second(weight=0.0)(c, folder)
        c.teacher.weight = 0.0

    def regression(c, folder):
        c.teachers.other = finetuning.teacher(c.teacher.model)
        c.average = "probabilities"

    return {
        "classes without names": (
            lambda c, _: c.teacher.update(model=finetuning.checkpoint(classes=LABEL)),
            r"calls its classes LABEL_0, .* the task World, .*: give the model's class names, in "
            r"its own order, in config\.teacher\.labels",
        ),
        "another number of classes": (
            lambda c, _: c.teacher.update(model=finetuning.checkpoint(classes=("good", "bad"))),
            r"has 2 classes \(good, bad\), the task 4 \(World, ",
        ),
        "too few names": (model(labels=("a", "b")), r"config\.teacher\.labels 2"),
        "other names": (model(labels=tuple("abcd")), "calls its classes a, b, c, d, the task"),
        "a larger tokenizer": (
            lambda c, folder: c.teacher.update(model=finetuning.larger_tokenizer(folder)),
            r"teacher .* has a vocabulary of 96, its tokenizer has ids up to 1\d\d",
        ),
        "no weights": (no_weights, "the weights of teacher, other are all 0"),
        "a negative weight": (
            second(weight=-1.0),
            "config.teachers.other.weight=-1.0 must be at least 0",
        ),
        "logits of a language model": (
            lambda c, _: setattr(c, "cache", ONLINE | dict(logits="all")),
            r"config\.cache\.logits is for language models; set config\.cache\.max_gb",
        ),
        "another average": (
            lambda c, _: c.update(average="votes"),
            r"config\.average='votes': have logits, probabilities",
        ),
        "an unknown stage": (
            lambda c, _: setattr(c, "stages", {"pupil": {}}),
            r"config\.stages=\['pupil'\]: have teacher, assistant, baseline, intermediate, "
            "theseus, student",
        ),
        "a teacher called like a stage": (
            lambda c, _: c.update(teachers={"student": finetuning.teacher("")}),
            r"config\.teachers\.student: a stage has this name",
        ),
        "squad: types of tokens that the student lacks": (
            lambda c, _: c.student.update(architecture=dict(type_vocab_size=1)),
            r"student .* has 1 token types \(type_vocab_size\), its tokenizer gives .* 0 to 1",
        ),
        "states of another tokenizer": (
            states,
            "other .* has another tokenizer than the student, and a loss on hidden states",
        ),
        "squad: spans of another tokenizer": (
            second(),
            "other .* has another tokenizer than the student, and its loss compares token by token",
        ),
        "stsb: probabilities": (regression, "a regression has none; take logits"),
        "trained: names of a trained teacher": (
            lambda c, _: c.teacher.update(labels=finetuning.CLASSES[::-1]),
            r"config\.teacher\.labels: a stage trains teacher",
        ),
    }


@pytest.mark.parametrize("name", mistakes())
def test_mistakes_are_found_before_any_step(name, tmp_path):
    change, message = mistakes()[name]
    task = name.partition(":")[0] if ":" in name else "agnews"
    stages = ("teacher", "student") if task == "trained" else ("student",)
    config = finetuning.config(*stages, task=task.replace("trained", "agnews"), cache=ONLINE)
    change(config, tmp_path)
    with pytest.raises(UserError, match=message) as error:
        finetuning.run(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("run/*/metrics.csv"))


def test_names_of_classes_may_be_given(tmp_path):
    config = finetuning.config("student")
    config.teacher.model = finetuning.checkpoint(classes=LABEL)
    config.teacher.labels = finetuning.OTHERS
    assert build(config, epath.Path(tmp_path)).order("teacher") == (1, 2, 3, 0)


def test_a_student_that_is_not_trained_has_the_task_s_classes(tmp_path):
    """Its head is not read: it may be any checkpoint."""
    config = finetuning.config("teacher")
    config.student.model = finetuning.checkpoint(classes=("good", "bad"))
    config.student.architecture = {}
    run = build(config, epath.Path(tmp_path))
    assert run.models["student"].config.labels == finetuning.CLASSES


@pytest.mark.parametrize("given", [{"steps": 6}, {"steps": 0, "epochs": 1.5}])
def test_steps_and_epochs_of_the_data(tmp_path, given):
    config = finetuning.config("teacher", **given)
    run = build(config, epath.Path(tmp_path))
    (stage,) = run.stages
    an_epoch = stage.steps / stage.epochs
    stream = run.task.train(config.batch_size, config.seed)
    assert an_epoch == pytest.approx(stream.steps_per_epoch)
