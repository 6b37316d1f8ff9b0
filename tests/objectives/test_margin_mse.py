import numpy as np
import pytest
import torch

from kd_jax.objectives import margin_mse
from tests.objectives import texts


@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_as_in_pytorch(score):
    rows = texts.batch()
    student, teacher = texts.vectors(rows, 4, 1), texts.vectors(rows, 7, 2)

    def margins(out):
        vectors = torch.tensor(np.asarray(out.features)[:16, 0])
        if score == "cosine":
            vectors = torch.nn.functional.normalize(vectors)
        anchors, positives, *negatives = vectors.reshape(4, 4, -1).unbind(1)
        positive = (anchors * positives).sum(1)
        return torch.stack([positive - (anchors * each).sum(1) for each in negatives])

    wanted = torch.nn.functional.mse_loss(margins(student), margins(teacher))
    found = texts.value(margin_mse.make(score=score), student, teacher, rows)
    assert found == pytest.approx(float(wanted), rel=1e-5)
