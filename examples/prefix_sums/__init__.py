"""Prefix sums: a network that thinks longer than it was trained to."""
