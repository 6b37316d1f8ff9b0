import functools
import http.server
import json
import re
import threading
import time

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from kd_jax import hub
from kd_jax.data import source
from kd_jax.errors import UserError

ROWS = ["", " = One = \n", "", " text \n", " = Two = \n", " more \n"]
CARD = """---
configs:
- config_name: raw
  data_files:
  - {split: train, path: raw/train-*}
  - {split: test, path: raw/test-*}
- config_name: other
  data_files:
  - {split: train, path: raw/test-*}
---
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A local folder in the hub's layout."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "wiki"
    (folder / "raw").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for split, rows in (("train", ROWS), ("test", ROWS[4:])):
        table = pyarrow.table({"text": rows, "number": list(range(len(rows)))})
        pyarrow.parquet.write_table(table, folder / "raw" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def read(path, where="data.train", **keys):
    return source.read({"source": "hub", "path": path, **keys}, where)


def test_a_local_folder_in_hub_layout(repository):
    assert list(read(repository, name="raw")) == ["= One =\ntext", "= Two =\nmore"]
    assert list(read(repository, "data.test", name="raw")) == ["= Two =\nmore"]
    assert list(read(repository, "data.test", name="raw", split="train[:4]")) == ["= One =\ntext"]


def test_mistakes_list_what_there_is(repository):
    with pytest.raises(UserError, match=r"train.name='row' .*Available: \['raw', 'other'\]"):
        read(repository, name="row")
    with pytest.raises(UserError, match=r"train.name=None .*available configs: \['raw', 'other'\]"):
        read(repository)
    with pytest.raises(UserError, match=r"validation.split='validation': .*'train', 'test'"):
        read(repository, "data.validation", name="raw")
    with pytest.raises(UserError, match="no column 'txt'; set config.data.train.text .*: text$"):
        read(repository, name="raw", text="txt")
    with pytest.raises(UserError, match="no text in 'number'; set .*: text$"):
        read(repository, name="raw", text="number")


def test_a_split_of_blank_rows_is_an_error(repository):
    with pytest.raises(UserError, match="raw:train.:1. .config.data.train. holds no text"):
        read(repository, name="raw", split="train[:1]")


@pytest.fixture
def server(monkeypatch):
    """A hub on this machine: `server.answer` is (status, headers, body), or None for silence."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.paths.append(self.path)
            if server.answer is None:
                silence.wait(10)
                return
            status, headers, body = server.answer
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    silence = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.answer, server.paths = None, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    api = functools.partial(huggingface_hub.HfApi, endpoint=endpoint, token=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    yield server
    silence.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    "status, code, revision, reason",
    [
        (404, "RevisionNotFound", "v9", "no revision 'v9'"),
        (404, "RepoNotFound", None, "is unknown to the hub, or private"),
        (401, "RepoNotFound", None, "is unknown to the hub, or private"),
        (403, "GatedRepo", None, "is gated: accept its licence"),
        (503, "", None, "the hub answers: .*503"),
    ],
)
def test_what_the_hub_refuses_says_what_to_change(server, status, code, revision, reason):
    server.answer = (status, {"X-Error-Code": code}, b"{}")
    with pytest.raises(UserError) as caught:
        read("some/dataset", revision=revision)
    message = str(caught.value)
    assert re.search(reason, message)
    for part in ("'some/dataset'", "HF_TOKEN", "HF_HUB_OFFLINE", ":smoke"):
        assert part in message
    assert "config.data.train.source='files'" in message and "\n" not in message


def test_silence_counts_as_unreachable(server, monkeypatch):
    monkeypatch.setattr(hub, "ANSWER_WITHIN", 0.3)
    start = time.monotonic()
    with pytest.raises(UserError, match="'some/dataset' .* cannot be reached"):
        read("some/dataset")
    assert time.monotonic() - start < 3


def test_a_name_that_nobody_looks_up_counts_as_unreachable(monkeypatch):
    monkeypatch.setattr(hub, "ANSWER_WITHIN", 0.2)
    stuck = threading.Event()
    # The address is looked up before any timeout of the client begins.
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **keys: stuck.wait(20))
    start = time.monotonic()
    with pytest.raises(UserError, match="no answer in"):
        read("some/dataset")
    stuck.set()
    assert time.monotonic() - start < 3


def test_the_commit_is_pinned(server, monkeypatch):
    body = json.dumps({"id": "some/dataset", "sha": "c0ffee"}).encode()
    server.answer = (200, {"Content-Type": "application/json"}, body)
    asked = []

    def load_dataset(path, name, split, revision):
        asked.append((path, name, split, revision))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = read("some/dataset", name="raw", revision="main")
    assert server.paths == ["/api/datasets/some/dataset/revision/main"]
    assert asked == [("some/dataset", "raw", "train", "c0ffee")]
    assert documents.commit == "c0ffee" and list(documents) == ["a"]


def test_offline_mode_goes_to_the_cache(monkeypatch, caplog):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = []

    def load_dataset(path, name, split, revision):
        asked.append(revision)
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="'some/dataset'.*Couldn't reach it.*: unset HF_HUB_OFF"):
        read("some/dataset", revision="v1")
    assert asked == ["v1"] and "which need not be revision 'v1'" in caplog.text


def test_rows_without_a_class_have_none(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        label=datasets.ClassLabel(names=["no", "yes"]), number=datasets.Value("int64")
    )
    rows = {"label": [1, -1, 0], "number": [1, -1, 0]}
    (tmp_path / "own").mkdir()
    file = tmp_path / "own" / "train.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file))
    found = source.table({"source": "hub", "path": str(tmp_path / "own")}, "data.train")
    assert found.columns == {"label": [1, None, 0], "number": [1, -1, 0]}
