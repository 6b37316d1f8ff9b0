"""Blocks beside their predecessors: each draw gives the model that it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models import family, replacement, surgery
from kd_jax.types import Model
from tests.models import tiny

GROUPS = ((0, 1), (2,), ())  # of the predecessor's four blocks; the last has none
LAYERS = {"gpt2": "n_layer", "bert": "num_hidden_layers", "mobilebert": "num_hidden_layers"}


def make(name, layers, seed, **changes):
    return tiny.model(name, seed=seed, **{LAYERS[name]: layers}, **changes)


@functools.cache
def models(name):
    """(predecessor of four blocks, successor of three, both together)."""
    old, new = make(name, 4, 1), make(name, 3, 2)
    return old, new, replacement.joined(new, old, GROUPS)


def blocks_of(name, drawn):
    """The model that a draw stands for, made by hand: the successor's embeddings and head, and the
    blocks that are drawn."""
    old, new, _ = models(name)
    chosen = []
    for i, replaced in enumerate(drawn):
        ours, theirs = (model.params["backbone"]["blocks"] for model in (new, old))
        keeps = replaced or not GROUPS[i]
        chosen += [ours[i]] if keeps else [theirs[layer] for layer in GROUPS[i]]
    shapes = make(name, len(chosen), 0)
    backbone = new.params["backbone"] | {"blocks": dict(enumerate(chosen))}
    return shapes.replace(params=new.params | {"backbone": backbone})


@jax.jit
def run(model, batch, replaced_L=None):
    return model(batch, None, replaced_L).features


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("drawn", [(0, 0, 0), (1, 0, 0), (1, 1, 1)])
def test_a_draw_is_the_model_it_stands_for(name, drawn):
    batch, both = tiny.batch(name), models(name)[2]
    found = run(both, batch, jnp.array(drawn, bool))
    wanted = run(blocks_of(name, drawn), batch)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_without_draws_it_is_the_successor():
    _, new, both = models("gpt2")
    np.testing.assert_array_equal(run(both, tiny.batch("gpt2")), run(new, tiny.batch("gpt2")))
    left = replacement.successors(both.params)
    assert jax.tree.structure(left) == jax.tree.structure(new.params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (left, new.params)), strict=True))


def test_no_block_replaced_is_the_original():
    """Every group its predecessors, embeddings and head the original's."""
    old = make("gpt2", 4, 1)
    new = surgery.from_teacher(make("gpt2", 2, 2), old, "first")
    both = replacement.joined(new, old, ((0, 1), (2, 3)))
    found = run(both, tiny.batch("gpt2"), jnp.zeros(2, bool))
    np.testing.assert_allclose(found, run(old, tiny.batch("gpt2")), atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_reach_what_is_drawn_and_no_predecessor(remat):
    old = make("bert", 4, 1)
    new = make("bert", 3, 2, remat=remat, hidden_dropout_prob=0.3)
    both = replacement.joined(new, old, GROUPS)
    batch = tiny.batch("bert")

    @jax.jit
    @jax.grad
    def gradient(params):
        out = Model(params, both.graphdef)(batch, jnp.uint32(3), jnp.array([True, False, False]))
        return jnp.sum(jnp.square(out.hidden[-1]))

    found = gradient(both.params)["backbone"]
    zero = lambda tree: not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert zero(found["predecessors"]) and zero(found["blocks"][1])
    assert not zero(found["blocks"][0]) and not zero(found["blocks"][2])
    assert not zero(found["tokens"])  # through the frozen blocks as well


def test_one_program_for_all_draws():
    _, _, both = models("gpt2")
    compiled = run._cache_size()
    for drawn in ((0, 1, 0), (1, 0, 1), (1, 1, 0)):
        run(both, tiny.batch("gpt2"), jnp.array(drawn, bool))
    assert run._cache_size() <= compiled + 1


def test_parameters_are_split_as_all_others():
    _, _, both = models("gpt2")
    paths = [path for path in family.flatten(both.params) if "predecessors" in path]
    assert len(paths) == 3 * len(family.flatten(both.params["backbone"]["blocks"][0]))
    assert all(path.startswith("backbone/predecessors/") for path in paths)
