import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kd_jax.errors import UserError
from kd_jax.objectives import similarity
from kd_jax.types import ModelOutput
from tests.objectives import texts

ROWS = texts.batch()


def scores(out, kind):
    """(16, 15): of each text that does not fill the batch up with the others."""
    vectors = torch.tensor(np.asarray(out.features)[:16, 0])
    if kind == "cosine":
        vectors = torch.nn.functional.normalize(vectors)
    return (vectors @ vectors.T)[~torch.eye(16, dtype=bool)].reshape(16, 15)


@pytest.mark.parametrize("score", ["cosine", "dot"])
@pytest.mark.parametrize("other", [None, 2.0])
def test_as_in_pytorch(score, other):
    student, teacher = texts.vectors(ROWS, 4, 1), texts.vectors(ROWS, 7, 2)
    ours = torch.log_softmax(scores(student, score) / 0.5, dim=1)
    theirs = torch.softmax(scores(teacher, score) / (other or 0.5), dim=1)
    wanted = 0.25 * torch.nn.functional.kl_div(ours, theirs, reduction="batchmean")
    term = similarity.make(score=score, teacher_temperature=other)
    assert texts.value(term, student, teacher, ROWS) == pytest.approx(float(wanted), rel=1e-4)
    plain = similarity.make(score=score, teacher_temperature=other, t_squared=False)
    found = texts.value(plain, student, teacher, ROWS)
    assert found == pytest.approx(4 * float(wanted), rel=1e-4)


def test_by_hand():
    """Three texts: the teacher finds the first two alike, the student the last two."""
    rows = texts.batch(3, 1, filling=0)
    x, y = [1.0, 0.0], [0.0, 1.0]
    student, teacher = (
        ModelOutput(jnp.asarray(vectors)[:, None], None, None) for vectors in ([x, y, y], [x, x, y])
    )
    # Scores over T of a text with the other two are (0, 0), (0, 2), (0, 2) and (2, 0), (2, 0), (0,
    # 0); softmax of (2, 0) is (p, q), log p - log q = 2.
    p = 1 / (1 + math.exp(-2))
    q = 1 - p
    entropy = p * math.log(p) + q * math.log(q)
    first = entropy + math.log(2)
    second = 2 * (p - q)  # mean of log p - log q
    third = -math.log(2) - 0.5 * (math.log(p) + math.log(q))
    found = texts.value(similarity.make(), student, teacher, rows)
    assert found == pytest.approx(0.25 * (first + second + third) / 3, rel=1e-5)


def test_mistakes():
    with pytest.raises(
        UserError, match="similarity: teacher_temperature=0.0 must be at least 0.01"
    ):
        similarity.make(teacher_temperature=0.0)
    with pytest.raises(UserError, match="objective similarity: score='l2': have cosine, dot"):
        similarity.make(score="l2")
