"""How much each block of a model does: one minus the cosine between what it reads and what it
writes, a mean over the tokens of real text (Men et al. 2024, "ShortGPT", arXiv:2403.03853, eq. 1).
"""

from __future__ import annotations

import itertools
from typing import Any

import jax

from kd_jax import plugins, storage
from kd_jax.models import family
from kd_jax.models.decoder import block_states
from kd_jax.objectives.combine import Objective
from kd_jax.recipes import stage
from kd_jax.train.passes import evaluate
from kd_jax.train.step import Plan
from kd_jax.types import Params


class First:
    """The first batches of a stream."""

    def __init__(self, stream: Any, count: int):
        self._stream, self._count = stream, count

    def batches(self):
        return itertools.islice(self._stream.batches(0), self._count)


def importance(setup: Any, params: Params, batches: int, batch_size: int) -> list[float]:
    """Of every block of the teacher with these parameters, on the first training batches."""
    make = plugins.load("objectives", "hidden", "make").make
    count = setup.models["teacher"].config.num_layers
    terms = tuple((f"block_{i}", make("cosine", ((i, i + 1),))) for i in range(count))
    objective = Objective((), terms, (), setup.policy, setup.policy)
    model = block_states(stage.frozen(setup, "teacher", params))
    processes = dict(process_index=jax.process_index(), process_count=jax.process_count())
    text = First(setup.task.train(batch_size, setup.config.seed, **processes), batches)
    found = evaluate(model, text, model, Plan(objective, setup.mesh, family.PARTITION))
    return [found[name] for name, _ in terms]


def written(path: Any) -> list[float] | None:
    """What `write` left."""
    return storage.read_json(path)["importance"] if path.exists() else None


def write(path: Any, found: list[float]) -> None:
    """Keeps the importance of a run's blocks, in the first process."""
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_json(path, {"importance": found})
