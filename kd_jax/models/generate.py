"""Generates text with a causal model, token by token, with a KV cache.

One program is compiled for each bucket of prompt lengths and each bucket of numbers of new tokens:
prompts are padded to the first, the cache has room for both. Temperature, top-p, stop tokens and
the number of new tokens are inputs of the program; greedy choice, sampling from the whole
vocabulary and top-p sampling are three programs.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kd_jax.errors import UserError
from kd_jax.models.decoder import Decoder
from kd_jax.models.heads import CausalLM
from kd_jax.ranges import Real, Whole
from kd_jax.types import Array, Model, ModelOutput

SMALLEST_BUCKET = 16


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[np.ndarray]:
    """Generates a continuation of each prompt: int32 token ids, without the prompt.

    Args:
        model: a decoder with its language-modeling head.
        prompts: token ids, of any lengths; at least one each.
        max_new_tokens: the largest number of new tokens in a row.
        stop: tokens that end a row, such as eos_token_id; a stop token is kept as the last one.
        temperature: divides the logits; 0 takes the most probable token (greedy).
        top_p: tokens are drawn among the smallest set of most probable ones whose probabilities sum
            to at least this (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751).
        seed: seed of the draws. A row's draws depend on its index, not on the other rows.

    Raises UserError for a model that generates no text, for prompts that are empty, contain unknown
    ids or leave no room for new tokens, and for numbers out of range.
    """
    module = nnx.merge(model.graphdef, model.params)
    if not isinstance(module.backbone, Decoder) or not isinstance(module.head, CausalLM):
        raise UserError("generate: the model is no causal language model; load one with head 'clm'")
    config = module.backbone.config
    _check(prompts, max_new_tokens, temperature, top_p, config)
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens_BT = np.zeros((len(prompts), _bucket(lengths_B.max())), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    out_BN, counts_B = _write(
        model,
        tokens_BT,
        lengths_B,
        np.int32(max_new_tokens),
        np.array(stop, np.int32).reshape(-1),
        np.float32(temperature),
        np.float32(top_p),
        jax.random.key(seed),
        room=_bucket(max_new_tokens),
        greedy=temperature == 0.0,
        nucleus=top_p < 1.0,
    )
    return [row[:count] for row, count in zip(np.asarray(out_BN), counts_B, strict=True)]


def _bucket(length: int) -> int:
    """Rounds a length up to the power of two that it is padded to."""
    return max(SMALLEST_BUCKET, 1 << (int(length) - 1).bit_length())


def _check(prompts, max_new_tokens, temperature, top_p, config) -> None:
    Whole(least=1).check(max_new_tokens, "generate: max_new_tokens")
    Real(least=0).check(temperature, "generate: temperature")
    Real(above=0, most=1).check(top_p, "generate: top_p")
    for i, prompt in enumerate(prompts):
        if not len(prompt) or min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise UserError(
                f"generate: prompt {i} is empty or has ids outside 0 to {config.vocab_size - 1}; "
                f"an empty text can begin with bos_token_id"
            )
    longest = max(map(len, prompts), default=0)
    if not longest:
        raise UserError("generate: no prompts")
    if longest + max_new_tokens - 1 > config.max_tokens:  # nothing comes after the last one
        raise UserError(
            f"generate: {max_new_tokens} tokens after a prompt of {longest}, but the model has "
            f"positions for {config.max_tokens}; shorten the prompt or lower max_new_tokens"
        )


@functools.partial(jax.jit, static_argnames=("room", "greedy", "nucleus"))
def _write(
    model: Model,
    tokens_BT: Array,
    lengths_B: Array,
    limit: Array,
    stop_E: Array,
    temperature: Array,
    top_p: Array,
    key: Array,
    *,
    room: int,
    greedy: bool,
    nucleus: bool,
) -> tuple[Array, Array]:
    """Generates tokens in one compiled loop; returns them, (B, room), and how many a row has."""
    module = nnx.merge(model.graphdef, model.params)
    B, T = tokens_BT.shape

    def choose(x_BD: Array, step: Array) -> Array:
        unembedding = module.head.unembedding(module.backbone.tokens.embedding[...])
        size = module.backbone.config.vocab_size
        logits_BV = ModelOutput(x_BD, *unembedding, vocab_size=size).logits
        if greedy:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        draws = jax.random.fold_in(key, step)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(draws, jnp.arange(B))
        if not nucleus:  # which would sort all logits
            drawn_B = jax.vmap(jax.random.categorical)(keys, logits_BV / temperature)
            return drawn_B.astype(jnp.int32)
        return jax.vmap(_draw, in_axes=(0, 0, None, None))(keys, logits_BV, temperature, top_p)

    def stops(token_B: Array) -> Array:
        return (token_B[:, None] == stop_E[None]).any(axis=1)

    def goes_on(state) -> Array:
        written, done_B = state[0], state[3]
        return (written < limit) & ~done_B.all()

    def step(state):
        written, token_B, cache, done_B, counts_B, out_BN = state
        real_B1 = jnp.ones((B, 1), bool)
        x_B1D, cache = module.backbone.extend(cache, token_B[:, None], real_B1)
        token_B = choose(x_B1D[:, 0], written)
        out_BN = jax.lax.dynamic_update_slice_in_dim(out_BN, token_B[:, None], written, axis=1)
        counts_B = counts_B + ~done_B
        return written + 1, token_B, cache, done_B | stops(token_B), counts_B, out_BN

    real_BT = jnp.arange(T)[None] < lengths_B[:, None]
    x_BTD, cache = module.backbone.extend(module.backbone.start(B, T + room), tokens_BT, real_BT)
    token_B = choose(x_BTD[jnp.arange(B), lengths_B - 1], jnp.int32(0))
    out_BN = jnp.zeros((B, room), jnp.int32).at[:, 0].set(token_B)
    state = jnp.int32(1), token_B, cache, stops(token_B), jnp.ones((B,), jnp.int32), out_BN
    *_, counts_B, out_BN = jax.lax.while_loop(goes_on, step, state)
    return out_BN, counts_B


def _draw(key: Array, logits_V: Array, temperature: Array, top_p: Array) -> Array:
    """Draws one token from the most probable ones that top-p keeps."""
    order_V = jnp.argsort(-logits_V)
    logits_V = logits_V[order_V] / temperature
    probs_V = jax.nn.softmax(logits_V)
    before_V = jnp.cumsum(probs_V) - probs_V
    kept_V = jnp.where(before_V < top_p, logits_V, -jnp.inf)
    return order_V[jax.random.categorical(key, kept_V)].astype(jnp.int32)
