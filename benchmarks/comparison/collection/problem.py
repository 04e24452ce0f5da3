"""What a problem of the collection is, and the numbers that several files draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Problem(NamedTuple):
    """A fixed point h = f(params, inputs, h) to be found from ``h0``.

    Data are NumPy arrays in float64 (or complex128); who solves casts them, and f works
    in the dtype of its arguments.

    Attributes:
      family: the group that it belongs to.
      f: the step function.
      params: floating-point arrays, for which the gradient is taken.
      inputs: what else f needs.
      h0: the start.
      has_answer: False where there is no fixed point, or the start is out of f's
        domain: then anything but *converged* is right.
      floor: norm of a leaf, one for all leaves, below which its error is absolute.
      allowed: the error of a right value, where it is not that of the precision.
      smooth: what f is without the rounding of its own products; the judge's f.
      note: what is special.
    """

    family: str
    f: Callable[[Any, Any, Any], Any]
    params: Any
    inputs: Any
    h0: Any
    has_answer: bool = True
    floor: float = 0.0
    allowed: float | None = None
    smooth: Callable[[Any, Any, Any], Any] | None = None
    note: str = ""


Problems = dict[str, Problem]


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal numbers."""
    return np.random.default_rng(seed).normal(size=shape)


def orthogonal(seed: int, n: int) -> np.ndarray:
    """A random orthogonal matrix."""
    return np.linalg.qr(normal(seed, n, n))[0]


def definite(seed: int, n: int, condition: float) -> np.ndarray:
    """A symmetric matrix with eigenvalues from 1 / condition to 1."""
    q = orthogonal(seed, n)
    return (q * np.geomspace(1 / condition, 1, n)) @ q.T


def softmax(x: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def soft(v: Any, threshold: Any) -> Any:
    """The soft threshold: the proximal map of the 1-norm."""
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - threshold, 0)


def affine(w: Any, x: Any, h: Any) -> Any:
    """W h + x."""
    return w @ h + x
