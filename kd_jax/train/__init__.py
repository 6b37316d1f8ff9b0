"""Trains models: one train step, one loop, checkpoints and records."""
