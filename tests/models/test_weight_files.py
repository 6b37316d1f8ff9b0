"""Files of tensors: read without copies, written one tensor after the other."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from kd_jax.errors import UserError
from kd_jax.models import weight_files

SHAPES = {"b": (3, 5), "a": (7,), "c": (2, 2, 2)}


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def test_writes_what_safetensors_reads(tmp_path, arrays):
    weight_files.write(tmp_path, SHAPES, iter(arrays.values()))
    found = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_large_models_have_several_files(tmp_path, arrays, monkeypatch):
    monkeypatch.setattr(weight_files, "FILE_BYTES", 70)
    weight_files.write(tmp_path, SHAPES, (array for array in arrays.values()))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, last = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    assert index == {
        "metadata": {"total_size": 4 * (15 + 7 + 8)},
        "weight_map": {"b": first, "a": last, "c": last},
    }
    found = weight_files.read(tmp_path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name].array, array)
    assert found["b"].where == f"{tmp_path / first}: b"


def test_maps_files_into_memory(tmp_path, arrays):
    small = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    safetensors.numpy.save_file(small | {"d": np.arange(3)}, tmp_path / "model.safetensors")
    found = weight_files.read(tmp_path)
    for name, array in small.items():
        assert found[name].array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found[name].array, array)
        assert not found[name].array.flags.owndata and not found[name].array.flags.writeable
    assert found["d"].array.tolist() == [0, 1, 2]


def test_pickles_are_mapped_too(tmp_path, arrays):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    state["h"] = state["b"].to(torch.bfloat16)
    state["p"] = torch.nn.Parameter(state["b"])
    path = tmp_path / "pytorch_model.bin"
    for newer in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=newer)
        found = weight_files.read(tmp_path)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name].array, array)
        half = arrays["b"].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(found["h"].array, half)
        np.testing.assert_array_equal(found["p"].array, arrays["b"])


def test_an_unknown_type_is_named(tmp_path):
    header = {"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"0")
    with pytest.raises(UserError, match="model.safetensors: x is of type F4; have: BF16, "):
        weight_files.read(tmp_path)
