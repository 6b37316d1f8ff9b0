"""Computes metrics of models from predictions and likelihoods, and their costs."""
