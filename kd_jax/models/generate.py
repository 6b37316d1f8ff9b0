"""Generates text with a causal model, token by token, with a KV cache.

One program is compiled for each bucket of prompt lengths and each number of new tokens that a row
has room for. Temperature, top-k, top-p, stop tokens, seeds and each row's own limit are inputs of
the program; which of the first three there are, is not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from kd_jax import axes, bisection
from kd_jax.errors import UserError
from kd_jax.models.decoder import Decoder
from kd_jax.models.heads import CausalLM
from kd_jax.models.layers import mix
from kd_jax.precision import product
from kd_jax.ranges import Real, Whole
from kd_jax.types import Array, Model

SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Describes how tokens are chosen, and when a text ends."""

    max_new_tokens: int
    temperature: float = 0.0  # divides the logits; 0: the most probable token (greedy)
    # Tokens are drawn among the most probable ones, so many of them (0: all), and of these among
    # the smallest set whose probabilities sum to at least `top_p` (nucleus sampling, Holtzman et
    # al. 2020, arXiv:1904.09751); those as probable as the last one are in it.
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()  # tokens that end a text, and are kept as its last one

    def check(self, where: str) -> None:
        """Raises UserError for a number out of range; `where` begins its name: "config.x."."""
        Whole(least=1).check(self.max_new_tokens, f"{where}max_new_tokens")
        Real(least=0).check(self.temperature, f"{where}temperature")
        Whole(least=0).check(self.top_k, f"{where}top_k")
        Real(above=0, most=1).check(self.top_p, f"{where}top_p")

    def rule(self) -> Rule:
        """Makes the inputs of a program."""
        greedy = self.temperature == 0.0
        return Rule(
            np.array(self.stop, np.int32).reshape(-1),
            None if greedy else np.float32(self.temperature),
            None if greedy or not self.top_k else np.int32(self.top_k),
            None if greedy or self.top_p == 1.0 else np.float32(self.top_p),
        )


class Rule(struct.PyTreeNode):
    """Holds the numbers of a `Sampling` that a program reads; None: there is no such rule."""

    stop_E: Array
    temperature: Array | None
    top_k: Array | None
    top_p: Array | None

    def choose(self, logits_BV: Array, streams_B2: Array) -> Array:
        """Chooses a token of each row, int32 (B,): a function of its logits and its stream of
        random numbers, two uint32 words."""
        if self.temperature is None:
            return _largest(logits_BV)
        logits_BV = logits_BV / self.temperature
        if self.top_k is not None or self.top_p is not None:
            logits_BV = jnp.where(self._kept(logits_BV), logits_BV, -jnp.inf)
        return _largest(logits_BV + _gumbel(streams_B2, logits_BV.shape[1]))

    def _kept(self, logits_BV: Array) -> Array:
        """Tells which tokens may be drawn."""
        probs_BV = jax.nn.softmax(logits_BV)
        kept_BV = jnp.ones(probs_BV.shape, bool)
        if self.top_k is not None:
            kept_BV = probs_BV >= _least(probs_BV, jnp.ones_like(probs_BV), self.top_k)
            probs_BV = jnp.where(kept_BV, probs_BV, 0.0)
        if self.top_p is not None:
            wanted_B1 = self.top_p * probs_BV.sum(axis=1, keepdims=True)
            kept_BV &= probs_BV >= _least(probs_BV, probs_BV, wanted_B1)
        return kept_BV


def _largest(values_BV: Array) -> Array:
    """Finds the first of each row's largest values, int32 (B,).

    XLA's CPU backend computes what `jnp.argmax` reads number by number; these reductions in
    vectors, six times as fast.
    """
    count = values_BV.shape[1]
    largest_BV = values_BV >= values_BV.max(axis=1, keepdims=True)
    return jnp.where(largest_BV, jnp.arange(count, dtype=jnp.int32), count - 1).min(axis=1)


