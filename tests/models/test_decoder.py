import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import plugins
from kd_jax.errors import UserError
from kd_jax.models import decoder
from kd_jax.types import Batch
from tests.models import tiny

CAUSAL = [
    name
    for name in tiny.CONFIGS
    if "clm" in plugins.load("models", name, "FAMILY").FAMILY.architectures
]
SHARED, ENDINGS = 5, ((3, 4, 5), (6,), (7, 8))  # tokens of the beginning; the continuations


def packed(length=16):
    """All continuations in one row, padded; a second row that has one and begins with nothing."""
    tokens, segments_T = [11, 12, 13, 14, 15], [0] * SHARED
    for number, ending in enumerate(ENDINGS, 1):
        tokens += ending
        segments_T += [number] * len(ending)
    rows = [(tokens, segments_T), ([9, 10], [1, 1])]
    tokens_BT, segments_BT = np.zeros((2, length), np.int32), np.full((2, length), 3, np.int32)
    mask_BT = np.zeros((2, length), np.float32)
    for row, (ids, numbers) in enumerate(rows):
        tokens_BT[row, : len(ids)], segments_BT[row, : len(ids)] = ids, numbers
        mask_BT[row, : len(ids)] = 1.0
    zeros = np.zeros_like(tokens_BT)
    return Batch(np.arange(2), tokens_BT, mask_BT, zeros, mask_BT, segments_BT=segments_BT)


def test_positions_go_on_from_the_end_of_the_beginning():
    found = decoder.positions(jax.tree.map(jnp.asarray, packed()), 40)
    assert found[0, :11].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5, 5, 6]
    assert found[1, :2].tolist() == [0, 1]
    assert decoder.positions(packed().replace(segments_BT=None), 40).tolist() == [[*range(16)]]
    with pytest.raises(UserError, match="rows of 16 tokens, but the model has positions for 15"):
        decoder.positions(packed().replace(segments_BT=None), 15)


logits = jax.jit(lambda model, batch: model(batch).logits)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_continuation_is_what_it_is_in_a_row_of_its_own(name):
    model = tiny.model(name, "clm")
    run = lambda batch: np.asarray(logits(model, batch))  # noqa: E731
    together = run(packed())

    def alone(tokens):
        tokens_BT, mask_BT = np.zeros((2, 16), np.int32), np.zeros((2, 16), np.float32)
        tokens_BT[0, : len(tokens)], mask_BT[0, : len(tokens)] = tokens, 1.0
        return run(Batch(np.arange(2), tokens_BT, mask_BT, np.zeros_like(tokens_BT), mask_BT))[0]

    def same(found, wanted):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)

    begin = SHARED
    for ending in ENDINGS:
        wanted = alone([11, 12, 13, 14, 15, *ending])
        same(together[0, :SHARED], wanted[:SHARED])
        same(together[0, begin : begin + len(ending)], wanted[SHARED : SHARED + len(ending)])
        begin += len(ending)
    same(together[1, :2], alone([9, 10])[:2])
