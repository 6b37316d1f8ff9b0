"""The Python API: docs/python.md is run as it stands; what rows may be, and what is refused."""

import re
import subprocess
import sys
from pathlib import Path

import datasets
import jax
import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest

import kd_jax
from kd_jax import api
from tests import smoke

PAGE = Path(__file__).resolve().parents[1] / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def quick():
    """One device, batches of one length, empty pictures; programs are kept, and compiled sooner."""
    with (
        smoke.private_caches(),
        smoke.few_devices("page"),
        smoke.one_length("page"),
        smoke.sketches("page"),
    ):
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def page(tmp_path_factory, quick):
    """The names that the page's code defines, run in an empty folder."""
    names, here = {}, tmp_path_factory.mktemp("python")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for number, block in enumerate(BLOCKS):
            if number == 2:  # begun before, until a callback fails
                with pytest.raises(Enough):
                    config = names["config"].copy_and_resolve_references()
                    config.seed, rows = 1, names["rows"]
                    kd_jax.distil(
                        config, train=rows, test=rows, workdir="runs/films-1", callback=stop
                    )
            exec(compile(block, str(PAGE), "exec"), names)
    return names | {"here": here}


class Enough(Exception):
    """What the callback `stop` raises."""


def stop(stage, kind, row):
    if stage == "student" and row["step"] == 3:
        raise Enough


def test_the_page_runs(page, monkeypatch):
    monkeypatch.chdir(page["here"])
    assert len(BLOCKS) == 4 and len(re.findall(r"(?m)^.*\S", BLOCKS[0])) <= 15
    run = page["run"]
    assert ["teacher", "baseline", "student"] == [*run.figures]
    assert {"step", "loss", "kl"} <= page["steps"].keys() and "accuracy" in page["held_out"]
    (found,) = page["student"].predict(["a funny film"])
    assert found["label"] in ("good", "bad") and set(found["probabilities"]) == {"good", "bad"}
    figures = page["student"].evaluate("text", page["rows"])
    assert figures["accuracy"] == pytest.approx(run.figures["student"]["accuracy"])


def test_a_callback_gets_every_row_and_may_end_the_run(page):
    told = api.open_run(page["here"] / "runs" / "films-1").curves("student")[0]
    assert told["step"].tolist() == [1, 2, 3, 4]
    assert page["losses"] == told["loss"][2:].tolist()  # it went on from a checkpoint


def test_a_run_is_read_again(page, monkeypatch):
    monkeypatch.chdir(page["here"])
    rows, where = page["rows"], "runs/films-1"
    again = kd_jax.distil(page["config"], train=rows, test=rows, workdir=where)
    assert again.results == kd_jax.open_run(where).results
    with pytest.raises(kd_jax.UserError, match=r"seed \(1 there, 0 here\)"):
        kd_jax.distil(
            kd_jax.configure("finetune_text:smoke", {"task.text": "text", "epochs": 2}),
            train=rows,
            test=rows,
            workdir=where,
        )


ROWS = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
COLUMNS = {"text": ["a", "b"], "label": [0, 1]}


@pytest.mark.parametrize(
    "given",
    [
        ROWS,
        COLUMNS,
        pandas.DataFrame(COLUMNS),
        datasets.Dataset.from_dict(COLUMNS),
        pa.table(COLUMNS),
    ],
    ids=["rows", "columns", "pandas", "datasets", "pyarrow"],
)
def test_tables(tmp_path, given):
    path = api._file(given, tmp_path, "train")
    assert pyarrow.parquet.read_table(path).to_pylist() == ROWS
    assert api._file(COLUMNS, tmp_path, "train") == path  # the same content, the same file
    assert api._file(ROWS[:1], tmp_path, "train") != path


def test_texts_and_chats(tmp_path):
    def read(rows):
        return pyarrow.parquet.read_table(api._file(rows, tmp_path, "train")).to_pylist()

    assert read(["a", "b"]) == [{"text": "a"}, {"text": "b"}]
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert read([chat]) == [{"messages": chat}]
    assert api._file(tmp_path / "x.csv", tmp_path, "train") == str(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "train: a table without rows"),
        ([1, 2], "train: rows of int; give the path"),
        ({"text": ["a"], "label": [0, 1]}, "train: no table can be made of these rows"),
        (["a", {"text": "b"}], "train: rows of str; give the path"),
    ],
)
def test_rows_that_are_none(tmp_path, rows, message):
    with pytest.raises(kd_jax.UserError, match=message):
        api._file(rows, tmp_path, "train")


def test_a_config():
    config = kd_jax.configure(
        "distil_text", {"teacher.model": "gpt2", "objective.hidden.weight": 1, "steps": 10}
    )
    assert (config.teacher.model, config.objective.hidden.weight, config.steps) == ("gpt2", 1, 10)
    with pytest.raises(kd_jax.UserError, match="no key 'optim.learningrate'.*learning_rate"):
        kd_jax.configure("distil_text", {"optim.learningrate": 1.0})
    with pytest.raises(kd_jax.UserError, match="steps=many should be a whole number"):
        kd_jax.configure("distil_text", {"steps": "many"})
    assert kd_jax.list_experiments()["distil_text"].startswith("A language model into fewer")


def test_other_models(tmp_path):
    run = api.open_run(smoke.run("finetune_sst2").folder)
    baseline = run.save(tmp_path / "baseline", "baseline")
    assert kd_jax.load(baseline).predict(["a film"])[0]["probability"] > 0
    with pytest.raises(kd_jax.UserError, match="nowhere"):
        kd_jax.load(tmp_path / "nowhere")
    with pytest.raises(kd_jax.UserError, match="does not exist|is not finished|no run"):
        kd_jax.open_run(tmp_path)


def test_the_import_is_light():
    code = (
        "import sys, kd_jax; print(sorted({'jax', 'numpy', 'transformers', 'ml_collections'} & "
        "set(sys.modules)), 'distil' in dir(kd_jax))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[] True"
    with pytest.raises(AttributeError, match="has no attribute 'destil'; have Config"):
        kd_jax.destil  # noqa: B018
