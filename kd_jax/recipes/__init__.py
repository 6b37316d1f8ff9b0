"""Recipes: the only place where models, data, objectives and training meet."""
