import jax
import numpy as np
import pytest

from kd_jax.errors import UserError
from kd_jax.objectives import pkd
from kd_jax.types import ModelSpec
from tests.objectives.outputs import batch, output


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [("skip", [(1, 2), (2, 4)]), ("last", [(1, 4), (2, 5)]), (((3, 1),), [(3, 1)])],
)
def test_mean_over_rows_layers_and_units(layers, pairs):
    rows = batch()
    rows = rows.replace(mask_BT=rows.mask_BT.at[3].set(0))  # fills the batch up
    student, teacher = output(rows, 3, 8, seed=1), output(rows, 6, 8, seed=2)
    term = pkd.make(layers)
    wanted = 0.0
    for s, t in pairs:
        ours, theirs = (
            np.asarray(out.hidden[i], np.float64)[:3, 0] for out, i in ((student, s), (teacher, t))
        )
        ours, theirs = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (ours, theirs))
        wanted += np.square(ours - theirs).mean(axis=1).sum() / len(pairs)
    np.testing.assert_allclose(term.total({}, student, teacher, rows), wanted, rtol=1e-5)
    np.testing.assert_array_equal(term.weights(rows), [1, 1, 1, 0])
    assert term.init(jax.random.key(0), ModelSpec(8, 3), ModelSpec(8, 6)) == {}


def test_widths_have_to_agree():
    message = "pkd: the student is 5 wide and the teacher 8, .* use objective.hidden"
    with pytest.raises(UserError, match=message):
        pkd.make().init(jax.random.key(0), ModelSpec(5, 3), ModelSpec(8, 6))
