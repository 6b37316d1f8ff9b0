"""A source is read once; then times and sizes of files, or a commit, tell what it holds."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from kd_jax.data import files, identity, source
from kd_jax.errors import UserError

OLD = 1_700_000_000  # seconds since 1970


def documents(file, root, **keys):
    return source.read({"path": str(file), **keys}, "data.train", root)


def write(file, text, time=OLD):
    file.write_text(text)
    os.utime(file, (time, time))


@pytest.fixture
def reads(monkeypatch):
    """Counts how often a text file is read to its end."""
    found, lines = [], files.lines

    def counting(file):
        yield from lines(file)
        found.append(file.name)

    monkeypatch.setattr(files, "lines", counting)
    return found


def test_what_is_known_is_not_read_again(tmp_path, reads):
    file, root = tmp_path / "a.jsonl", tmp_path / "cache"
    write(file, '{"text": "a", "other": "x"}\n{"text": "b", "other": "y"}\n')
    first = documents(file, root).identity
    assert first == documents(file, None).identity and first.count == 2
    reads.clear()
    assert documents(file, root).identity == first and reads == []
    assert documents(file, root, text="other").identity != first  # what is read of it counts


def test_a_change_of_size_or_time_is_seen(tmp_path, reads):
    file, root = tmp_path / "a.txt", tmp_path / "cache"
    write(file, "a\nb\n")
    first = documents(file, root).identity
    write(file, "a\nc\n", OLD + 1)
    assert documents(file, root).identity != first
    write(file, "a\nb\n\n", OLD)
    assert documents(file, root).identity == first  # the same documents: their tokens are found
    reads.clear()
    write(file, "a\nc\n", OLD)  # nobody can see this one
    assert documents(file, root).identity == first and reads == []


def test_a_file_that_changed_just_now_is_read_every_time(tmp_path):
    """It may change again within the tick of the file system's clock."""
    file, root = tmp_path / "a.txt", tmp_path / "cache"
    file.write_text("a\nb\n")
    about = os.stat(file)
    first = documents(file, root).identity
    file.write_text("a\nc\n")
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert documents(file, root).identity != first


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    file, root, lines = tmp_path / "a.txt", tmp_path / "cache", files.lines
    write(file, "a\nb\n")

    def changing(file):
        yield from lines(file)
        monkeypatch.undo()
        write(file, "a\nb\nc\n")

    monkeypatch.setattr(files, "lines", changing)
    with pytest.raises(UserError, match="a.txt was changed while it was read: run the command"):
        documents(file, root)
    assert documents(file, root).identity.count == 3


def test_a_damaged_record_is_made_again_with_a_line(tmp_path, caplog):
    file, root = tmp_path / "a.txt", tmp_path / "cache"
    write(file, "a\nb\n")
    first = documents(file, root).identity
    (record,) = root.glob("source-*/identity.json")
    record.write_text(json.dumps(["0" * 32, 2]))
    assert documents(file, root).identity == first
    assert f"{record} is damaged: what it held is computed again" in caplog.text


def test_a_cache_that_may_only_be_read_remembers_nothing_new(tmp_path, monkeypatch):
    file, root = tmp_path / "a.txt", tmp_path / "cache"
    write(file, "a\nb\n")
    root.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != root)
    assert documents(file, root).identity.count == 2 and not list(root.iterdir())


def test_every_kind_of_source_has_a_stamp(tmp_path):
    write(tmp_path / "a.txt", "a")
    (stamp,) = documents(tmp_path / "a.txt", None).stamp()
    assert stamp == (str(tmp_path / "a.txt"), 1, OLD * 10**9)
    python = source.read({"source": "python", "path": "reference"}, "data.train")
    assert python.stamp()[0].path.endswith("topics.py")
    assert len(source.read({"source": "python"}, "data.train").stamp()) > 100


def test_no_more_columns_are_read_than_needed(tmp_path):
    rows = [{"a": 1, "b": 2, "c": 3}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    spec = {"path": str(tmp_path / "x.parquet")}
    for columns, found in ((("c", "d"), {"c": 3}), ((), rows[0]), (("d", "c"), rows[0])):
        ((place, row),) = source.records(spec, "data.train", *columns)
        assert row == found and place == f"{tmp_path}/x.parquet, row 1"


def test_long_passes_say_how_far_they_are(monkeypatch, caplog):
    monkeypatch.setattr(identity, "_EVERY", 0.0)
    with caplog.at_level("INFO", logger="kd_jax"):
        assert list(identity.watched("abc", "reading x", 3)) == ["a", "b", "c"]
    assert "reading x: 2 of 3" in caplog.text
