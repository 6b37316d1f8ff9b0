import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from kd_jax.data import source
from kd_jax.errors import UserError

ROWS = [{"text": "a", "label": 1}, {"text": 'b, "c"', "label": 0}]


def read(path, where="data.train", **keys):
    return source.table({"path": path if isinstance(path, list) else str(path), **keys}, where)


def test_every_kind_of_file_gives_its_columns(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\na,1\n"b, ""c""",0\n')
    (tmp_path / "a.tsv").write_text('text\tlabel\na\t1\nb, "c"\t0\n')
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, ROWS)))
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for suffix, labels in {"csv": ["1", "0"], "tsv": ["1", "0"], "jsonl": [1, 0]}.items():
        found = read(tmp_path / f"a.{suffix}")
        assert found.columns == {"text": ["a", 'b, "c"'], "label": labels}
        assert found.commit is None and len(found) == 2
    assert read(tmp_path / "a.json").columns == read(tmp_path / "a.parquet").columns
    assert read(tmp_path / "a.json").columns["label"] == [1, 0]
    assert read(tmp_path / "a.csv").place(1) == f"{tmp_path}/a.csv, row 3"
    assert read(tmp_path / "a.jsonl").place(1) == f"{tmp_path}/a.jsonl, line 3"
    both = source.table(
        {"path": [str(tmp_path / "a.json"), str(tmp_path / "a.jsonl")]}, "data.train"
    )
    assert both.columns["label"] == [1, 0, 1, 0] and both.place(2).endswith("a.jsonl, line 1")


def test_a_folder_in_the_hubs_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "hub" / "test.parquet")
    found = read(tmp_path / "hub", "data.test", source="hub")
    assert found.columns == {"text": ["a", 'b, "c"'], "label": [1, 0]}
    assert found.place(1) == f"{tmp_path}/hub:test, row 1"
    path = {"source": "hub", "path": str(tmp_path / "hub")}
    rows = source.records(path, "data.test", "label", "other")
    assert list(rows)[1] == (f"{tmp_path}/hub:test, row 1", {"label": 0})
    assert [part.path.endswith(".arrow") for part in rows.stamp()] == [True]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", "{}", "a.json must hold a list of objects"),
        ("a.json", "[1]", "a.json, row 1 is not a JSON object"),
        ("a.json", "[", "a.json is not JSON"),
        ("a.csv", "text\n", "a.csv holds no rows"),
        ("a.txt", "x", "a.txt: cannot read .txt; have: .jsonl, .csv, .tsv, .parquet, .json"),
        ("a.jsonl", '{"a": 1}\n{"b": 1}', "a.jsonl, line 2 has the columns b; before .* were: a"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_mistakes(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "n": 1}\n{"text": null, "n": 2}')
    found = read(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="no column 'txt'; set task.text to one of: text, n"):
        found.texts("txt", "task.text")
    with pytest.raises(UserError, match="a.jsonl, line 2: 'text' holds None, not text"):
        found.texts("text", "task.text")
    with pytest.raises(UserError, match="unknown data plug-in 'python'; have: files, hub, tfds"):
        read("x", source="python")
    with pytest.raises(UserError, match="config.data.train.path is not set"):
        source.table({"source": "hub"}, "data.train")
    with pytest.raises(UserError, match="unknown key config.data.train.text"):
        read("x", text="text")
