"""The parts of a stage: stretches of its steps in which the model keeps its shape. Most stages have
one; where blocks are substituted, every swap begins another.

The parts of a stage share one directory: a checkpoint's step tells its part. A part ends with a
checkpoint, and the next one's first state is a function of that checkpoint alone, so a run that
was killed between them makes it again, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from etils import epath

from kd_jax.recipes import stage
from kd_jax.recipes.stage import Stage
from kd_jax.train import loop
from kd_jax.train.checkpoint import Checkpoints
from kd_jax.train.state import TrainState
from kd_jax.types import Params


class Part(Protocol):
    """The steps (start, end] of a stage."""

    start: int
    end: int

    def check(self) -> None:
        """Finds, without any array, what `enter` would fail of."""

    def abstract(self) -> TrainState:
        """The shapes of its state."""

    def enter(self, before: TrainState | None) -> TrainState:
        """Its first state; `before` is the last one of the part before, None for the first part."""


@dataclasses.dataclass(frozen=True)
class Whole:
    """A stage whose model keeps its shape from the first step to the last."""

    setup: Any
    stage: Stage
    given: Mapping[str, Params]  # the models that are there already, by name

    start = 0

    @property
    def end(self) -> int:
        return self.stage.steps

    def check(self) -> None:
        stage.create_state(self.setup, self.stage, self.given, abstract=True)

    def abstract(self) -> TrainState:
        return stage.abstract_state(self.setup, self.stage)

    def enter(self, before: TrainState | None) -> TrainState:
        return stage.create_state(self.setup, self.stage, self.given)


def train(
    parts: Sequence[Part],
    *,
    stage: str,
    directory: epath.Path,
    selection: loop.Selection | None = None,
    **arguments: Any,
) -> loop.Fit:
    """Trains a stage through all of its parts, from its latest checkpoint if there is one.

    Only checkpoints of the last part are candidates for the best, by `selection` (None: the lowest
    loss). The other arguments are those of
    `loop.fit`.
    """
    keep = arguments["keep"]
    with contextlib.closing(Checkpoints(directory / "checkpoints", keep)) as checkpoints:
        latest = checkpoints.latest or 0
    state = None
    for number, part in enumerate(parts, 1):
        last = number == len(parts)
        if latest > part.end and not last:
            continue
        state = part.abstract() if latest > part.start else part.enter(state)
        fitted = loop.fit(
            state,
            stage=stage if len(parts) == 1 else f"{stage} {number}/{len(parts)}",
            directory=directory,
            selection=(selection or loop.Selection()) if last else None,
            begin=part.start,
            steps=part.end,
            **arguments,
        )
        state = fitted.state
    return fitted
