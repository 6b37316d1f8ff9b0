"""Substitution of blocks: a decoder becomes smaller while it trains, beside other ways to it.

The stages of a run, as `config.stages` lists them: `teacher` trains the original on the labels
(left out where it is good as it comes, and judged all the same), `substitute` replaces its blocks
by compact ones, a few at a time (phases.py), trained on config.objective beside the original, and
`student` is ordinary distillation of a small model whose shape is fixed, on the same objective. All
see the same batches in the same order.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from kd_jax.recipes import pretrain
from kd_jax.recipes.substitution_setup import SubstitutionSetup as Setup
from kd_jax.run.workdir import RunDirectory


def run(config: ConfigDict, place: RunDirectory) -> dict[str, Any]:
    """Runs what is left of the run in `place` and returns its results (see results.json)."""
    return pretrain.run(config, place, Setup)