def _least(probs_BV: Array, weights_BV: Array, wanted_B1: Array) -> Array:
    """Finds the largest probability, (B, 1), such that weights of at least this probability sum to
    `wanted_B1`; 0 if there is none."""

    def enough(border_B1: Array) -> Array:
        kept_BV = jnp.where(probs_BV >= border_B1, weights_BV, 0.0)
        return kept_BV.sum(axis=1, keepdims=True) >= wanted_B1

    return bisection.border(enough, (len(probs_BV), 1))


def _gumbel(streams_B2: Array, size: int) -> Array:
    """Draws numbers of the standard Gumbel distribution, (B, size): the largest of logits plus
    these is a draw from their softmax.

    Number i is a hash of i and the row's two words, as masks of dropout are (`layers.dropout`):
    threefry's twenty rounds for every logit would take longer than a small model.
    """
    first_B1, second_B1 = streams_B2[:, :1], streams_B2[:, 1:]
    bits_BV = mix(mix(jnp.arange(size, dtype=jnp.uint32)[None] ^ first_B1) + second_B1)
    # The largest ones come from the smallest uniform numbers, of which float32 has the most.
    uniform_BV = (bits_BV.astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-uniform_BV))


class Written(struct.PyTreeNode):
    """Holds what was written after each row's prompt, at most N tokens."""

    tokens_BN: Array  # int32, 0 after a row's end
    counts_B: Array  # int32: tokens of a row
    ended_B: Array  # bool: whether the last one is a stop token
    logp_BN: Array  # float32: the tokens' log-probabilities, at temperature 1 among all; else 0


def write(
    model: Model,
    tokens_BT: Array,
    lengths_B: Array,
    limits_B: Array,
    rows_B: Array,
    seed: Array,
    rule: Rule,
    room: int,
    together: Sequence[str] = (),
) -> Written:
    """Writes after prompts until all rows have ended, on all devices; dropout is off.

    Args:
        model: a decoder with its language-modeling head; inside shard_map perhaps parts of it.
        tokens_BT: the prompts, of `lengths_B` tokens, and padding; T is at most the model's number
            of positions.
        limits_B: int32; a row ends when it has so many new tokens. 0: it is written nothing.
        rows_B: int32 numbers of the rows. A row's draws are a function of seed, its number and the
            number of the new token.
        seed: uint32 scalar.
        room: N, the largest of the limits (static).
        together: axes of the devices that share the work; inside shard_map.
    """
    module = nnx.merge(model.graphdef, model.params)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows_B)

    def goes_on(done_B: Array) -> Array:
        return axes.largest((~done_B.all()).astype(jnp.int32), together) > 0

    def add(written: Written, done_B: Array, x_BD: Array, number: Array):
        """Chooses the new tokens with this number, from the last hidden states before them."""
        logits_BV = _logits(module, x_BD)
        streams_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)
        token_B = rule.choose(logits_BV, jax.random.key_data(streams_B))
        token_B = jnp.where(done_B, 0, token_B)
        chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
        logp_B = jnp.where(done_B, 0.0, chosen_B - jax.nn.logsumexp(logits_BV, axis=1))
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=number, axis=1)
        counts_B = written.counts_B + ~done_B
        stops_B = (token_B[:, None] == rule.stop_E[None]).any(axis=1) & ~done_B
        written = Written(
            put(written.tokens_BN, token_B),
            counts_B,
            written.ended_B | stops_B,
            put(written.logp_BN, logp_B),
        )
        done_B = done_B | stops_B | (counts_B >= limits_B)
        return written, done_B, token_B, goes_on(done_B)

    def step(state):
        number, cache, (written, done_B, token_B, _) = state
        x_BD, cache = module.backbone.extend(cache, token_B)
        return number + 1, cache, add(written, done_B, x_BD, number)

    B = len(tokens_BT)
    written = Written(
        jnp.zeros((B, room), jnp.int32),
        jnp.zeros(B, jnp.int32),
        jnp.zeros(B, bool),
        jnp.zeros((B, room), jnp.float32),
    )
    x_BD, cache = module.backbone.start(tokens_BT, lengths_B, room)
    state = jnp.int32(1), cache, add(written, limits_B <= 0, x_BD, jnp.int32(0))
    return jax.lax.while_loop(lambda state: state[2][3], step, state)[2][0]


