"""What benchmarks/sweep.py runs: `grid`, or `one` of its trials as a run of its own."""

from kd_jax import config
from kd_jax.configs import small_finetune

WEIGHTS = (0.1, 0.3, 1.0, 3.0, 10.0)
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)


def get_config(arg):
    c = small_finetune.get_config("agnews")
    c.stages = dict(student={})
    c.objective = dict(ce=dict(weight=0.5), kl=dict(weight=0.5, temperature=2.0))
    c.steps = 300
    c.batch_size = 16
    c.eval.every = 300
    c.cost.repeats = 5
    if arg == "one":
        c.cache.max_gb = 0.0
        return c
    c.recipe = "sweep"
    c.sweep = config.sweep(
        ("objective.kl.weight", WEIGHTS), ("objective.kl.temperature", TEMPERATURES)
    )
    return c
