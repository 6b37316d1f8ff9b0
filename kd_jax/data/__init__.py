"""Reads sources, tokenizes them, and makes streams of batches."""
