"""Scalar maps, zeros, and maps without any fixed point."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.comparison.collection.problem import (
    Problem,
    Problems,
    normal,
    softmax,
)


def problems() -> Problems:
    add = partial(Problem, "oddities")
    none = partial(add, has_answer=False)
    one = np.array(1.0)
    scalar = lambda h0: np.array(float(h0))
    p: Problems = {
        "zero: h / 2 from ones": add(
            lambda a, _, h: a * h, scalar(0.5), None, np.ones(3), floor=1.0, note="zero"
        ),
        "zero: -0.999 h": add(
            lambda a, _, h: a * h,
            scalar(-0.999),
            None,
            np.ones(3),
            floor=1.0,
            note="zero",
        ),
        "zero: sin(h) from 1": add(
            lambda a, _, h: jnp.sin(a * h),
            one,
            None,
            one,
            floor=1.0,
            allowed=0.05,
            note="zero; singular root",
        ),
        "zero: -2 tanh(h)": add(
            lambda a, _, h: -a * jnp.tanh(h),
            scalar(2),
            None,
            one,
            floor=1.0,
            note="zero; a cycle of two",
        ),
        "tent 1 - 1.8 |h|": add(
            lambda a, _, h: 1 - a * jnp.abs(h), scalar(1.8), None, scalar(0.2)
        ),
        "logistic, r 3.2": add(
            lambda r, _, h: r * h * (1 - h),
            scalar(3.2),
            None,
            scalar(0.3),
            floor=1.0,
            note="a cycle of two",
        ),
        "logistic, r 4": add(
            lambda r, _, h: r * h * (1 - h),
            scalar(4),
            None,
            scalar(0.3),
            floor=1.0,
            note="chaos",
        ),
        "cubic 1.5 h - 0.5 h³ from 0.1": add(
            lambda a, _, h: a * h - (a - 1) * h**3,
            scalar(1.5),
            None,
            scalar(0.1),
            floor=1.0,
        ),
        "relay smoothed over 1e-3": add(
            lambda c, _, h: jax.nn.sigmoid((c - h) / 1e-3), scalar(0.5), None, one
        ),
        # --- no fixed point ----------------------------------------------------------
        "none: h + exp(-h)": none(
            lambda a, _, h: h + jnp.exp(-a * h), one, None, scalar(0)
        ),
        "none: h + 1": none(lambda a, _, h: h + a, one, None, np.zeros(2)),
        "none: h² + 1": none(lambda a, _, h: h**2 + a, one, None, scalar(0)),
        "none: softplus(h)": none(
            lambda a, _, h: jax.nn.softplus(a * h), one, None, scalar(0)
        ),
        "none: √(1 + h²)": none(
            lambda a, _, h: jnp.sqrt(a + h**2), one, None, scalar(0)
        ),
        "none: relay": none(
            lambda c, _, h: (h < c).astype(h.dtype), scalar(0.5), None, scalar(0.2)
        ),
        "none: inconsistent affine, I - A singular": none(
            lambda x, a, h: a @ h + x,
            np.abs(normal(601, 6)),
            softmax(normal(602, 6, 6)),
            np.zeros(6),
        ),
        "none: absolute value equation": none(
            absolute_value, *ABSOLUTE_VALUE, np.zeros(8)
        ),
        "none: log(h) from -1": none(
            lambda a, _, h: jnp.log(a * h),
            one,
            None,
            scalar(-1),
            note="the start is out of the domain",
        ),
    }
    return p


def absolute_value(x: Any, w: Any, h: Any) -> Any:
    """W |h| + x: without a fixed point if no pattern of signs has one (tested)."""
    return w @ jnp.abs(h) + x


ABSOLUTE_VALUE = normal(0, 8), 2 * normal(1000, 8, 8) / 8**0.5


def has_fixed_point(x: np.ndarray, w: np.ndarray) -> bool:
    """Whether h = W |h| + x for any h, by trying all patterns of signs."""
    n = x.size
    signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    h = np.linalg.solve(np.eye(n) - w * signs[:, None, :], x[None, :, None])[..., 0]
    return bool((h * signs >= -1e-9).all(1).any())
