"""Schedules a substitution before training: which blocks become compact, and at which step.

Musaeus and van der Goot 2025, "Iterative Structured Knowledge Distillation" (COLING 2025 main 440):
a few blocks at a time are replaced while the model trains, until it has the wanted size. Each phase
of the stage begins with a swap; the last phase, the final fine-tuning, lasts to the end of the
stage. config.substitution sets which blocks, and when.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax

from kd_jax import plugins, storage
from kd_jax.errors import UserError
from kd_jax.models import compact, family
from kd_jax.models.blueprint import Blueprint, count
from kd_jax.models.compact import block_states
from kd_jax.models.model_config import BlockShape, ModelConfig, bottleneck
from kd_jax.objectives.objective import Objective
from kd_jax.run import models
from kd_jax.run.run import Run
from kd_jax.run.settings import Settings
from kd_jax.run.stage import Parameters
from kd_jax.run.teaching import frozen
from kd_jax.train.optim import Group
from kd_jax.train.passes import evaluate
from kd_jax.train.step import Program
from kd_jax.types import Params

IMPORTANCE = "importance.json"  # of a run directory

ORDERS = ("last_first", "first_first", "importance")


@dataclasses.dataclass(frozen=True)
class Swap:
    """A swap: the blocks that become compact, and the steps (start, end] that follow."""

    number: int  # from 1
    start: int
    end: int
    layers: tuple[int, ...]  # that the swap makes compact
    births: tuple[int, ...]  # of every block: the swap it came with, 0 for the original's
    before: Blueprint  # the model that the swap finds
    model: Blueprint  # the model that it makes

    @property
    def parameters(self) -> int:
        """Counts the parameters of the model that it makes."""
        return count(self.model.abstract().params)

    def groups(self, settings: Any, optim: Any) -> list[tuple[str, Group]]:
        """Groups parameters for the optimizer: the original's, and those of every swap, which
        learn at the rate of config.substitution."""
        factor, warmup, rows = settings.learning_rate / optim.learning_rate, settings.warmup, []
        for birth in range(1, self.number + 1):
            born = [str(layer) for layer, each in enumerate(self.births) if each == birth]
            rows.append((_blocks(born), Group(f"born_{birth}", factor, warmup)))
        return [*rows, (".*", Group("born_0"))]

    @property
    def pattern(self) -> str:
        """Makes a regex that matches the new blocks' parameters in a state."""
        return _blocks(map(str, self.layers))


def _blocks(layers) -> str:
    return f"^student/backbone/blocks/({'|'.join(map(re.escape, layers))})/"


def compact_shape(settings: Any, config: ModelConfig) -> BlockShape:
    """Reads the shape of the compact blocks. Raises UserError if it is invalid or not smaller."""
    counts = settings.num_heads, settings.num_kv_heads
    if settings.kind == "bottleneck":
        return bottleneck(settings.width, *counts, settings.ffn_width)
    if settings.width:
        raise UserError(
            f"config.substitution.width={settings.width}: slim blocks are as wide as the model; "
            f"set it to 0, or kind to bottleneck"
        )
    own = config.own_shape
    return BlockShape("full", own.width, *counts, own.head_width, settings.ffn_width)


def order(settings: Any, num_layers: int, importance: Sequence[float] | None = None) -> list[int]:
    """Lists the blocks, numbered from 0, in the order in which they are replaced.

    If the order is by `importance` (of each block), the least important is replaced first; if that
    is None, not yet measured, the last block. Raises UserError for an invalid order.
    """
    given = settings.order
    if given == "first_first":
        return list(range(num_layers))
    if given == "importance" and importance is not None:
        return sorted(range(num_layers), key=lambda layer: (importance[layer], -layer))
    if given in ("last_first", "importance"):
        return list(range(num_layers))[::-1]
    if isinstance(given, str) or not all(type(layer) is int for layer in given):
        raise UserError(
            f"config.substitution.order={given!r}: have {', '.join(ORDERS)}, or a list of blocks"
        )
    for layer in given:
        if not 0 <= layer < num_layers:
            raise UserError(
                f"config.substitution.order: no block {layer}: the model has blocks 0 to "
                f"{num_layers - 1}"
            )
    if len(set(given)) < len(given) or not given:
        raise UserError(
            f"config.substitution.order={list(given)}: name at least one block, none of them twice"
        )
    return list(given)


