import numpy as np
import pytest
from scipy import special

from kd_jax.evals.classification import beside_teacher


def wanted(student_NC, teacher_NC):
    p, q = special.softmax(teacher_NC, -1), special.softmax(student_NC, -1)
    return {
        "kl": float(np.mean(special.rel_entr(p, q).sum(-1))),
        "agreement": float(np.mean(p.argmax(-1) == q.argmax(-1))),
    }


def test_one_answer_a_row():
    student, teacher = np.random.default_rng(0).normal(0, 2, (2, 30, 4))
    found = beside_teacher(list(student), list(teacher))
    assert found == pytest.approx(wanted(student, teacher))
    assert 0 < found["agreement"] < 1
    assert beside_teacher(list(student), list(student)) == {"kl": 0.0, "agreement": 1.0}


def test_answers_over_rows_of_different_lengths_count_alike():
    rng = np.random.default_rng(0)
    pairs = [rng.normal(0, 2, (2, 2, length)) for length in (3, 9, 5)]
    each = [wanted(student, teacher) for student, teacher in pairs]
    found = beside_teacher(*zip(*pairs, strict=True))
    for name in ("kl", "agreement"):
        assert found[name] == pytest.approx(np.mean([one[name] for one in each]))
