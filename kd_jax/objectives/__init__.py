"""Defines losses: divergences of logits, computed in chunks, and distances between layers."""
