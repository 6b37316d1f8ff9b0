"""Losses: row-wise divergences run by one chunked engine, and hidden-state terms."""
