"""Whole programs over the library, a folder each."""
