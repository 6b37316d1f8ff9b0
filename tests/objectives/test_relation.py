import jax
import numpy as np
import pytest

from kd_jax.errors import UserError
from kd_jax.objectives import attention, relation
from kd_jax.types import ModelSpec
from tests.objectives.outputs import batch, output
from tests.objectives.test_attention import softmax

KEY = jax.random.key(0)
MINILM = ("qk", "vv")


def naive(student, teacher, lengths, relations, count, layer_pair, causal=False):
    """Sum over tokens and relations of the mean over heads, row by row; scale K^(-1/2) in q."""

    def probs(out, layer, row, length):
        own = out.attention[layer - 1]
        parts = {"q": own.q_BTHK * own.q_BTHK.shape[-1] ** 0.5, "k": own.k_BTGK, "v": own.v_BTGK}
        found = []
        for m, n in relations:
            # The heads side by side, cut into `count`.
            x, y = (
                np.asarray(parts[p][row, :length], np.float64).reshape(length, -1) for p in (m, n)
            )
            for x_h, y_h in zip(np.split(x, count, 1), np.split(y, count, 1), strict=True):
                scores = x_h @ y_h.T / np.sqrt(x_h.shape[1])
                if causal:
                    scores = np.where(np.tri(length, dtype=bool), scores, -1e30)
                found.append(softmax(scores))
        return np.array(found)

    total = 0.0
    for row, length in enumerate(lengths):
        p = probs(student, layer_pair[0], row, length)
        q = probs(teacher, layer_pair[1], row, length)
        total += (q * np.log(np.maximum(q, 1e-300) / np.maximum(p, 1e-300))).sum() / count
    return total


@pytest.mark.parametrize("relations", [("qq", "kk", "vv"), MINILM, (("k", "q"),)])
@pytest.mark.parametrize("count", [0, 2, 8])
@pytest.mark.parametrize("causal", [False, True])
def test_sum_of_relations(relations, count, causal):
    """Models of 2 and 4 heads, 8 and 16 wide: relation heads cut both anew."""
    rows = batch()
    student = output(rows, 2, 8, seed=1, heads=2 if count else 4)
    teacher = output(rows, 6, 16, seed=2, heads=4)
    term = relation.make(relations, count, "last", causal)
    wanted = naive(student, teacher, (6, 3, 6, 6), relations, count or 4, (2, 6), causal)
    np.testing.assert_allclose(term.total({}, student, teacher, rows), wanted, rtol=2e-6)
    np.testing.assert_array_equal(term.weights(rows), rows.mask_BT)
    heads = 2 if count else 4
    assert term.init(KEY, ModelSpec(8, 2, heads, causal), ModelSpec(16, 6, 4, causal)) == {}


def test_a_teacher_layer_of_choice():
    rows = batch()
    student, teacher = output(rows, 2, 8, 1, heads=2), output(rows, 6, 8, 2, heads=2)
    term = relation.make(layers=((2, 5),))
    wanted = naive(student, teacher, (6, 3, 6, 6), ("qq", "kk", "vv"), 2, (2, 5))
    np.testing.assert_allclose(term.total({}, student, teacher, rows), wanted, rtol=2e-6)


def test_queries_and_keys_give_the_attention_whatever_its_scale():
    rows = batch()
    student, teacher = output(rows, 2, 8, 1, heads=2), output(rows, 6, 8, 2, heads=2)
    wanted = attention.make("kl", "last").total({}, student, teacher, rows)
    found = relation.make(("qk",)).total({}, student, teacher, rows)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "student", "message"),
    [
        ({"relations": ("qx",)}, {}, "relations=.'qx',.: give pairs of q, k, v"),
        ({"relations": ("q",)}, {}, "relations=.'q',.: give pairs of q, k, v"),
        ({"relations": "qq"}, {}, "relations='qq': give pairs of q, k, v"),
        ({"relations": 2}, {}, "relations=2: give pairs of q, k, v"),
        ({"relations": ()}, {}, r"relations=\(\): give pairs of q, k, v"),
        ({"relation_heads": -1}, {}, "relation_heads=-1 must be at least 0"),
        ({"relation_heads": "4"}, {}, "relation_heads='4' should be a whole number"),
        ({}, {"num_heads": 3}, "the student has 3 heads and the teacher 4: set relation_heads"),
        ({}, {"causal": True}, "relation: causal=False, but a query of the student"),
    ],
)
def test_mistakes(settings, student, message):
    own = {"width": 12, "num_layers": 2, "num_heads": 4} | student
    with pytest.raises(UserError, match=message):
        relation.make(**settings).init(KEY, ModelSpec(**own), ModelSpec(12, 6, 4))


def test_relation_heads_have_to_divide_both_widths():
    rows = batch()
    student, teacher = output(rows, 2, 8, 1, heads=2), output(rows, 2, 12, 2, heads=2)
    for count, width, whose in ((8, 12, "teacher"), (3, 8, "student")):
        message = f"relation_heads={count} does not divide the {width} units of the {whose}'s heads"
        with pytest.raises(UserError, match=message):
            relation.make(relation_heads=count).total({}, student, teacher, rows)
