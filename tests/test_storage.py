import json
import os
import subprocess
import sys

import pytest
import xxhash

from kd_jax import storage
from kd_jax.errors import UserError


def test_json_comes_back_and_is_json_to_others(tmp_path):
    path, value = tmp_path / "results.json", {"loss": 0.1, "kl": None, "of": {"1": ["é"]}}
    storage.write_json(path, value | {"of": {1: ("é",)}})
    assert storage.read_json(path) == value
    assert json.loads(path.read_text()).keys() == value.keys() | {"digest"}
    storage.write_json(path, [1, 2])
    assert json.loads(path.read_text()) == storage.read_json(path) == [1, 2]


def test_what_is_not_finite_is_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    storage.write_json(tmp_path / "a.json", {"kl": nan, "all": [1.0, -inf, {"x": inf}]})
    assert storage.read_json(tmp_path / "a.json") == {"kl": None, "all": [1.0, None, {"x": None}]}
    assert "NaN" not in (tmp_path / "a.json").read_text()


def test_a_wrong_bit_anywhere_is_one_line_that_names_the_file(tmp_path):
    path, value = tmp_path / "results.json", {"loss": 0.125, "name": "é", "list": [1, 2]}
    storage.write_json(path, value)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            found = storage.read_json(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:  # white space, or the name of the key "digest"
            assert {key: found[key] for key in value} == value
    for cut in (b"", whole[:9]):
        path.write_bytes(cut)
        with pytest.raises(UserError, match="results.json: damaged, it is no JSON .*; remove it"):
            storage.read_json(path)


def test_a_wrong_bit_anywhere_changes_the_digest(tmp_path):
    path, content = tmp_path / "a.npy", bytes(range(256)) * 8
    path.write_bytes(content)
    digest = storage.digest(path)
    assert digest == xxhash.xxh3_128_hexdigest(content) and len(digest) == 32
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        assert storage.digest(path) != digest
    path.write_bytes(content[:-1])
    assert storage.digest(path) != digest


def test_a_file_is_held_until_it_is_let_go(tmp_path):
    held = storage.hold(tmp_path / "lock")
    assert storage.hold(tmp_path / "lock") is None  # this process itself
    code = f"from kd_jax import storage; storage.hold({str(tmp_path / 'lock')!r})"
    other = [sys.executable, "-c", code]
    refused = subprocess.run(other, capture_output=True, text=True)
    assert f"UserError: {tmp_path} is in use by process {os.getpid()} on " in refused.stderr
    held.release()
    assert (tmp_path / "lock").read_text() == ""
    assert subprocess.run(other, capture_output=True).returncode == 0


def test_what_another_host_left_is_said(tmp_path, caplog):
    (tmp_path / "lock").write_text("process 7 on elsewhere")
    assert storage.hold(tmp_path / "lock") is not None
    assert f"{tmp_path} was left by process 7 on elsewhere" in caplog.text


def test_no_link_is_followed_to_what_is_held(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "file")
    with pytest.raises(OSError):
        storage.hold(tmp_path / "lock")
    assert (tmp_path / "file").read_text() == "mine"


def test_set_aside_loses_nothing(tmp_path):
    for text in ("one", "two"):
        (tmp_path / "a.csv").write_text(text)
        storage.set_aside(storage.epath.Path(tmp_path / "a.csv"), tmp_path / "damaged")
    found = {path.name: path.read_text() for path in (tmp_path / "damaged").iterdir()}
    assert found == {"a.csv": "one", "a.csv-2": "two"}
