"""Names at their old place."""

from kd_jax.evals.pictures import trend
from kd_jax.evals.pictures import write_rounds as write

__all__ = ["trend", "write"]
