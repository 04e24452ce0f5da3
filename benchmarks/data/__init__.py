"""Data sets, none of which is in the project."""
