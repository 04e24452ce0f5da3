"""The step functions of the fuzz, in JAX for the library and in NumPy for the oracle.

A state h is a pytree of arrays; its real numbers, in order, are the vector s ∘ u, with
units s that are constant in each leaf. All maps have the form

    f(θ, inputs, h) = s ∘ F(u),   F(u) = φ(W u + x) + b ∘ u + c,   θ = (W, x),

with a curve φ of its own for each entry. That covers networks, affine maps, gradient
descent, and maps without any fixed point, such as u + exp(-u). The gradient has simple
closed forms, so that the oracle shares no code with what is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Precision(NamedTuple):
    """What a problem is computed in.

    Attributes:
      dtype: of the state.
      eps: of the coarsest precision inside f.
      decades: units of leaves are from 10^-decades to 10^decades.
      mantissa: bits to which the operands of the product W u are rounded, if at all.
    """

    dtype: str
    eps: float
    decades: float = 8.0
    mantissa: int | None = None

    @property
    def real(self) -> str:
        """The dtype of real and imaginary parts."""
        return jnp.finfo(self.dtype).dtype.name

    @property
    def accuracy(self) -> float:
        """What a verdict of converged promises: half of the digits."""
        return self.eps**0.5


PRECISIONS = {
    "float16": Precision("float16", 2.0**-10, decades=1.5),
    "bfloat16": Precision("bfloat16", 2.0**-7),
    "float32": Precision("float32", 2.0**-23),
    "float64": Precision("float64", 2.0**-52),
    "complex64": Precision("complex64", 2.0**-23),
    "complex128": Precision("complex128", 2.0**-52),
    "float32, bfloat16 products": Precision("float32", 2.0**-7, mantissa=7),
    "float32, 10-bit products": Precision("float32", 2.0**-10, mantissa=10),
}


class Curve(NamedTuple):
    """A function of one number, written for ``jnp`` and ``np`` alike.

    Attributes:
      value: φ(xp, a).
      slope: φ'(a), in NumPy; the oracle's own.
      low, high: where |a| of a planned fixed point may lie: the slope is neither tiny
        nor huge there.
      signed: whether a may be negative there.
      blur: roundings, absolute, in its slope as JAX computes it; 0 where they are
        relative. 1 - tanh² is a difference: where tanh is 1 to rounding, the derivative
        of the f that is computed is another one than that of the f that is meant.
    """

    value: Callable[[Any, Any], Any]
    slope: Callable[[Any], Any]
    low: float
    high: float
    signed: bool = True
    blur: float = 0.0


CURVES = {
    "affine": Curve(lambda xp, a: a, np.ones_like, 0.0, 2.0),
    "tanh": Curve(
        lambda xp, a: xp.tanh(a), lambda a: 1 / np.cosh(a) ** 2, 0, 1.2, blur=2.0
    ),
    "sine": Curve(lambda xp, a: xp.sin(2 * a), lambda a: 2 * np.cos(2 * a), 0, 0.6),
    "softplus": Curve(
        lambda xp, a: xp.logaddexp(a, xp.zeros_like(a)),
        lambda a: 1 / (1 + np.exp(-a)),
        0,
        2,
    ),
    "relu": Curve(
        lambda xp, a: xp.where(a > 0, a, xp.zeros_like(a)),
        lambda a: (a > 0).astype(a.dtype),
        0.2,
        2,
    ),
    "arctan": Curve(lambda xp, a: xp.arctan(a), lambda a: 1 / (1 + a * a), 0, 1.5),
    "square": Curve(lambda xp, a: a * a, lambda a: 2 * a, 0.2, 1.5),
    "decay": Curve(lambda xp, a: xp.exp(-a), lambda a: -np.exp(-a), 0, 2, signed=False),
    "root": Curve(
        lambda xp, a: xp.sqrt(a), lambda a: 0.5 / np.sqrt(a), 0.2, 3, signed=False
    ),
    "hyperbola": Curve(
        lambda xp, a: xp.sqrt(1 + a * a), lambda a: a / np.sqrt(1 + a * a), 0.3, 2
    ),
}
CODES = {name: code for code, name in enumerate(CURVES)}


class Layout(NamedTuple):
    """How n real numbers make up a state.

    Attributes:
      n: how many; even for complex states, whose imaginary parts are the second half.
      kind: "array", "matrix" (of one row), "leaves" (a tuple) or "nest".
      cuts: where the leaves end, all but the last one.
      dtype: of the state.
    """

    n: int
    kind: str
    cuts: tuple[int, ...]
    dtype: str

    @property
    def leaf(self) -> np.ndarray:
        """The leaf of each real number."""
        complex_ = self.dtype.startswith("complex")
        length = self.n // 2 if complex_ else self.n
        leaf = np.searchsorted(np.array(self.cuts), np.arange(length), side="right")
        return np.concatenate([leaf, leaf]) if complex_ else leaf

    def unravel(self, v: jax.Array) -> Any:
        """The state whose real numbers are ``v``."""
        if self.dtype.startswith("complex"):
            v = jax.lax.complex(v[: self.n // 2], v[self.n // 2 :])
        parts = jnp.split(v, self.cuts)
        if self.kind == "array":
            return v
        if self.kind == "matrix":
            return v.reshape(1, -1)
        if self.kind == "leaves":
            return tuple(parts)
        first, *rest = parts
        return {"a": first, "b": (rest, jnp.zeros((0,), v.dtype))}  # an empty leaf too

    def ravel(self, h: Any) -> jax.Array:
        """The real numbers of a state."""
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(h)])
        if jnp.iscomplexobj(flat):
            return jnp.concatenate([flat.real, flat.imag])
        return flat


class Inputs(NamedTuple):
    """What f takes besides its parameters; none of it is differentiated.

    Attributes:
      unit: s, positive.
      code: of each entry's curve.
      b: the share of u itself.
      c: a constant.
    """

    unit: Any
    code: Any
    b: Any
    c: Any


def step_function(
    layout: Layout, curves: tuple[str, ...], mantissa: int | None
) -> Callable:
    """f, for problems that have no other curves than these."""

    def rounded(v: jax.Array) -> jax.Array:
        return v if mantissa is None else jax.lax.reduce_precision(v, 8, mantissa)

    def f(params: Any, inputs: Inputs, h: Any) -> Any:
        w, x = params
        unit, code, b, c = jax.lax.stop_gradient(inputs)
        u = layout.ravel(h) / unit
        a = rounded(w) @ rounded(u) + x
        y = jnp.zeros_like(a)
        for name in curves:
            mine = code == CODES[name]
            # One elsewhere: what overflows in a curve that is not this entry's would
            # make its derivative NaN.
            value = CURVES[name].value(jnp, jnp.where(mine, a, jnp.ones_like(a)))
            y = jnp.where(mine, value, y)
        return layout.unravel(unit * (y + b * u + c))

    return f


def image(
    params: tuple[np.ndarray, np.ndarray], inputs: Inputs, u: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """F(u) and φ'(W u + x) of a batch of problems, in NumPy."""
    w, x = params
    a = np.einsum("...ij,...j->...i", w, u) + x
    y, slope = np.zeros_like(a), np.zeros_like(a)
    for name in CURVES:
        mine = np.broadcast_to(inputs.code == CODES[name], a.shape)
        if mine.any():
            y[mine] = CURVES[name].value(np, a[mine])
            slope[mine] = CURVES[name].slope(a[mine])
    return y + inputs.b * u + inputs.c, slope


def jacobian(
    params: tuple[np.ndarray, np.ndarray], inputs: Inputs, slope: np.ndarray
) -> np.ndarray:
    """∂F/∂u of a batch of problems, where the curves have these slopes."""
    n = slope.shape[-1]
    return slope[..., :, None] * params[0] + inputs.b[..., :, None] * np.eye(n)
