"""Defines kinds of stages: the module named by config.stages.NAME.kind has `make(run, name,
settings)`."""
