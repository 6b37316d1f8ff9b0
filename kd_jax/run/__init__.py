"""Defines a run and what its stages share: models, teachers, metrics and the run directory."""