def _logits(module: nnx.Module, x_BD: Array) -> Array:
    """Computes the logits of all ids, float32 (B, V), of devices' parts of the ids perhaps."""
    config = module.backbone.config
    table_VD, bias_V = module.head.unembedding(module.backbone.tokens.embedding[...])
    split = len(table_VD) < config.vocab_size
    x_ND = axes.gathered(x_BD, axes.FSDP) if split else x_BD
    logits_NV = product("nd,vd->nv", x_ND, table_VD, config.policy.operand)
    if bias_V is not None:
        logits_NV = logits_NV + bias_V[None]
    return (axes.by_rows(logits_NV) if split else logits_NV)[:, : config.vocab_size]


def generate(
    model: Model, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int = 0
) -> list[np.ndarray]:
    """Generates a continuation of each prompt: int32 token ids, without the prompt.

    Args:
        model: a decoder with its language-modeling head.
        prompts: token ids, of any lengths; at least one each.
        sampling: how tokens are chosen.
        seed: seed of the draws. A row's draws depend on its index, not on the other rows.

    Raises UserError for a model that generates no text, for prompts that are empty, contain unknown
    ids or leave no room for new tokens, and for numbers out of range.
    """
    config = check_model(model)
    sampling.check("generate: ")
    _check(prompts, sampling.max_new_tokens, config)
    tokens_BT, lengths_B = padded(prompts, config.max_tokens)
    written = _write(
        model,
        tokens_BT,
        lengths_B,
        np.full(len(prompts), sampling.max_new_tokens, np.int32),
        np.arange(len(prompts), dtype=np.int32),
        np.uint32(seed),
        sampling.rule(),
        bucket(sampling.max_new_tokens),
    )
    tokens_BN, counts_B = jax.device_get((written.tokens_BN, written.counts_B))
    return [row[:count] for row, count in zip(tokens_BN, counts_B, strict=True)]


_write = jax.jit(write, static_argnames="room")


def bucket(length: int) -> int:
    """Rounds a length up to the power of two that it is padded to."""
    return max(SMALLEST_BUCKET, 1 << (int(length) - 1).bit_length())


def padded(prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads prompts to the bucket of the longest one, at most `max_tokens`: (tokens_BT, lengths_B),
    int32."""
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens_BT = np.zeros((len(prompts), min(bucket(lengths_B.max()), max_tokens)), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens_BT, lengths_B


def check_model(model: Model):
    """Returns the decoder's config. Raises UserError for a model that generates no text."""
    module = nnx.merge(model.graphdef, model.params)
    if not isinstance(module.backbone, Decoder) or not isinstance(module.head, CausalLM):
        raise UserError("generate: the model is no causal language model; load one with head 'clm'")
    return module.backbone.config


def _check(prompts, max_new_tokens, config) -> None:
    for i, prompt in enumerate(prompts):
        if not len(prompt) or min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise UserError(
                f"generate: prompt {i} is empty or has ids outside 0 to {config.vocab_size - 1}; "
                f"an empty text can begin with bos_token_id"
            )
        most = config.most_written(len(prompt))
        if len(prompt) + max_new_tokens - 1 > most:  # nothing comes after the last one
            raise UserError(
                f"generate: {max_new_tokens} tokens after prompt {i}, which has {len(prompt)}, but "
                f"the model can write up to position {most}; shorten it, or lower max_new_tokens"
            )
    if not len(prompts):
        raise UserError("generate: no prompts")
