"""Names at their old place."""

from kd_jax.evals.runs import by_evaluation as table

__all__ = ["table"]
