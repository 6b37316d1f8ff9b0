"""Combines several teachers, and stores teachers' logits on disk."""
