"""Weight of the distillation term x temperature on AG News: twenty trials, one heat map.

The settings are those of configs/finetune_agnews.py, the grid is what its authors left as future
work. The teacher is fine-tuned once, its logits are computed once, and all trials run through one
compiled step; the best on held-out training data is measured on the test split.

    python -m kd_jax.main --config=configs/sweep_agnews.py

The same command goes on where it was stopped. `:smoke` runs four trials, tiny, on made-up data.
For Optuna's sampler: --config.sweep.sampler=tpe --config.sweep.trials=30, with {low, high, log} in
the place of values. Some hours on one GPU; the full run has not been made here. A small one that
has: benchmarks/sweep.py.
"""

from kd_jax import config, experiments
from kd_jax.smoke import smoke_finetuning


def get_config(arg=None):
    _, smoke = config.split(arg, ("full",), "full")
    c = experiments.load("finetune_agnews")
    c.recipe = "sweep"
    c.stages = dict(teacher={}, student={})
    weights, temperatures = (0.1, 0.3, 1.0, 3.0, 10.0), (1.0, 2.0, 4.0, 8.0)
    if smoke:
        c = smoke_finetuning(c)
        weights, temperatures = (0.3, 3.0), (1.0, 4.0)
    c.sweep = config.sweep(
        ("objective.kl.weight", weights), ("objective.kl.temperature", temperatures)
    )
    return c
