import numpy as np
import pytest
import torch

from kd_jax.objectives import contrastive
from tests.objectives import texts


def normalized(out):
    """(4, 4, D): of each example that does not fill the batch up."""
    vectors = torch.tensor(np.asarray(out.features)[:16, 0])
    return torch.nn.functional.normalize(vectors).reshape(4, 4, -1)


def test_as_in_pytorch():
    """sentence-transformers' MultipleNegativesRankingLoss at a scale of 20, and its symmetric one
    without given negatives."""
    rows, right = texts.batch(), torch.arange(4)
    student = texts.vectors(rows, 5, 1)
    anchors, *others = normalized(student).unbind(1)
    scores = 20 * anchors @ torch.cat(others).T
    wanted = torch.nn.functional.cross_entropy(scores, right)
    found = texts.value(contrastive.make(), student, None, rows, temperature=0.05)
    assert found == pytest.approx(float(wanted), rel=1e-5)
    back = torch.nn.functional.cross_entropy(scores[:, :4].T, right)
    found = texts.value(contrastive.make(symmetric=True), student, None, rows, temperature=0.05)
    assert found == pytest.approx(float(wanted + back) / 2, rel=1e-5)


def test_a_text_that_stands_there_twice_is_no_negative():
    """Neither the positive of another anchor nor the same anchor as a text of another example."""
    rows = texts.batch()
    ids = rows.ids_B.at[5].set(1)  # the second positive is the first one
    ids = ids.at[11].set(0)  # the third example's last negative is the first anchor
    student = texts.vectors(rows, 5, 1)
    anchors, *others = normalized(student).unbind(1)
    scores = 20 * anchors @ torch.cat(others).T
    scores[0, [1, 10]] = -torch.inf  # others: 4 positives, 4 negatives, 4 more
    scores[1, 0] = -torch.inf
    wanted = torch.nn.functional.cross_entropy(scores, torch.arange(4))
    again = rows.replace(ids_B=ids)
    found = texts.value(contrastive.make(), student, None, again, temperature=0.05)
    assert found == pytest.approx(float(wanted), rel=1e-5)
