"""Lazy tensors: only what is asked for is read."""

import jax
import numpy as np
import pytest

from kd_jax import tensors

WHOLE = np.arange(24, dtype=np.float32).reshape(6, 4)


@pytest.fixture
def asked():
    """(a lazy tensor, the places of its parts that were read)."""
    places = []
    tensor = tensors.of_array(WHOLE, np.float32).checked(lambda part, at: places.append(at))
    return tensor, places


def test_reads_a_part(asked):
    tensor, places = asked
    part = tensor.read((slice(2, 4), slice(None)))
    np.testing.assert_array_equal(part, WHOLE[2:4])
    assert places == [(slice(2, 4, 1), slice(0, 4, 1))]
    part[:] = 0  # a copy
    assert WHOLE[2:4].all()


def test_shapes_and_types_are_known_without_reading(asked):
    tensor, places = asked
    half = tensor.astype("bfloat16")
    assert (tensor.ndim, tensor.size, tensor.nbytes, half.nbytes) == (2, 24, 96, 48)
    found = jax.eval_shape(lambda x: x.T, half)
    assert found.shape == (4, 6) and found.dtype == "bfloat16" and not places
    with pytest.raises(TypeError):
        jax.jit(lambda x: x)(tensor)


def test_a_type_is_changed_once():
    tensor = tensors.of_array(WHOLE / 3, np.float32)
    np.testing.assert_array_equal(tensor.astype("bfloat16").astype("float32"), WHOLE / 3)
    rounded = tensor.astype("bfloat16")
    assert rounded.read().dtype == "bfloat16"
    doubled = (rounded * 2.0).astype("float32")  # of what was rounded
    np.testing.assert_array_equal(doubled, (WHOLE / 3).astype("bfloat16").astype("float32") * 2)


def test_padded(asked):
    tensor, places = asked
    padded = tensor.padded(8)
    np.testing.assert_array_equal(padded, np.pad(WHOLE, [(0, 2), (0, 0)]))
    places.clear()
    np.testing.assert_array_equal(padded.read((slice(5, 8), slice(1, 3)))[:, 0], [21, 0, 0])
    assert places == [(slice(5, 6, 1), slice(1, 3, 1))]
    assert not padded.read((slice(6, 8),)).any()


def test_stacked(asked):
    tensor, places = asked
    whole = tensors.stacked([tensors.of_array(-WHOLE, np.float32), tensor, tensor])
    np.testing.assert_array_equal(whole, np.stack([-WHOLE, WHOLE, WHOLE]))
    places.clear()
    part = whole.read((slice(0, 2), slice(1, 3)))
    np.testing.assert_array_equal(part, np.stack([-WHOLE, WHOLE])[:, 1:3])
    assert places == [(slice(1, 3, 1), slice(0, 4, 1))]
