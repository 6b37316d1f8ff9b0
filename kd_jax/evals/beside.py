"""Names at their old place."""

from kd_jax.evals.classification import beside_teacher

__all__ = ["beside_teacher"]
