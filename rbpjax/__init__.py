"""Gradients of recurrent computations without their history, as JAX transforms."""

__version__ = "0.1.0"
