"""Compares a distribution with its mixture with another one, exactly however near or far they are:
jsd, skl and srkl are sums of such divergences."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kd_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A distribution p (C, V) and m = (1 - share) p + share q, relative to it: m / p, m / p - 1."""

    own_CV: Array
    ratio_CV: Array
    gap_CV: Array

    def kl(self) -> Array:
        """Computes the summands of KL(p || m) over the vocabulary, (C, V), all of them positive:
        p (u - log(1 + u)), where m = p (1 + u)."""
        u = self.gap_CV
        series = u * u * (0.5 - u * (1.0 / 3.0 - u * (0.25 - u * 0.2)))
        # Where the two nearly cancel, the series is the more exact one.
        return self.own_CV * jnp.where(jnp.abs(u) < 0.03, series, u - self.log_ratio())

    def log_ratio(self) -> Array:
        """Computes log(m / p), (C, V), from whichever of m / p and m / p - 1 is more exact."""
        return jnp.where(self.gap_CV < -0.5, jnp.log(self.ratio_CV), jnp.log1p(self.gap_CV))

    def shortfall(self) -> Array:
        """Computes 1 - p / m, (C, V)."""
        return self.gap_CV / self.ratio_CV


def mixed(p_CV: Array, q_CV: Array, share: float) -> Mixed:
    """Mixes p with `share` of q; neither has zeros afterwards."""
    tiny = jnp.finfo(jnp.float32).tiny
    p_CV, q_CV = jnp.maximum(p_CV, tiny), jnp.maximum(q_CV, tiny)
    ratio_CV = (1.0 - share) + share * (q_CV / p_CV)
    return Mixed(p_CV, ratio_CV, share * (q_CV - p_CV) / p_CV)
