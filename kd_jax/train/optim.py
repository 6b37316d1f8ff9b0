"""Makes AdamW, with regex tables that set the weight decay and learning rate of parameters.

The learning rate is not part of the optimizer: `update` gets it as an input, so schedules never
recompile and never hide a step counter.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kd_jax.errors import UserError
from kd_jax.ranges import Real
from kd_jax.train.sharding import match, path_name
from kd_jax.types import Array, Params

# Vectors (biases, layer-norm scales) do not decay, as in BERT's and GPT-2's recipes.
NO_DECAY = ((r"(^|/)(bias|scale|offset)$", 0.0), (r".*", 1.0))

FACTOR = Real(least=0)  # of the learning rate


class Group(NamedTuple):
    """A group of parameters that were added to the model together and share one Adam step count.

    With the count of older parameters, new zero moments would lack their bias correction: the first
    update would be (1 - beta1) / sqrt(1 - beta2) times too large, about three.
    """

    name: str  # of its part in the optimizer's state
    factor: float = 1.0  # of the learning rate; 0 freezes
    warmup: int = 0  # update number `warmup` + 1 is the first with that whole factor


def multipliers(table: Any, params: Params, key: str) -> Params:
    """Finds each parameter's number, by the first matching pattern of `table`: a tree of floats."""
    rows = tuple((str(pattern), value) for pattern, value in table)
    rows = tuple((each, float(FACTOR.check(value, f"{key}: {each!r}"))) for each, value in rows)
    return match(rows, params, key)


def make_optimizer(
    config: Any, params: Params, groups: Sequence[tuple[str, Group]] = ()
) -> optax.GradientTransformation:
    """Makes AdamW (Loshchilov and Hutter, arXiv:1711.05101) without its learning rate.

    Args:
        config: `optim`: weight_decay, beta1, beta2, epsilon, clip_norm (0: none) and
            learning_rate_multipliers, (pattern, factor) rows, first match wins, 0 freezes.
        params: the parameters, arrays or abstract.
        groups: (pattern, Group) rows, first match wins; () makes a single group without a name.

    Returns an optimizer whose updates `apply` multiplies by the learning rate. Frozen parameters
    have no moments, and do not count in the norm that is clipped.
    """
    factors = multipliers(
        config.learning_rate_multipliers, params, "optim.learning_rate_multipliers"
    )
    decays = match(NO_DECAY, params, "decay")
    if not any(jax.tree.leaves(factors)):
        raise UserError("optim.learning_rate_multipliers freezes every parameter")
    paths, tree = jax.tree_util.tree_flatten_with_path(factors)
    names = [path_name(path) for path, _ in paths]
    named = tuple((pattern, group.name) for pattern, group in groups) or ((".*", ""),)
    labels = match(named, params, "groups of parameters")
    columns = (names, *map(jax.tree.leaves, (factors, decays, labels)))
    numbers = (config.weight_decay, config.beta1, config.beta2, config.epsilon, config.clip_norm)
    own = tuple(dict.fromkeys(group for _, group in groups))
    return _adamw(*map(float, numbers), own, tuple(zip(*columns, strict=True)), tree)


# The same object for the same numbers: it is a static part of the state, and with another one the
# step would compile again.
@functools.lru_cache(maxsize=64)
def _adamw(weight_decay, beta1, beta2, epsilon, clip_norm, groups, rows, tree):
    factors = {group.name: group.factor for group in groups} or {"": 1.0}
    rates = {
        name: (factor * factors[label], decay * weight_decay) for name, factor, decay, label in rows
    }
    update = (optax.scale_by_adam(beta1, beta2, epsilon), _scale_and_decay(rates))
    if groups:
        labels = {name: label for name, *_, label in rows}
        own = {
            group.name: optax.chain(*update, _warm_up(group.warmup))
            if group.factor
            else optax.set_to_zero()
            for group in groups
        }
        update = (optax.partition(own, functools.partial(_look_up, labels)),)
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    adamw = optax.chain(clip, *update)
    if all(factor for _, factor, *_ in rows):
        return adamw
    labels = ["trained" if factor else "frozen" for _, factor, *_ in rows]
    return optax.partition(
        {"trained": adamw, "frozen": optax.set_to_zero()}, jax.tree.unflatten(tree, labels)
    )


def _warm_up(updates: int) -> optax.GradientTransformation:
    """Scales updates by a factor that grows to 1 over the first `updates` updates."""
    if not updates:
        return optax.identity()
    return optax.scale_by_schedule(lambda count: jnp.minimum((count + 1) / (updates + 1), 1.0))


def _look_up(table: dict[str, str], params: Params) -> Params:
    """Looks up each parameter's value in a table by path: a tree."""
    return jax.tree_util.tree_map_with_path(lambda path, _: table[path_name(path)], params)


def _scale_and_decay(table: dict[str, tuple[float, float]]) -> optax.GradientTransformation:
    """Maps updates to -factor (update + decay x parameter); `table`: factor and decay by path."""

    def update(updates, state, params=None):
        def scale(path, u, p):
            factor, decay = table[path_name(path)]
            return -factor * (u + decay * p)

        return jax.tree_util.tree_map_with_path(scale, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def apply(
    optimizer: optax.GradientTransformation,
    grads: Params,
    opt_state: Any,
    params: Params,
    learning_rate: Array,
) -> tuple[Params, Any]:
    """Applies one optimizer step to parameters; returns (params, opt_state)."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    step = lambda p, u: p + (learning_rate * u).astype(p.dtype)  # noqa: E731
    return jax.tree.map(step, params, updates), opt_state


def global_norm(grads: Params) -> Array:
    """Computes the root of the sum of squares of all gradients, before clipping."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
