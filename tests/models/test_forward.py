"""What the forward pass promises besides the numbers of PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import plugins
from kd_jax.errors import UserError
from kd_jax.models import (
    attention,
    bottleneck,
    decoder,
    encoder,
    flash,
    heads,
    layers,
    modernbert,
)
from kd_jax.precision import Policy
from tests import IN_ORDER
from tests.models import tiny

FAMILIES = plugins.names("models", "FAMILY")


def features(params, model, batch, seed=None):
    return model.replace(params=params)(batch, seed).features


run = jax.jit(features)


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_nothing(name):
    # With trigrams a row's last token sees the padding after it, in HF too.
    changes = {"trigram_input": False} if name == "mobilebert" else {}
    model, batch = tiny.model(name, **changes), tiny.batch(name, length=8)
    batch = jax.device_get(batch)
    more = jax.tree.map(lambda x: np.pad(x, [(0, 0), (0, 4)]) if x.ndim == 2 else x, batch)
    garbage = np.where(more.mask_BT > 0, more.tokens_BT, tiny.PAD[name]).astype(np.int32)
    other = np.where(more.mask_BT > 0, more.tokens_BT, tiny.PAD[name] + 2).astype(np.int32)
    run = jax.jit(features, compiler_options=IN_ORDER)
    short = np.asarray(run(model.params, model, batch))
    long, also = (
        np.asarray(run(model.params, model, more.replace(tokens_BT=tokens_BT)))[:, :8]
        for tokens_BT in (garbage, other)
    )
    real = batch.mask_BT > 0
    np.testing.assert_array_equal(long[real], also[real])
    # Another shape is another program, whose sums may round otherwise: some ulps of the largest.
    np.testing.assert_allclose(short[real], long[real], atol=1e-6 * np.abs(short[real]).max())
    assert np.isfinite(run(model.params, model, batch.replace(mask_BT=0 * batch.mask_BT))).all()


def test_decoder_looks_back_only_and_encoder_both_ways():
    for name in ("gpt2", "bert"):
        model, batch = tiny.model(name), tiny.batch(name, rows=2, length=6)
        table = model.params["backbone"]["positions"]["embedding"]

        def at_three(table, model=model, batch=batch):
            backbone = model.params["backbone"] | {"positions": {"embedding": table}}
            return features(model.params | {"backbone": backbone}, model, batch)[0, 3, 0]

        touched = np.abs(np.asarray(jax.jit(jax.grad(at_three))(table))).sum(-1) > 0
        expected = [True] * 4 + [name == "bert"] * 2 + [False] * (len(touched) - 6)
        assert touched.tolist() == expected


def test_head_runs_at_the_positions_only():
    model, batch = tiny.model("bert"), tiny.batch("bert")
    positions = np.array([[3, 0, 3], [1, 2, 0], [19, 7, 5]], np.int32)
    some = run(model.params, model, batch.replace(positions_BP=positions))
    all_ = np.asarray(run(model.params, model, batch))
    np.testing.assert_allclose(some, all_[np.arange(3)[:, None], positions], atol=1e-6)
    lowered = run.lower(model.params, model, batch.replace(positions_BP=positions))
    assert "3x3x32" in lowered.as_text()  # (B, P, D) goes through the head's linear layer


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_remat_changes_memory_only(name):
    batch, seed = tiny.batch(name), jnp.uint32(7)
    weights = np.random.default_rng(1).standard_normal((3, 20, 32), np.float32)
    grads, barriers = [], []  # attention has some of its own
    for remat in (False, True):
        model = tiny.model(name, "none", remat=remat, num_hidden_layers=1)
        lowered = jax.jit(
            jax.grad(lambda p, m=model: (features(p, m, batch, seed) * weights).sum())
        ).lower(model.params)
        barriers.append(lowered.as_text().count("optimization_barrier"))
        grads.append(jax.device_get(lowered.compile()(model.params)))
    assert barriers[1] > barriers[0]
    whole = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(grads[0])))
    for one, two in zip(*map(jax.tree.leaves, grads), strict=True):
        size = max(np.linalg.norm(one), 1e-3 * whole)
        assert np.linalg.norm(one - two) <= 1e-5 * size


@pytest.mark.parametrize(
    "name, changes",
    [
        ("bert", {"num_hidden_layers": 1}),
        ("gpt2", {"scale_attn_weights": False, "n_layer": 1}),
        ("llama", {"attention_dropout": 0.1, "num_hidden_layers": 1}),
        ("modernbert", {"mlp_dropout": 0.2}),  # with a window, and without
    ],
)
def test_fused_attention_is_the_explicit_one(name, changes, monkeypatch):
    batch = tiny.batch(name)
    explicit = tiny.model(name, **changes)
    real = np.asarray(batch.mask_BT) > 0
    monkeypatch.setattr(attention, "SHORT", 1)
    monkeypatch.setattr(flash, "Kernels", functools.partial(flash.Kernels, interpret=True))
    seeds = (None, jnp.uint32(3))
    wanted = [run(explicit.params, explicit, batch, seed) for seed in seeds]
    for way in ("pallas", "blocks"):
        fused = tiny.model(name, policy=Policy(attention=way), **changes)
        for seed, want in zip(seeds, wanted, strict=True):
            found = run(fused.params, fused, batch, seed)
            np.testing.assert_allclose(*(np.asarray(x)[real] for x in (want, found)), atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_bf16_follows_fp32(name):
    batch = tiny.batch(name)
    whole, half = tiny.model(name), tiny.model(name, policy=Policy("bfloat16", "bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("float32")}
    ours, theirs = run(half.params, half, batch), run(whole.params, whole, batch)
    assert ours.dtype == jnp.bfloat16
    ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
    error = np.sqrt(np.mean((ours - theirs) ** 2))
    assert 1e-3 < error / np.std(theirs) < 0.02  # bfloat16 has 8 bits


# Dropout as PyTorch's modules apply it: the site's rate, in the order of the forward pass, for
# rates e (embeddings), a (attention weights), r (residual branches).
@pytest.mark.parametrize(
    "name, rates, block",
    [
        (
            "bert",
            {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3},
            (0.3, 0.2, 0.2),
        ),
        (
            "roberta",
            {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3},
            (0.3, 0.2, 0.2),
        ),
        ("distilbert", {"dropout": 0.2, "attention_dropout": 0.3}, (0.3, 0.0, 0.2)),
        (
            "modernbert",
            {"embedding_dropout": 0.2, "attention_dropout": 0.3, "mlp_dropout": 0.4},
            (0.3, 0.3, 0.4),
        ),
        ("gpt2", {"embd_pdrop": 0.2, "attn_pdrop": 0.3, "resid_pdrop": 0.4}, (0.3, 0.4, 0.4)),
        ("phi", {"embd_pdrop": 0.2, "attention_dropout": 0.3, "resid_pdrop": 0.4}, (0.3, 0.4, 0.4)),
    ],
)
def test_dropout_is_where_pytorch_has_it(name, rates, block, monkeypatch):
    seen = []

    def record(x, rate, seed, site, *_):
        seen.append((rate, site))
        return x

    for module in (encoder, decoder, modernbert, attention, layers):
        monkeypatch.setattr(module, "dropout", record)
    model, batch = tiny.model(name, **rates), tiny.batch(name)
    jax.eval_shape(lambda: model(batch, jnp.uint32(0)))
    assert [rate for rate, _ in seen] == [0.2, *block, *block]
    assert [site for _, site in seen] == list(range(7))


@pytest.mark.parametrize(
    "name, head, rates, expected",
    [
        ("bert", "classification", {"hidden_dropout_prob": 0.2}, [0.0, 0.2]),
        ("bert", "classification", {"classifier_dropout": 0.4}, [0.0, 0.4]),
        ("roberta", "classification", {"classifier_dropout": 0.4}, [0.4, 0.4]),
        ("distilbert", "classification", {}, [0.0, 0.2]),
        ("distilbert", "classification", {"seq_classif_dropout": 0.4}, [0.0, 0.4]),
        ("distilbert", "span", {"qa_dropout": 0.3}, [0.3]),
        ("electra", "classification", {"classifier_dropout": 0.4}, [0.4, 0.4]),
        ("bert", "span", {}, [0.0]),
        ("modernbert", "classification", {"classifier_dropout": 0.4}, [0.0, 0.4]),
        ("modernbert", "span", {"classifier_dropout": 0.4}, [0.4]),
    ],
)
def test_dropout_of_heads(name, head, rates, expected, monkeypatch):
    seen = {heads: [], attention: [], layers: []}
    for module, calls in seen.items():
        note = lambda x, rate, seed, site, *_, calls=calls: calls.append((rate, site)) or x  # noqa: E731
        monkeypatch.setattr(module, "dropout", note)
    model, batch = tiny.model(name, head, **rates), tiny.batch(name)
    jax.eval_shape(lambda: model(batch, jnp.uint32(0)))
    assert [rate for rate, _ in seen[heads]] == expected
    sites = [site for calls in seen.values() for rate, site in calls]
    assert len(set(sites)) == len(sites)


def test_a_classifier_reads_the_first_token_alone():
    model, batch = tiny.model("bert", "classification"), tiny.batch("bert")
    text = run.lower(model.params, model, batch).as_text()
    assert "tensor<3x1x32xf32>" in text  # (B, 1, D) goes through the pooler


def test_logits_of_few_classes_are_float32():
    half = Policy("bfloat16", "bfloat16")
    for head in ("classification", "span"):
        model = tiny.model("bert", head, policy=half)
        logits = run(model.params, model, tiny.batch("bert"))
        assert logits.dtype == jnp.float32
        real = np.asarray(logits)[np.asarray(logits) > layers.MASKED]
        assert (real != real.astype(jnp.bfloat16).astype(jnp.float32)).any()  # never rounded


@pytest.mark.parametrize("remat", [False, True])
def test_attention_that_nobody_reads_costs_nothing(remat, monkeypatch):
    batch = tiny.batch("bert")
    model = tiny.model("bert", "none", remat=remat, num_hidden_layers=1)

    def cost():
        grad = jax.jit(jax.grad(lambda p: features(p, model, batch, jnp.uint32(0)).sum()))
        compiled = grad.lower(model.params).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    returned = cost()
    block = encoder.Block.__call__
    monkeypatch.setattr(encoder.Block, "__call__", lambda *args: (block(*args)[0], None))
    assert returned == cost()


@pytest.mark.parametrize(
    "bottlenecks, block", [(True, (0.3, 0.0, 0.0, 0.0, 0.2)), (False, (0.3, 0.2, 0.0, 0.2))]
)
def test_dropout_of_mobilebert(bottlenecks, block, monkeypatch):
    seen = []
    for module in (bottleneck, attention, layers):
        note = lambda x, rate, seed, site, *_: seen.append((rate, site)) or x  # noqa: E731
        monkeypatch.setattr(module, "dropout", note)
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    model = tiny.model("mobilebert", use_bottleneck=bottlenecks, **rates)
    jax.eval_shape(lambda: model(tiny.batch("mobilebert"), jnp.uint32(0)))
    assert [rate for rate, _ in seen] == [0.2, *block, *block]
    sites = [site for rate, site in seen if rate > 0]
    assert len(set(sites)) == len(sites)


def test_dropout_needs_a_seed_and_changes_with_it():
    model, batch = tiny.model("bert"), tiny.batch("bert")
    one, again, two, none = (
        np.asarray(run(model.params, model, batch, seed))
        for seed in (*map(np.uint32, (1, 1, 2)), None)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).max() > 1e-3
    assert np.abs(one - none).max() > 1e-3


@pytest.mark.parametrize(
    "name, longest",
    [("bert", 40), ("gpt2", 40), ("roberta", 38), ("llama", 40), ("modernbert", 40)],
)
def test_rows_longer_than_the_positions_are_refused(name, longest):
    model = tiny.model(name)
    jax.eval_shape(lambda: model(tiny.batch(name, length=longest)))
    with pytest.raises(UserError, match=f"positions for {longest}"):
        jax.eval_shape(lambda: model(tiny.batch(name, length=longest + 1)))


@pytest.mark.parametrize("name", sorted(layers.ACTIVATIONS))
def test_activations_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    activations = pytest.importorskip("transformers.activations")
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    expected = activations.get_activation(name)(torch.tensor(x)).numpy()
    np.testing.assert_allclose(layers.activation(name)(jnp.asarray(x)), expected, atol=2e-6)
