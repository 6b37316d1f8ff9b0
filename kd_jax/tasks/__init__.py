"""Defines tasks: each names its text, labels, metrics and model head."""
