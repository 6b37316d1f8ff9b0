"""Alias of the recipe `distil`, for `config.recipe`."""

from kd_jax.recipes.distil import run as run
