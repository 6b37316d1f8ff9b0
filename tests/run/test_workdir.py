"""Run directories: who may enter them, when something is written there, and what a run is of."""

import contextlib
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import pytest
from ml_collections import ConfigDict

from kd_jax import storage
from kd_jax.errors import UserError
from kd_jax.run import results, workdir


class Tokenizer:
    """What of one is looked at."""

    chat_template, special_tokens_map = None, {"pad_token": "[PAD]"}

    def __init__(self, vocab):
        self.backend_tokenizer = types.SimpleNamespace(to_str=lambda: vocab)


def config(text: Path, **changes) -> ConfigDict:
    c = dict(seed=0, task=dict(name="mlm"), data=dict(train=dict(source="files", path=str(text))))
    return ConfigDict(c | changes)


def setup(teacher: Path | None = None, commit=None, vocab="{}"):
    model = types.SimpleNamespace(folder=teacher, name="teacher of mine", commit=commit)
    tokenizer = Tokenizer(vocab)
    return types.SimpleNamespace(
        models={"teacher": model},
        tokenizers={"teacher": tokenizer},
        task=types.SimpleNamespace(of_examples=False),
        split="test",
    )


def data(digest="abc"):
    return {"train": {"name": "text.txt", "digest": digest}}


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("some text")
    return file


