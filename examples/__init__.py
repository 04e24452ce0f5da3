"""Whole programs on public names, one folder each."""
