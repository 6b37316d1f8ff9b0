import json

import numpy as np
import pytest

from kd_jax.errors import UserError
from kd_jax.evals import runs
from tests.evals import example_run


def test_reads_a_finished_run(tmp_path):
    run = runs.read(str(example_run.write(tmp_path / "run", seed=3)))
    assert run.seed == 3
    assert list(run.stages) == ["teacher", "baseline", "student"]
    assert run.stages["student"]["loss"] == 2.5 + 0.3


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
