"""Figures of models: from predictions, likelihoods, clocks and shapes."""
