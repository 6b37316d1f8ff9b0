"""Names at their old place."""

from kd_jax.evals.runs import MOST_DIFFERENCES as MOST
from kd_jax.evals.runs import differences

__all__ = ["MOST", "differences"]
