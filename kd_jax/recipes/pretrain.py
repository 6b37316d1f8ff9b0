"""The recipe `distil`, by the name that configs give it."""

from kd_jax.recipes.distil import run as run
