"""Kinds of stages: `make(run, name, settings)` of the module that config.stages.NAME.kind names."""