def schedule(settings: Any, original: Blueprint, blocks: list[int], steps: int) -> list[Swap]:
    """Schedules the swaps of a stage of `steps` steps.

    Args:
        settings: config.substitution.
        original: the model that is made smaller.
        blocks: the blocks in the order in which they are replaced.
        steps: number of steps of the stage.

    Raises UserError if the target cannot be reached, naming the largest possible one, and if there
    are too few steps.
    """
    config, shape = original.config, compact_shape(settings, original.config)
    whole, sizes = _sizes(original)
    _, small = _sizes(_with_blocks(original, [shape] * config.num_layers))
    saved = [sizes[layer] - small[layer] for layer in blocks]
    if min(saved) <= 0:
        raise UserError(
            f"config.substitution: a compact block would have {max(small):,} parameters, the "
            f"model's own have {min(sizes):,}; make width, heads or ffn_width smaller"
        )
    want = math.ceil(settings.target * whole)
    if not 0 < settings.target < 1 or want > sum(saved):
        reach = math.floor(1e4 * sum(saved) / whole) / 1e4
        raise UserError(
            f"config.substitution.target={settings.target:g}: want a share above 0 and at most "
            f"{reach:g}, which is reached with all {len(blocks)} blocks of the order replaced; "
            f"lower it, or make the compact blocks smaller"
        )
    going = next(n for n in range(1, len(saved) + 1) if sum(saved[:n]) >= want)
    phases = -(-going // settings.blocks)
    if (phases - 1) * settings.steps >= steps:
        raise UserError(
            f"config.substitution: {phases} phases of {settings.steps} steps need more than the "
            f"{(phases - 1) * settings.steps} steps before the last, the stage has {steps}; raise "
            f"its steps (what is left is final fine-tuning) or substitution.blocks"
        )
    found, births, model = [], [0] * config.num_layers, original
    for number in range(1, phases + 1):
        layers = tuple(blocks[:going][(number - 1) * settings.blocks : number * settings.blocks])
        for layer in layers:
            births[layer] = number
        changed = [shape if born else config.shape(layer) for layer, born in enumerate(births)]
        before, model = model, _with_blocks(original, changed)
        end = steps if number == phases else number * settings.steps
        start = (number - 1) * settings.steps
        found.append(Swap(number, start, end, layers, tuple(births), before, model))
    return found


def at_once(swaps: Sequence[Swap]) -> Swap:
    """Merges swaps into one that replaces all of their blocks before the first step."""
    layers = tuple(layer for swap in swaps for layer in swap.layers)
    births = tuple(min(birth, 1) for birth in swaps[-1].births)
    return dataclasses.replace(
        swaps[-1], number=1, start=0, layers=layers, births=births, before=swaps[0].before
    )


def _with_blocks(original: Blueprint, blocks: list[BlockShape]) -> Blueprint:
    config = compact.with_blocks(original.config, blocks)
    return original.changed(f"{original.name} with compact blocks", config)


def _sizes(model: Blueprint) -> tuple[int, list[int]]:
    """Counts the parameters of a model, and of each of its blocks; nothing is allocated."""
    params = model.abstract().params
    blocks = params["backbone"]["blocks"]
    return count(params), [count(blocks[layer]) for layer in range(model.config.num_layers)]


def of(run: Run) -> list[Swap]:
    """Schedules the swaps of a run, which all of its stages share.

    If the order is by an importance that is not measured yet, the last blocks are replaced first:
    with equal blocks, sizes are the same. Raises UserError if blocks have no compact form.
    """
    settings, teacher = run.config.substitution, run.models["teacher"]
    check_blocks(teacher, f"teacher {teacher.name}")
    blocks = order(settings, teacher.config.num_layers, _importance(run))
    key = ("swaps", *blocks)
    if key not in run.shared:
        own = [each.steps for each in run.settings if each.kind == "substitute"]
        config = dataclasses.replace(teacher.config, **models.execution(run.config))
        original = run.labelled(dataclasses.replace(teacher, config=config))
        steps = own[0] if own else run.settings[-1].steps
        run.shared[key] = schedule(settings, original, blocks, steps)
    return run.shared[key]


def check_blocks(teacher: Blueprint, what: str) -> None:
    """Raises UserError if a model's blocks have no compact form."""
    if not teacher.config.unequal:
        raise UserError(
            f"{what}: the blocks of {teacher.family.name} have no compact form; take a model whose "
            f"blocks are attention and one MLP, such as BERT, DistilBERT, RoBERTa or a decoder"
        )


def known(run: Run) -> bool:
    """Tells whether the order of a run's swaps is known."""
    return run.config.substitution.order != "importance" or _importance(run) is not None


def measure_first(run: Run, settings: Settings) -> Callable[[Parameters], None] | None:
    """Makes a function that measures the order of a run's swaps before a stage; None if the order
    is known."""
    if known(run):
        return None

    def measure(parameters: Parameters) -> None:
        found = importance(run, parameters["teacher"], settings.batch_size)
        if jax.process_index() == 0:
            run.folder.mkdir(parents=True, exist_ok=True)
            storage.write_json(run.folder / IMPORTANCE, {"importance": found})
        run.shared["importance"] = found

    return measure


def _importance(run: Run) -> list[float] | None:
    """Reads the measured importance of a run's blocks; None if their order does not depend on it or
    it is not measured yet."""
    if run.config.substitution.order != "importance":
        return None
    path = None if run.folder is None else run.folder / IMPORTANCE
    if "importance" not in run.shared and path is not None and path.exists():
        run.shared["importance"] = storage.read_json(path)["importance"]
    return run.shared.get("importance")


def importance(run: Run, params: Params, batch_size: int) -> list[float]:
    """Measures the importance of each block of the teacher: one minus the cosine between its input
    and its output, a mean over the tokens of the first training batches (Men et al. 2024,
    "ShortGPT", arXiv:2403.03853, eq. 1)."""
    make = plugins.load("objectives", "hidden", "make").make
    layers = run.models["teacher"].config.num_layers
    terms = tuple((f"block_{i}", make("cosine", ((i, i + 1),))) for i in range(layers))
    objective = Objective((), terms, (), run.policy, run.policy)
    model = block_states(frozen(run, "teacher", params))
    stream = run.tasks["teacher"].train(batch_size, run.config.seed, **run.processes)
    count = run.config.substitution.importance_batches
    text = SimpleNamespace(batches=lambda: itertools.islice(stream.batches(), count))
    found = evaluate(model, text, model, Program(objective, run.mesh, family.PARTITION))
    return [found[name] for name, _ in terms]
