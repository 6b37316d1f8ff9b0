import json

import numpy as np
import pytest

from kd_jax.errors import UserError
from kd_jax.report import runs
from kd_jax.report.runs import by_evaluation, differences
from tests.report import example_run


def test_reads_a_finished_run(tmp_path):
    run = runs.read(str(example_run.write(tmp_path / "run", seed=3)))
    assert run.seed == 3
    assert list(run.stages) == ["teacher", "baseline", "student"]
    assert run.stages["student"]["loss"] == 2.5 + 0.3


def test_the_config_of_an_earlier_run_gets_the_keys_that_are_new(tmp_path):
    folder = example_run.write(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"teacher": {"model": "given"}}))
    found = runs.read(str(folder)).config
    assert found == config | {"teacher": {"model": "given", "init": "", "embedding": {}}}


def test_who_is_who():
    assert runs.roles({}) == runs.Roles("teacher", "baseline", "student")  # as runs had it before
    noted = {"teacher": "big", "student": "small"}
    assert runs.roles({"roles": noted}) == runs.Roles("big", "", "small")


def test_stages_are_in_the_order_of_reading():
    stages = ["student", "round2", "baseline", "round1", "teacher"]
    assert runs.ordered(stages) == ["teacher", "baseline", "student", "round1", "round2"]


def test_reads_curves_of_an_unfinished_run(tmp_path):
    workdir = example_run.write(tmp_path / "run")
    (workdir / "results.json").unlink()
    (workdir / "student" / "eval.csv").unlink()
    curves = runs.curves(str(workdir))
    assert list(curves) == ["teacher", "baseline", "student"]
    assert curves["student"].validation == {}
    training = curves["student"].training
    np.testing.assert_array_equal(training["step"], np.arange(0, 200, 10))
    assert set(training) >= {"loss", "ce", "kl", "kl_weighted", "kl_t1", "grad_norm"}
    assert np.isnan(curves["teacher"].validation["kl"]).all()


def test_a_csv_file_with_only_a_header_is_empty(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n")
    assert runs.read_columns(tmp_path / "metrics.csv") == {}


def test_a_row_that_was_cut_off_ends_in_nan(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,ce\n0,1.5,1.5\n1,1.")
    columns = runs.read_columns(tmp_path / "metrics.csv")
    np.testing.assert_array_equal(columns["ce"], [1.5, np.nan])


def remove(name):
    return lambda workdir: (workdir / name).unlink()


def finish_teacher_only(workdir):
    (workdir / "results.json").unlink()
    (workdir / "teacher" / "results.json").write_text("{}")


def spoil_results(workdir):
    (workdir / "results.json").write_text('{"config": ')


def drop_stages(workdir):
    (workdir / "results.json").write_text(json.dumps({"config": "x", "seed": 0}))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (remove("config.json"), "run is no run directory: it has no config.json"),
        (
            finish_teacher_only,
            "not finished: no results.json (finished stages: teacher; begun: baseline, student; "
            "run its command again to continue: python -m kd_jax.main --config=",
        ),
        (spoil_results, "results.json: damaged, it is no JSON"),
        (drop_stages, "results.json: no stages in it"),
    ],
)
def test_says_what_is_missing(tmp_path, break_it, message):
    workdir = example_run.write(tmp_path / "run")
    break_it(workdir)
    with pytest.raises(UserError) as error:
        runs.read(str(workdir))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_of_runs_names_them(tmp_path):
    example_run.write(tmp_path / "a")
    example_run.write(tmp_path / "b")
    with pytest.raises(UserError, match="these folders in it are runs: a, b"):
        runs.read(str(tmp_path))


def test_a_folder_beside_or_within_a_run_is_told_apart(tmp_path):
    workdir = example_run.write(tmp_path / "run")
    (workdir / "student").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=f"no config.json; {workdir} is one"):
        runs.read(str(workdir / "student"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    (model / "model.safetensors").touch()
    with pytest.raises(UserError, match="the folder of a model, not of a run; give it as --model"):
        runs.read(str(model))
    with pytest.raises(UserError, match="these folders in it are runs: run$"):
        runs.read(str(tmp_path))


def test_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        runs.read(str(tmp_path / "nowhere"))


def test_a_value_that_is_no_number_names_its_line(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.5\n1,high\n")
    with pytest.raises(UserError, match="metrics.csv:3: loss='high' is no number"):
        runs.read_columns(tmp_path / "metrics.csv")


def config(seed=0, stages=("baseline", "student"), **objective):
    objective = {"kl": {"weight": 0.5, "temperature": 2.0}} | objective
    optim = {"learning_rate": 1e-3}
    return dict(seed=seed, objective=objective, stages={n: {} for n in stages}, optim=optim)


def test_values_are_told_with_the_end_of_their_key():
    other = config(1) | {"optim": {"learning_rate": 3e-4}}
    found = differences([config(), other])
    assert found == [["optim.learning_rate=0.001"], ["optim.learning_rate=0.0003"]]


def test_a_section_that_others_lack_is_named_once():
    hidden = {"weight": 1.0, "kind": "mse", "layers": "uniform"}
    found = differences([config(), config(hidden=hidden), config(stages=["teacher"])])
    trained = ["stages.baseline", "stages.student"]
    assert found == [trained, ["objective.hidden", *trained], ["stages.teacher"]]


def test_in_a_section_that_some_lack_the_others_may_differ():
    heavy, light = ({"hidden": {"weight": weight, "kind": "mse"}} for weight in (10, 1))
    found = differences([config(), config(**heavy), config(**light)])
    assert found == [[], ["hidden.weight=10"], ["hidden.weight=1"]]


def test_keys_with_the_same_end_are_told_whole():
    one, two = ({"a": {"x": {"lr": n}}, "b": {"x": {"lr": 2 * n}}} for n in (1, 2))
    assert differences([one, two])[0] == ["a.x.lr=1", "b.x.lr=2"]


def test_a_section_in_place_of_a_value():
    assert differences([{"a": ""}, {"a": {"b": 1}}]) == [['a=""'], ["a"]]


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
