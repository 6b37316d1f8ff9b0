"""Names at their old place."""

from kd_jax.evals.pictures import confusion_matrix, heat_map

__all__ = ["confusion_matrix", "heat_map"]
