"""Steady states: three models of scientists, their parameters found from data."""
