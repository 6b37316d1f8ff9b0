"""Names at their old place."""

from kd_jax.evals.likelihood import compare

__all__ = ["compare"]
