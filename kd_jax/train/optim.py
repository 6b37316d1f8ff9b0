"""AdamW with regex tables: which parameters decay, learn faster, or not at all.

The learning rate is not part of the optimizer: `update` gets it as an input, so schedules never
recompile and never hide a step counter.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kd_jax.errors import UserError
from kd_jax.train.sharding import match, path_name
from kd_jax.types import Array, Params

# Vectors (biases, layer-norm scales) do not decay, as in BERT's and GPT-2's recipes.
NO_DECAY = ((r"(^|/)(bias|scale)$", 0.0), (r".*", 1.0))


def multipliers(table: Any, params: Params, key: str) -> Params:
    """The first matching (pattern, number) of `table` for each parameter, as a tree of floats."""
    rows = tuple((str(pattern), float(value)) for pattern, value in table)
    if any(value < 0 for _, value in rows):
        raise UserError(f"{key}: multipliers must not be negative: {rows}")
    return match(rows, params, key)


def make_optimizer(config: Any, params: Params) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) without its learning rate.

    Args:
        config: `optim`: weight_decay, beta1, beta2, epsilon, clip_norm (0: none) and
            learning_rate_multipliers, (pattern, factor) rows, first match wins, 0 freezes.
        params: the parameters, arrays or abstract.

    Returns updates that `apply` multiplies by the learning rate. Frozen parameters have no
    moments and do not count in the norm that is clipped.
    """
    factors = multipliers(
        config.learning_rate_multipliers, params, "optim.learning_rate_multipliers"
    )
    decay = jax.tree.map(lambda x: x * config.weight_decay, match(NO_DECAY, params, "decay"))
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.chain(
        clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        _scale_and_decay(factors, decay),
    )
    labels = jax.tree.map(lambda factor: "trained" if factor else "frozen", factors)
    if "trained" not in jax.tree.leaves(labels):
        raise UserError("optim.learning_rate_multipliers freezes every parameter")
    if "frozen" not in jax.tree.leaves(labels):
        return adamw
    return optax.partition({"trained": adamw, "frozen": optax.set_to_zero()}, labels)


def _scale_and_decay(factors: Params, decay: Params) -> optax.GradientTransformation:
    """update -> -factor (update + decay x parameter), factors and decays looked up by path."""

    def table(tree):
        pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {path_name(path): value for path, value in pairs}

    factor_of, decay_of = table(factors), table(decay)

    def update(updates, state, params=None):
        def scale(path, u, p):
            name = path_name(path)
            return -factor_of[name] * (u + decay_of[name] * p)

        return jax.tree_util.tree_map_with_path(scale, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def apply(
    optimizer: optax.GradientTransformation,
    grads: Params,
    opt_state: Any,
    params: Params,
    learning_rate: Array,
) -> tuple[Params, Any]:
    """One optimizer step; returns (params, opt_state)."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    step = lambda p, u: p + (learning_rate * u).astype(p.dtype)  # noqa: E731
    return jax.tree.map(step, params, updates), opt_state


def global_norm(grads: Params) -> Array:
    """sqrt of the sum of squares of all gradients, before clipping."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
