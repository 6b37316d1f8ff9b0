"""The hub's real client against a small hub on this machine."""

import http.server
import json
import re
import threading
import time

import huggingface_hub.constants
import pytest

from kd_jax import hub
from kd_jax.errors import UserError

COMMIT = "0123456789" * 4
FILES = {
    "config.json": b'{"model_type": "bert"}',
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same weights",
    "vocab.txt": b"a\nb\n",
    "onnx/config.json": b"unwanted",
    "1_Pooling/config.json": b"{}",
    "2_Dense/config.json": b"{}",
    "2_Dense/pytorch_model.bin": b"weights of a layer",
    "2_Dense/openvino/model.bin": b"unwanted",
}


class FakeHub(http.server.BaseHTTPRequestHandler):
    """`org/good`, `org/pickled` (no safetensors), `org/locked`, `org/slow`; all else is unknown."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        kind, _, rest = path.removeprefix("/api/models/").removeprefix("/org/").partition("/")
        if "/api/models/org/" in path:
            kind, _, rest = path.removeprefix("/api/models/org/").partition("/")
        files = dict(FILES)
        if kind == "pickled":
            del files["model.safetensors"]
        if kind == "slow":
            time.sleep(5)
        if kind not in ("good", "pickled", "locked", "slow"):
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        elif rest in ("", "revision/main", "revision/v1", f"revision/{COMMIT}") and path.startswith(
            "/api"
        ):
            self.answer(200, {}, json.dumps({"id": f"org/{kind}", "sha": COMMIT}).encode())
        elif rest.startswith("revision/"):
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif kind == "locked":
            self.answer(403, {"X-Error-Code": "GatedRepo"})
        elif rest.startswith("tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": f"{i:040x}"}
                for i, (name, data) in enumerate(files.items())
            ]
            self.answer(200, {}, json.dumps(tree).encode())
        else:
            data = files[rest.removeprefix(f"resolve/{COMMIT}/")]
            self.answer(200, {"ETag": f'"{hash(data):x}"', "X-Repo-Commit": COMMIT}, data)

    do_HEAD = do_GET

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture(autouse=True)
def client(server, tmp_path, monkeypatch):
    """The hub's client, with an empty cache and the small hub."""
    hub._download.cache_clear()  # as in a new process
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server)
    template = server + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("name, weights", [("good", ".safetensors"), ("pickled", ".bin")])
def test_downloads_once_and_then_needs_no_hub(name, weights, monkeypatch):
    source = hub.resolve(f"org/{name}")
    assert source.commit == COMMIT
    names = {path.name for path in source.path.iterdir()}
    assert {"config.json", "vocab.txt"} < names and "onnx" not in names
    assert {path.suffix for path in source.path.glob("*model*")} == {weights}
    inside = {f"{path.parent.name}/{path.name}" for path in source.path.glob("*/*")}
    assert inside == {f"2_Dense/{name}" for name in ("config.json", "pytorch_model.bin")} | {
        "1_Pooling/config.json"
    }
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.resolve(f"org/{name}") == source
    assert hub.resolve(f"org/{name}", COMMIT) == source


def again(model, revision=None):
    """As a new process would."""
    hub._download.cache_clear()
    return hub.resolve(model, revision)


def test_a_cached_commit_is_taken_aloud_or_refused(monkeypatch, caplog):
    caplog.set_level("WARNING")
    source = hub.resolve("org/good")
    assert hub.resolve("org/good", "v1").path == source.path
    assert not caplog.messages
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert again("org/good") == again("org/good", "main") == source
    says = f"model org/good: the hub cannot be reached .*refused.*; taking commit {COMMIT} of the"
    assert len(caplog.messages) == 2 and all(re.match(says, line) for line in caplog.messages)
    caplog.clear()
    assert again("org/good", COMMIT) == source and not caplog.messages
    with pytest.raises(UserError, match=f"'v1' need not be commit {COMMIT}.*HF_HUB_OFFLINE=1"):
        again("org/good", "v1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert again("org/good", "v1") == source
    (line,) = caplog.messages
    assert line.startswith(f"model org/good: HF_HUB_OFFLINE is set; taking commit {COMMIT}")


@pytest.mark.parametrize(
    "model, revision, says",
    [
        ("org/none", None, "unknown to the hub"),
        ("org/good", "v9", "no revision 'v9'"),
        ("org/locked", None, "gated"),
        ("no such/id", None, "neither a folder nor a hub id"),
    ],
)
def test_refusals_name_what_to_change(model, revision, says):
    with pytest.raises(UserError, match=says) as error:
        hub.resolve(model, revision)
    for word in (model, "HF_TOKEN", "teacher.model", "student.model", ":smoke"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_unreachable_silent_and_offline_hubs(monkeypatch):
    monkeypatch.setattr(hub, "ANSWER_WITHIN", 0.2)
    with pytest.raises(UserError, match="cannot be reached .no answer in 0 s"):
        hub.resolve("org/slow")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached .*refused"):
        hub.resolve("org/good")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids the hub; unset it") as error:
        hub.resolve("org/good")
    assert str(error.value).count("HF_HUB_OFFLINE") == 1


def test_local_folders(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        hub.resolve(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        hub.resolve(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    assert hub.resolve(str(tmp_path)) == hub.Source(tmp_path, None)
    assert hub.resolve(str(tmp_path), "main") == hub.Source(tmp_path, None)  # as configs have it
    with pytest.raises(UserError, match="a folder has no revision 'v1'; leave it out"):
        hub.resolve(str(tmp_path), "v1")
