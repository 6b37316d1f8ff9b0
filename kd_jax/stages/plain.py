"""Trains a model of the config that does not change during training: teacher, baseline, student ...

A student learns from the assistant if a stage trains one, and otherwise from the teachers. If the
config has a section `substitution` and does not describe the student's architecture, the student is
the model that substitution ends with.
"""

from __future__ import annotations

from kd_jax.run import stage
from kd_jax.run.run import Run
from kd_jax.run.settings import Settings
from kd_jax.run.stage import Stage
from kd_jax.stages import substitute


def make(run: Run, name: str, settings: Settings) -> Stage:
    """Makes a stage that trains one model of the config."""
    own = settings.model == "student"
    if own and substitute.shapes_student(run):
        return substitute.make_student(run, settings)
    assisted = own and settings.objective and "assistant" in run.trained
    return stage.make(run, settings, teachers=("assistant",) if assisted else run.teachers)
