import numpy as np
import pytest

from kd_jax import plugins
from kd_jax.errors import UserError

CSV = '"3","A ""title""","text, more"\n"1","B","line\\two"\n"4","C","text"\n"2","D","x"\n'


def make(data):
    return plugins.load("tasks", "agnews", "make").make({"name": "agnews"}, data, None)


def test_the_original_csv(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text(CSV)
    (tmp_path / "classes.txt").write_text("World\nSports\nBusiness\nSci/Tech\n")
    folder = {"path": str(tmp_path)}
    task = make(
        {"train": folder, "test": folder, "validation": {"path": str(tmp_path / "test.csv")}}
    )
    for split in ("train", "validation", "test"):
        found = task.examples(split)
        assert found.first == ['A "title" text, more', "B line\\two", "C text", "D x"]
        assert found.labels_N.tolist() == [2, 0, 3, 1] and found.second is None
    assert task.labels == ("World", "Sports", "Business", "Sci/Tech")
    assert task.primary == "accuracy" and task.metrics == ("accuracy", "macro_f1")


def test_text_and_class_name(tmp_path):
    (tmp_path / "a.tsv").write_text('one "x\tSci/Tech\ntwo\tWorld\n')
    found = make({"test": {"path": str(tmp_path / "a.tsv")}}).examples("test")
    assert found.first == ['one "x', "two"] and found.labels_N.tolist() == [3, 0]


def test_columns_like_the_hubs(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "label": 3}\n{"text": "b", "label": 0}')
    found = make({"test": {"path": str(tmp_path / "a.jsonl")}}).examples("test")
    assert found.labels_N.tolist() == [3, 0]


def test_sources_that_are_left_out_are_the_hubs(monkeypatch):
    asked = []

    def refuse(spec, where):
        asked.append((spec["path"], spec["split"]))
        raise UserError("no network")

    monkeypatch.setattr("kd_jax.data.hub.rows", refuse)
    for split in ("train", "test"):
        with pytest.raises(UserError, match="no network"):
            make(None).examples(split)
    assert asked == [("fancyzhang/ag_news", "train"), ("fancyzhang/ag_news", "test")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", '"0","t","d"\n', "a.csv, row 1: '0' is no label; have: 1, 2, 3, 4"),
        (
            "a.csv",
            '"1","t","d"\n"1","t"\n',
            "csv, row 2: 2 fields instead of 3 .class, title, desc",
        ),
        ("a.csv", '"1","t","d\n', "a.csv, row 1: unexpected end"),
        ("a.tsv", "x\tSport\n", "a.tsv, row 1: 'Sport' is no label; have: World, Sports"),
        ("a.tsv", "x\n", "a.tsv, row 1: 1 fields instead of 2 .text, class."),
        ("a.jsonl", '{"text": "x", "label": 4}', "a.jsonl, line 1: '?4'? is no label"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        make({"test": {"path": str(tmp_path / name)}}).examples("test")


def test_other_classes(tmp_path):
    (tmp_path / "classes.txt").write_text("Good\nBad\n")
    (tmp_path / "test.csv").write_text(CSV)
    with pytest.raises(UserError, match="classes.txt names Good, Bad; .*labelled_text"):
        make({"test": {"path": str(tmp_path)}}).examples("test")
    with pytest.raises(UserError, match="train.csv .config.data.train. does not exist"):
        make({"train": {"path": str(tmp_path)}}).examples("train")


def test_the_real_files(data_folder):
    folder = data_folder / "ag_news"
    data = {"train": {"path": str(folder / "alps_dev.tsv")}, "test": {"path": str(folder)}}
    task = make(data)
    counts = {name: found["examples"] for name, found in task.prepare().items()}
    assert counts["train"] + counts["validation"] == 10_001 and counts["test"] == 7_600
    assert np.bincount(task.examples("test").labels_N).tolist() == [1900] * 4
