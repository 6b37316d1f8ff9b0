"""Defines tasks: which text, which labels, which head."""
