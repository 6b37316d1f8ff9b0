import math
import struct
import sys
import time
import types

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from kd_jax.errors import UserError
from kd_jax.train import records
from kd_jax.train.records import Records, Table


def lines(path) -> list[str]:
    return path.read_text().splitlines()


def test_a_table_grows_and_is_cut_back(tmp_path):
    path = tmp_path / "metrics.csv"
    table = Table(path, start=0)
    for step in (1, 2, 3):
        table.add({"step": step, "loss": 0.1 * step})
    table.close()
    assert lines(path) == ["step,loss", "1,0.1", "2,0.2", "3,0.30000000000000004"]
    again = Table(path, start=2)
    assert lines(path) == ["step,loss", "1,0.1", "2,0.2"]
    again.add({"step": 3, "loss": 3.5})
    again.close()
    assert lines(path) == ["step,loss", "1,0.1", "2,0.2", "3,3.5"]


def test_a_table_cut_back_to_nothing_starts_with_its_header(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n5,1.0\n")
    table = Table(path, start=4)
    table.add({"step": 5, "loss": 2.0})
    table.close()
    assert lines(path) == ["step,loss", "5,2.0"]


@pytest.mark.parametrize("rest", ["3", "3,0.", "3,0.3", "3,\n", "3\n"])
def test_a_line_that_a_crash_cut_short_does_not_count(tmp_path, rest):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,rate\n1,0.1,2\n2,0.2,2\n" + rest)
    assert [row["step"] for row in records.read(path)] == ["1", "2"]
    Table(path, start=9).close()
    assert lines(path) == ["step,loss,rate", "1,0.1,2", "2,0.2,2"]


def test_texts_are_kept_and_cut_back_as_rows_are(tmp_path):
    text = 'two\nlines,\u2028 "quoted"'
    written = Records(tmp_path, 0, samples=True)
    written.add_samples(2, [{"text": text, "tokens": 3}, {"text": "", "tokens": 1}])
    digest = written.sync()
    written.add_samples(4, [{"text": "later"}])
    written.close()
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])  # a crash
    again = Records(tmp_path, 2, written=digest, samples=True)
    again.add_samples(4, [{"text": "later"}])
    again.close()
    assert path.read_bytes() == whole and not (tmp_path / "damaged").exists()
    path.write_bytes(whole.replace(b"quoted", b"quotes"))
    Records(tmp_path, 2, written=digest, samples=True).close()
    assert path.read_bytes() == b"" and len(list((tmp_path / "damaged").iterdir())) == 1


def test_rows_are_there_at_once(tmp_path):
    table = Table(tmp_path / "metrics.csv", start=0)
    table.add({"step": 1, "loss": 1.0})
    assert len(lines(tmp_path / "metrics.csv")) == 2
    table.close()


def test_the_old_table_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,1.0\n2,2.0\n")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(records.epath.Path(path)), "replace", full)
    with pytest.raises(OSError):
        Table(path, start=1)
    assert lines(path) == ["step,loss", "1,1.0", "2,2.0"]


def read_events(folder) -> list[Event]:
    """All events of a TensorBoard folder, in the order of writing."""
    events = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            for begin, end in ((0, 8), (12, 12 + length)):
                check = struct.unpack("<I", data[end : end + 4])[0]
                assert check == masked_crc32c(data[begin:end])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    return events


def test_tensorboard_has_the_same_numbers(tmp_path):
    all_of_them = Records(tmp_path, start=4)
    all_of_them.add("metrics", {"step": 5, "loss": 0.5, "ce": 0.25})
    all_of_them.add("eval", {"step": 5, "loss": 0.75})
    all_of_them.sync()
    version, again, *events = read_events(tmp_path / "tensorboard")
    assert version.file_version == "brain.Event:2"
    # What an earlier process wrote from this step on is hidden.
    assert (again.step, again.session_log.status) == (5, SessionLog.START)
    found = [(e.step, e.summary.value[0].tag, e.summary.value[0].simple_value) for e in events]
    assert found == [(5, "train/loss", 0.5), (5, "train/ce", 0.25), (5, "eval/loss", 0.75)]
    assert all(abs(e.wall_time - time.time()) < 60 for e in events)
    all_of_them.add("metrics", {"step": 10**9, "loss": math.nan, "ce": 1.0})
    all_of_them.sync()
    assert read_events(tmp_path / "tensorboard")[-1].step == 10**9
    all_of_them.close()


def test_a_full_disk_is_an_error_and_no_endless_wait(tmp_path, monkeypatch):
    all_of_them = Records(tmp_path, start=0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(all_of_them._events._writer._py_recordio_writer, "write", full)
    with pytest.raises(OSError, match="No space left"):
        for step in range(100):
            all_of_them.add("metrics", {"step": step, "loss": 0.5})
    all_of_them.close()


@pytest.fixture
def wandb(monkeypatch):
    """A module in the place of wandb that remembers how it was called."""
    module = types.ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})
    module.calls, module.logged = [], []
    module.ended = []
    run = types.SimpleNamespace(log=module.logged.append, finish=lambda: module.ended.append(True))
    module.init = lambda **options: module.calls.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_every_row(tmp_path, wandb):
    with records.wandb_listener("project", "quickstart-1", {"seed": 0}, tmp_path) as listener:
        all_of_them = Records(tmp_path / "student", start=0, listeners=[listener])
        all_of_them.add("metrics", {"step": 5, "loss": 0.5})
        all_of_them.close()
        assert not wandb.ended
    assert wandb.ended
    (options,) = wandb.calls
    assert options["project"] == "project" and options["name"] == "quickstart-1"
    assert options["config"] == {"seed": 0} and options["dir"] == str(tmp_path)
    assert wandb.logged == [{"student/train/loss": 0.5, "student/step": 5}]


def test_a_continued_run_is_the_same_one_for_wandb(tmp_path, wandb):
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        with records.wandb_listener("project", "name", {}, folder):
            pass
    first, again, other = (options["id"] for options in wandb.calls)
    assert first == again != other
    assert all(options["resume"] == "allow" for options in wandb.calls)


def test_wandb_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"config.wandb='p' needs wandb: pip install 'kd_jax\[wandb"
    ):
        records.wandb_listener("p", "name", {}, tmp_path).__enter__()


def test_wandb_refuses(tmp_path, wandb):
    def refuse(**_):
        raise wandb.Error("api_key not configured (no-tty).\n  Call wandb.login()")

    wandb.init = refuse
    with pytest.raises(UserError, match="no-tty.*WANDB_MODE=offline") as error:
        records.wandb_listener("p", "name", {}, tmp_path).__enter__()
    assert "\n" not in str(error.value)
