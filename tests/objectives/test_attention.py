import jax
import numpy as np
import pytest

from kd_jax.errors import UserError
from kd_jax.objectives import attention, relation
from kd_jax.types import ModelSpec
from tests.objectives.outputs import batch, output

KEY = jax.random.key(0)


def softmax(scores):
    exps = np.exp(scores - scores.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def scores(heads, row, keys):
    """(H, keys): the last of so many tokens as the query; float64."""
    q = np.asarray(heads.q_BTHK[row], np.float64)
    k = np.asarray(heads.k_BTGK[row, :keys], np.float64)
    return np.einsum("thk,shk->hts", q, k)


def naive(kind, student, teacher, lengths, pairs, mean=False, causal=False):
    """Sum over tokens of the mean over pairs and heads, query by query, without any mask."""
    total = 0.0
    for row, length in enumerate(lengths):
        for query in range(length):
            keys = query + 1 if causal else length
            for s, t in pairs:
                ours = scores(student.attention[s - 1], row, keys)[:, query]
                theirs = scores(teacher.attention[t - 1], row, keys)[:, query]
                if kind == "kl":
                    ours, theirs = softmax(ours), softmax(theirs)
                if mean:
                    ours, theirs = ours.mean(0, keepdims=True), theirs.mean(0, keepdims=True)
                if kind == "kl":
                    each = (theirs * np.log(theirs / ours)).sum(-1)
                else:
                    each = ((ours - theirs) ** 2).mean(-1)
                total += each.mean() / len(pairs)
    return total


@pytest.mark.parametrize("kind", ["scores_mse", "kl"])
@pytest.mark.parametrize("heads", ["each", "mean"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layers", ["uniform", ((2, 5),)])
def test_mean_over_pairs_heads_and_tokens(kind, heads, causal, layers):
    rows = batch()
    student = output(rows, 2, 8, seed=1, heads=4 if heads == "each" else 2)
    teacher = output(rows, 6, 12, seed=2, heads=4)
    term = attention.make(kind, layers, heads, causal)
    pairs = ((1, 3), (2, 6)) if layers == "uniform" else layers
    wanted = naive(kind, student, teacher, (6, 3, 6, 6), pairs, heads == "mean", causal)
    np.testing.assert_allclose(term.total({}, student, teacher, rows), wanted, rtol=2e-6)
    np.testing.assert_array_equal(term.weights(rows), rows.mask_BT)
    specs = [ModelSpec(8, n, 4, causal) for n in (2, 6)]
    assert term.init(KEY, *specs) == {}


@pytest.mark.parametrize(
    ("settings", "student", "message"),
    [
        ({"kind": "mse"}, {}, "attention: kind='mse': have kl, scores_mse"),
        ({"heads": "some"}, {}, "attention: heads='some': have each, mean"),
        ({}, {"num_heads": 3}, "the student has 3 heads and the teacher 4: .* heads='mean'"),
        ({}, {"causal": True}, "causal=False, but a query of the student sees keys at or before"),
        ({}, {"biased": True}, "the student adds biases to its scores .MPNet., of which"),
        ({"causal": True}, {"causal": True}, "causal=True, but a query of the teacher sees all"),
    ],
)
def test_mistakes(settings, student, message):
    own = {"width": 12, "num_layers": 2, "num_heads": 4} | student
    with pytest.raises(UserError, match=message):
        attention.make(**settings).init(KEY, ModelSpec(**own), ModelSpec(12, 6, 4))


@pytest.mark.parametrize("term", [attention.make(layers="last"), relation.make(("qk", "vv"))])
def test_heads_that_share_keys_and_values(term):
    rows = batch()
    teacher, other = (output(rows, 2, 12, seed, heads=4).attention[-1] for seed in (1, 2))
    student = other.replace(k_BTGK=other.k_BTGK[:, :, :2], v_BTGK=other.v_BTGK[:, :, :2])
    spread = student.replace(
        k_BTGK=student.k_BTGK[:, :, [0, 0, 1, 1]], v_BTGK=student.v_BTGK[:, :, [0, 0, 1, 1]]
    )
    out = output(rows, 2, 12, 3)
    totals = [
        term.total({}, *(out.replace(attention=(x,)) for x in (own, teacher)), rows)
        for own in (student, spread, other)
    ]
    assert totals[0] == totals[1] != totals[2]


def test_layers_of_one_model_may_differ_in_heads():
    rows = batch()
    three, four = (output(rows, 1, 12, 1, heads=heads) for heads in (3, 4))
    student = three.replace(attention=three.attention + four.attention)
    teacher = output(rows, 2, 12, 2, heads=4)
    specs = ModelSpec(12, 2, 0), ModelSpec(12, 2, 4)
    last = attention.make(layers="last")
    assert last.init(KEY, *specs) == {}
    assert last.total({}, student, teacher, rows) > 0
    with pytest.raises(UserError, match="the student has 3 heads and the teacher 4"):
        attention.make(layers="uniform").total({}, student, teacher, rows)


def test_other_head_counts_are_no_broadcast():
    rows = batch()
    student, teacher = output(rows, 2, 8, 1), output(rows, 2, 8, 2, heads=2)
    with pytest.raises(UserError, match="the student has 1 heads and the teacher 2"):
        attention.make().total({}, student, teacher, rows)
