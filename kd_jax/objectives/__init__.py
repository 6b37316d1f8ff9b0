"""Losses: row-wise divergences run by one chunked engine, and terms over hidden states and attention."""
