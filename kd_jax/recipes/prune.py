"""Structured L1 pruning of a decoder, and fine-tuning of what is left.

The stages of a run, as `config.stages` lists them: `teacher` trains the original on the labels
(left out where it is good as it comes, and judged all the same), `prune` takes the least important
heads and FFN columns away and fine-tunes. The figures of the pruned model before any fine-tuning
are those of `one_shot`. Beside substitution and ordinary distillation, on the same batches, pruning
is a stage of the recipe `substitute`.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from kd_jax.recipes import pretrain
from kd_jax.recipes.pruning_setup import PruningSetup as Setup
from kd_jax.run.workdir import RunDirectory


def run(config: ConfigDict, place: RunDirectory) -> dict[str, Any]:
    """Runs what is left of the run in `place` and returns its results (see results.json)."""
    return pretrain.run(config, place, Setup)
