"""Norm-preserving recurrence."""
