"""Losses: row-wise divergences run by one chunked engine, and terms over states and attention."""
