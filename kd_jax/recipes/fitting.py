"""A short regression of compact blocks to the blocks they replace, before they go in: mean squared
error of what a block writes, over its features and the tokens of real training text.

It is a `fit` of its own: the student is the model with its new blocks, of which nothing else moves,
the teacher the model before the swap. Where several blocks go at once, the upper ones read what the
lower new ones write, as they will in training.
"""

from __future__ import annotations

from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from kd_jax import plugins
from kd_jax.models import family
from kd_jax.models.decoder import block_states
from kd_jax.objectives.combine import Objective
from kd_jax.recipes import blueprint
from kd_jax.recipes.phases import Phase
from kd_jax.recipes.stage import Stage
from kd_jax.train import loop, optim, sharding, state
from kd_jax.train.step import Plan
from kd_jax.types import Model, Params


def fitted(
    setup: Any, stage: Stage, phase: Phase, old: Params, new: Model, directory: epath.Path
) -> Params:
    """The parameters of `new` after the regression; only the phase's new blocks have changed.

    Args:
        setup: the run's; config.substitution gives `fit_steps` and `fit_learning_rate`.
        stage: whose training text and batches it reads.
        phase: the one that begins.
        old: parameters of the model before the swap.
        new: the model after it.
        directory: of the regression, which goes on there where it was killed.
    """
    config, settings = setup.config, setup.config.substitution
    make = plugins.load("objectives", "hidden", "make").make
    pairs = tuple((layer + 1, layer + 1) for layer in sorted(phase.layers))
    objective = Objective((), (("fit", make("mse", pairs)),), (), setup.policy, setup.policy)
    own = ConfigDict(stage.optim.to_dict(), type_safe=False)
    own.learning_rate_multipliers = ((phase.pattern, 1.0), (".*", 0.0))
    specs = sharding.param_specs(family.PARTITION, old, setup.mesh)
    kept = jax.device_put(
        blueprint.stored(old, setup.policy), sharding.shardings(specs, setup.mesh)
    )
    student = block_states(new)
    born = state.create(
        lambda params: {"student": params, "objective": {}},
        student.params,
        student.graphdef,
        lambda params: optim.make_optimizer(own, params),
        family.PARTITION,
        setup.mesh,
    )
    rate, steps = float(settings.fit_learning_rate), settings.fit_steps
    found = loop.fit(
        born,
        stage=f"{stage.name} {phase.number}, blocks {', '.join(map(str, sorted(phase.layers)))}",
        plan=Plan(objective, setup.mesh, family.PARTITION, config.accumulate, dropout=False),
        stream=setup.task.train(
            stage.batch_size,
            config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ),
        teacher=block_states(Model(kept, phase.before.abstract().graphdef)),
        schedules=loop.Schedules(lambda step: rate, {"fit": lambda step: 1.0}, {}, config.seed),
        steps=steps,
        validate=None,
        intervals=loop.Intervals(steps, config.checkpoint.every, config.log.every),
        keep=1,
        directory=directory,
    )
    return found.state.params["student"]
