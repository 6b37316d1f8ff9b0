"""Runs whole experiments: the only package in which models, data, objectives and training meet."""
