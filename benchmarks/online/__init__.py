"""Streaming gradients."""
