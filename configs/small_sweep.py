"""Learning rates for configs/small_finetune.py, as many for the baseline as for the student.

Argument: the task, as there. Trials are evaluated on held-out training data, with a seed that no
reported run has:

    python -m kd_jax.main --config=configs/small_sweep.py:phrasebank --config.seed=100 \
      --config.sweep.stage=baseline --config.teacher.model=runs/phrasebank-teacher/export/teacher

and again with --config.sweep.stage=student. Six minutes each on two idle CPU cores. What was
chosen stands in small_finetune.py.
"""

from kd_jax import config, experiments


def get_config(arg=None):
    c = experiments.load("small_finetune", arg)
    c.recipe = "sweep"
    c.sweep = config.sweep(("optim.learning_rate", (3e-5, 1e-4, 3e-4)))
    return c
