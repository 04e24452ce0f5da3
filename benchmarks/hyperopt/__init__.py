"""Hyperparameters by hypergradients."""
