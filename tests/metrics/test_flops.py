import jax
import jax.numpy as jnp

from kd_jax.metrics import flops
from kd_jax.plans import compiled
from kd_jax.types import Counted

B, T, P, V, D, F, L = 4, 32, 8, 96, 16, 64, 3


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def linear(inner, outer):
    return {"kernel": shape(inner, outer), "bias": shape(outer)}


def model(width, layers, ffn, transform=True):
    block = {
        "attention": {name: linear(width, width) for name in "qkvo"},
        "attention_norm": {"scale": shape(width), "bias": shape(width)},
        "mlp": {"up": linear(width, ffn), "down": linear(ffn, width)},
    }
    return {
        "backbone": {
            "tokens": {"embedding": shape(V, width)},
            "positions": {"embedding": shape(T, width)},
            "blocks": {i: block for i in range(layers)},
        },
        "head": {"transform": linear(width, width), "bias": shape(V)} if transform else {},
    }


def by_hand(width, layers, ffn, transform=True):
    block = T * (8 * width * width + 4 * width * ffn) + 4 * T * T * width
    return B * (layers * block + P * 2 * width * (transform * width + V))


def test_forward():
    assert flops.forward(Counted(model(D, L, F)), B, T, P) == by_hand(D, L, F)
    assert flops.forward(Counted(model(D, L, F, False)), B, T, P) == by_hand(D, L, F, False)
    without = flops.forward(Counted(model(D, L, F)), B, T, P, vocabulary=False)
    assert by_hand(D, L, F) - without == 2 * B * P * D * V


def test_an_unembedding_of_its_own():
    untied = model(D, L, F)
    untied["head"]["unembed"] = shape(2 * V, D)
    more = flops.forward(Counted(untied), B, T, P) - flops.forward(Counted(model(D, L, F)), B, T, P)
    assert more == 2 * B * P * D * V


def test_heads_of_few_classes():
    blocks = by_hand(D, L, F) - B * P * 2 * D * (D + V)
    few = model(D, L, F)
    few["head"] = {"pooler": linear(D, D), "classifier": linear(D, 3)}
    assert flops.forward(Counted(few), B, T, P) == blocks + 2 * B * (
        D * D + D * 3
    )  # one token of a row
    few["head"] = {"span": linear(D, 2)}
    assert flops.forward(Counted(few), B, T, P) == blocks + 2 * B * T * D * 2  # all of them
    few["head"] = {"dense": {0: linear(D, 5)}}  # of an embedder, which has no unembedding
    assert flops.forward(Counted(few, (), False), B, T, 1) == blocks + 2 * B * D * 5


def test_an_unembedding_with_more_columns_than_the_embedding():
    wider = model(D, L, F)
    wider["head"]["rest"] = {"embedding": shape(V, 3 * D)}
    more = flops.forward(Counted(wider), B, T, P) - flops.forward(Counted(model(D, L, F)), B, T, P)
    assert more == 2 * B * P * V * 3 * D


def test_blocks_and_heads_of_other_widths():
    pruned = model(D, 1, F // 2)
    attention = pruned["backbone"]["blocks"][0]["attention"]
    attention |= {name: linear(D, D // 2) for name in "qkv"} | {"o": linear(D // 2, D)}
    block = T * (4 * D * D + 2 * D * F) + 2 * T * T * D
    assert flops.forward(Counted(pruned), B, T, P) == B * (block + P * 2 * D * (D + V))


def test_windows():
    """Scores and weighted sums of 8 and 5 keys a token, and of all of them where it has fewer."""
    found = flops.forward(Counted(model(D, L, F), (8, None, 5)), B, T, P)
    assert by_hand(D, L, F) - found == B * 4 * T * D * (T - 8 + T - 5)
    wide = flops.forward(Counted(model(D, L, F), (T, None, 2 * T)), B, T, P)
    assert wide == by_hand(D, L, F)


def test_train_step():
    projection = {"hidden": {"pair_0": {"kernel": shape(D, 2 * D)}}}
    found = flops.train_step(
        Counted(model(D, L, F)), [Counted(model(2 * D, 5, F))], projection, B, T, P
    )
    hidden = 2 * B * T * 2 * D * D
    assert found == by_hand(2 * D, 5, F) + 3 * (by_hand(D, L, F) + hidden)
    alone = flops.train_step(Counted(model(D, L, F)), [], {}, B, T, P)
    assert alone == 3 * by_hand(D, L, F)


def test_it_is_what_a_program_takes():
    def forward(params, x_BTD):
        for block in params["backbone"]["blocks"].values():
            project = {name: x_BTD @ w["kernel"] for name, w in block["attention"].items()}
            scores_BTS = jnp.einsum("btd,bsd->bts", project["q"], project["k"])
            mixed_BTD = jnp.einsum("bts,bsd->btd", scores_BTS, project["v"])
            x_BTD = mixed_BTD @ block["attention"]["o"]["kernel"]
            x_BTD = x_BTD @ block["mlp"]["up"]["kernel"] @ block["mlp"]["down"]["kernel"]
        x_BPD = x_BTD[:, :P] @ params["head"]["transform"]["kernel"]
        return x_BPD @ params["backbone"]["tokens"]["embedding"].T

    params = model(D, L, F)
    text = jax.jit(forward).lower(params, shape(B, T, D)).compile().as_text()
    assert flops.forward(Counted(params), B, T, P) == compiled.cost(text).flops
