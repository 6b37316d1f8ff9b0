"""Recipes: the only place where models, data, objectives and training meet."""

# Other names that configs give a recipe.
ALIASES = dict.fromkeys(("finetune", "pretrain", "prune", "substitute"), "distil")