@pytest.fixture
def teacher(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def start(config, run, made=None, read=None, trains=False):
    """What a recipe does, up to its first step or beyond."""
    with workdir.enter(config, "mine", str(run)) as place:
        made = made or setup()
        made.config = config
        with mock.patch.object(workdir, "programs", lambda run: []):
            place.begin(made, read or data())
        if trains:
            (run / "student" / "checkpoints" / "2").mkdir(parents=True)
        return place


def test_nothing_is_left_where_a_check_fails(text, run):
    with contextlib.suppress(UserError), workdir.enter(config(text), "mine", str(run)):
        assert (run / "lock").read_text() == f"process {os.getpid()} on {workdir.platform.node()}"
        raise UserError("a wrong value")
    assert not run.exists()


def test_what_was_there_before_stays(text, run):
    run.mkdir()
    (run / "mine.txt").write_text("mine")
    with contextlib.suppress(UserError), workdir.enter(config(text), "mine", str(run)):
        raise UserError("a wrong value")
    start(config(text), run)
    start(config(text, seed=1), run)
    assert (run / "mine.txt").read_text() == "mine"


def test_what_looks_like_parts_of_a_run_is_not_touched_where_none_was_begun(text, tmp_path, caplog):
    """--workdir=runs, by mistake."""
    for name in ("one/results.json", "one/manifest.json", "model/config.json", "tokenizer/x.json"):
        (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name).write_text("mine")
    start(config(text), tmp_path / "runs")
    start(config(text, seed=1), tmp_path / "runs")
    for name in ("one/results.json", "one/manifest.json", "model/config.json", "tokenizer/x.json"):
        assert (tmp_path / "runs" / name).read_text() == "mine"


def test_a_tokenizer_that_a_failed_check_left_is_not_taken(text, run):
    """It may be of other text."""
    with contextlib.suppress(UserError), workdir.enter(config(text), "mine", str(run)) as place:
        (place.folder / "tokenizer").mkdir()
        (place.folder / "tokenizer" / workdir.TRAINED_HERE).touch()
        raise UserError("a wrong value")
    place = workdir.enter(config(text, seed=1), "mine", str(run))
    assert not (place.folder / "tokenizer").exists()
    assert (run / "before" / "tokenizer").is_dir()


def test_a_run_says_what_it_is_of(text, teacher, run):
    made = setup(teacher)
    found = start(config(text), run, made).about(made, data())
    start(config(text), run, setup(teacher))
    record = storage.read_json(run / "manifest.json")
    assert storage.read_json(run / "config.json") == workdir.resolved(config(text))
    assert record["config"] == found["config"] == "mine"
    assert record["config_hash"] == workdir.config_hash(config(text))
    assert record["of"]["data"] == data() and list(record["of"]["files"]) == [str(text)]
    weights = record["of"]["models"]["teacher"]["files"][str(teacher / "model.safetensors")]
    assert weights["digest"] == storage.digest(teacher / "model.safetensors")
    assert len(record["starts"]) == len((run / "command.txt").read_text().splitlines()) == 2
    for each in record["starts"]:
        assert "-m kd_jax.main" in each["command"] and each["commit"] == workdir.commit()
        assert each["versions"]["jax"] == jax.__version__ and each["processes"] == 1


def test_a_run_that_has_trained_keeps_its_config(text, run):
    start(config(text), run, trains=True)
    with pytest.raises(UserError, match=r"another config; differing: seed \(0 there, 1 here\)"):
        start(config(text, seed=1), run)
    start(config(text), run)


@pytest.mark.parametrize("lost", [False, True])
def test_a_run_of_before_a_key_was_there_is_gone_on_with(text, run, lost):
    keys = {"init": "", "embedding": {}}
    before, now = config(text, teacher={}), config(text, teacher=keys)
    assert workdir.config_hash(before) == workdir.config_hash(now)
    start(before, run, trains=True)
    if lost:
        (run / "config.json").unlink()
    start(now, run)
    with pytest.raises(UserError, match=r"differing: teacher\.init \('' there, 'scratch' here\)"):
        start(config(text, teacher=keys | {"init": "scratch"}), run)


@pytest.mark.parametrize("how", ["other config", "no config", "damaged config"])
def test_where_nothing_was_trained_another_config_begins_anew(text, run, how):
    start(config(text), run)
    own = ("tokenizer/tokenizer.json", "tokenizer/trained_here.txt")
    for name in (*own, "teacher/results.json", "pruned.json"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("of the first config")
    if how == "no config":
        (run / "config.json").unlink()
    if how == "damaged config":
        (run / "config.json").write_text("{")
    start(config(text, seed=0 if how != "other config" else 1), run)
    assert sorted(path.name for path in run.iterdir()) == [
        *("before", "command.txt", "config.json", "lock", "manifest.json")
    ]
    assert (run / "before" / "tokenizer" / "tokenizer.json").read_text() == "of the first config"
    assert len(storage.read_json(run / "manifest.json")["starts"]) == 1


def test_a_lost_config_is_known_by_the_manifest(text, run, caplog):
    start(config(text), run, trains=True)
    (run / "config.json").write_text("{")
    start(config(text), run)
    assert f"{run}/config.json is damaged: written anew" in caplog.text
    assert (run / "damaged" / "config.json").read_text() == "{"
    assert storage.read_json(run / "config.json") == workdir.resolved(config(text))
    (run / "config.json").unlink()
    with pytest.raises(UserError, match="config.json is missing; and nothing tells that"):
        start(config(text, seed=1), run)
    (run / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json: damaged, it is no JSON"):
        start(config(text), run)


def test_a_lost_manifest_is_said(text, run, caplog):
    start(config(text), run, trains=True)
    (run / "manifest.json").write_text("")
    start(config(text), run)
    assert f"{run}/manifest.json is damaged" in caplog.text
    assert (run / "damaged" / "manifest.json").exists()
    assert len(storage.read_json(run / "manifest.json")["starts"]) == 1


def test_other_data_teachers_and_tokenizers_are_refused(text, teacher, run):
    start(config(text), run, setup(teacher), trains=True)
    refused = f"{run} was begun with other "
    for changed, name in (
        (dict(made=setup(teacher), read=data("xyz")), "data.train (text.txt)"),
        (dict(made=setup(teacher, vocab='{"a": 1}')), "the tokenizer of teacher"),
        (
            dict(made=setup(teacher, commit="b" * 40)),
            f"teacher (commit None then, {'b' * 40} now)",
        ),
    ):
        with pytest.raises(UserError) as error:
            start(config(text), run, **changed)
        advice = "put back what it began with, or give another --workdir"
        assert str(error.value) == f"{refused}{name}; {advice}"
    (teacher / "model.safetensors").write_text("MODEL.safetensors")
    with pytest.raises(UserError) as error:
        start(config(text), run, setup(teacher))
    assert f"{refused}teacher ({teacher}/model.safetensors); put back" in str(error.value)
    assert len(storage.read_json(run / "manifest.json")["starts"]) == 1


def test_where_nothing_was_trained_other_data_begin_anew(text, run):
    start(config(text), run)
    with pytest.raises(UserError, match=f"no step was trained on it, .* {run}/before: run again"):
        start(config(text), run, read=data("xyz"))
    start(config(text), run, read=data("xyz"))
    assert storage.read_json(run / "manifest.json")["of"]["data"] == data("xyz")


def test_another_commit_is_said_and_recorded(text, run, caplog, monkeypatch):
    start(config(text), run, trains=True)
    before = workdir.commit()
    monkeypatch.setattr(workdir, "commit", lambda: "other")
    made = setup()
    found = start(config(text), run, made).about(made, data())
    assert f"{run} was begun at commit {before}, this is other" in caplog.text
    assert found["commit"] == "other" and found["commits"] == [before, "other"]
    starts = storage.read_json(run / "manifest.json")["starts"]
    assert [each["commit"] for each in starts] == [before, "other"]


def test_a_file_is_read_again_only_where_it_may_have_changed(text, teacher, run, monkeypatch):
    start(config(text), run, setup(teacher))
    read = []
    digest = storage.digest
    monkeypatch.setattr(storage, "digest", lambda path: read.append(path.name) or digest(path))
    start(config(text), run, setup(teacher))
    assert read == []
    os.utime(teacher / "config.json", ns=(0, 0))
    start(config(text), run, setup(teacher))
    assert read == ["config.json"]


def finish(run):
    stages = {"student": {"loss": 1.0}}
    about = {"config": "mine", "split": "test", "stages": stages, "export": {"path": "there"}}
    storage.write_json(run / "results.json", about)


def test_a_finished_run_says_that_its_data_have_changed(text, teacher, run, caplog, capsys):
    place = start(config(text), run, setup(teacher), trains=True)
    finish(run)
    assert results.finished(place.folder) and caplog.text == ""
    text.write_text("some other text")
    (teacher / "config.json").write_text("x")
    assert results.finished(workdir.enter(config(text), "mine", str(run)).folder)
    assert "changed since this run, whose figures stay: " in caplog.text
    assert str(text) in caplog.text and str(teacher / "config.json") in caplog.text
    assert "1.0000" in capsys.readouterr().out


def test_a_finished_run_is_shown_where_nothing_can_be_written(text, run, monkeypatch):
    start(config(text), run, trains=True)
    finish(run)

    def forbidden(*_, **__):
        raise OSError(30, "Read-only file system")

    for owner, name in ((os, "open"), (storage, "write"), (type(workdir.epath.Path()), "mkdir")):
        monkeypatch.setattr(owner, name, forbidden)
    with workdir.enter(config(text), "mine", str(run)) as place:
        assert results.finished(place.folder)["stages"] == {"student": {"loss": 1.0}}


def test_damaged_results_are_one_line(text, run):
    start(config(text), run, trains=True)
    (run / "results.json").write_text("")
    with pytest.raises(UserError, match="results.json: damaged, it is no JSON .*; remove it"):
        results.finished(workdir.enter(config(text), "mine", str(run)).folder)


def test_a_directory_that_another_process_is_at_work_in(text, run):
    code = f"""
import sys, time
from kd_jax import storage
held = storage.hold({str(run / "lock")!r})
print("held", flush=True)
time.sleep(60)
"""
    run.mkdir()
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError) as error:
            start(config(text), run)
        host = workdir.platform.node()
        assert str(error.value) == (
            f"{run} is in use by process {other.pid} on {host}: wait for it or stop it, or give "
            f"another --workdir"
        )
    finally:
        other.kill()
        other.communicate()
    start(config(text), run)  # a lock dies with its process


def test_the_first_process_holds_the_directory_for_all(text, run, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    place = start(config(text), run)
    assert place.lock is None and not run.exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("") and None, "it is there and no folder"),
        (lambda path: path.symlink_to("nowhere"), "it is there and no folder"),
        (lambda path: (path.write_text(""), path / "run")[1], "Not a directory"),
        (lambda path: path / ("x" * 256), "File name too long"),
        (lambda path: Path("/proc/run"), "No such file or directory"),
    ],
    ids=["file", "link", "under a file", "long", "proc"],
)
def test_a_place_that_can_be_no_folder(text, tmp_path, make, message):
    path = tmp_path / "place"
    path = make(path) or path
    with pytest.raises(UserError) as error:
        workdir.enter(config(text), "mine", str(path))
    assert str(error.value) == f"--workdir={path}: {message}; give another folder"


def test_figures_are_kept_and_what_is_not_finite_is_said(tmp_path, caplog):
    path = results.epath.Path(tmp_path / "student" / "results.json")
    found = results.kept(path, lambda: {"loss": 1.0, "kl": float("nan"), "speed": None})
    assert found == {"loss": 1.0, "kl": None, "speed": None}
    assert caplog.messages == [f"{path}: not finite, null there: kl"]
    assert results.kept(path, lambda: 1 / 0) == found
    shutil.rmtree(path.parent)
