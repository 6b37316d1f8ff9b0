"""Runs whole experiments: the only package in which models, data, objectives and training meet."""

# Other names that configs give a recipe.
ALIASES = dict.fromkeys(("finetune", "pretrain", "prune", "substitute"), "distil")
