"""Scores of a model: log-likelihoods, generation, metrics."""
