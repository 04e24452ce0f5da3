"""Nonlinearities of fields: a public namespace of activations.

* ``identity``: the linear cell; norm and gradient are preserved exactly;
* ``saturate``: the phase-preserving sigmoid of the paper, with an inverse;
* ``modulus``, ``max_min``: keep the norm, and have no inverse.

Cost: elementwise. AD modes: all.

Example:
  >>> import jax.numpy as jnp
  >>> from rbpjax.unitary import activation
  >>> activation.max_min(jnp.array([1.0, 3.0, 2.0, -1.0])).tolist()
  [3.0, 1.0, 2.0, -1.0]
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rbpjax._core.strategy import function, strategy

__all__ = ["Activation", "identity", "max_min", "modulus", "saturate"]


@strategy
class Activation:
    """A nonlinearity of fields and, where it exists, its inverse.

    Attributes:
      apply: field to field, same shape and dtype.
      inverse: the inverse map, or None if there is none.

    Raises:
      ValueError: if ``apply`` or ``inverse`` cannot be called.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.unitary import UnitaryCell, activation
      >>> tanh = activation.Activation(apply=jnp.tanh, inverse=jnp.arctanh)
      >>> cell = UnitaryCell(lattice=(8,), complex_valued=False, activation=tanh)
      >>> cell.activation.inverse(tanh(jnp.array([0.5]))).round(3).tolist()
      [0.5]

    References:
      Magnasco, https://arxiv.org/abs/2302.07396.
    """

    apply: Callable[[jax.Array], jax.Array] = function(meaning="a function of a field")
    inverse: Callable[[jax.Array], jax.Array] | None = function(
        default=None, meaning="a function of a field, or None"
    )

    def __call__(self, field: jax.Array) -> jax.Array:
        """Applies the nonlinearity."""
        return self.apply(field)

    def undo(self, field: jax.Array) -> jax.Array:
        """Applies its inverse.

        Raises:
          ValueError: if it has none.
        """
        if self.inverse is None:
            raise ValueError(
                f"{self!r} has no inverse, so the states cannot be recomputed "
                "backwards; use `recomputed_scan` with Replay(slots=…)."
            )
        return self.inverse(field)


def _squared_modulus(z: jax.Array) -> jax.Array:
    return z.real**2 + z.imag**2


def _identity(z: jax.Array) -> jax.Array:
    return z


def _saturate(z: jax.Array) -> jax.Array:
    # Where |z|² would overflow, the 1 is nothing beside it, and z may be scaled.
    half = jnp.finfo(z.dtype).maxexp // 2
    large = jnp.maximum(jnp.abs(z.real), jnp.abs(z.imag)) > 2.0 ** (half - 1)
    z = z * jnp.where(large, 2.0 ** -(half + 2), 1).astype(z.dtype)
    one = jnp.where(large, 0, 1).astype(z.real.dtype)
    return z * jax.lax.rsqrt(one + _squared_modulus(z)).astype(z.dtype)


def _desaturate(z: jax.Array) -> jax.Array:
    return z * jax.lax.rsqrt(1 - _squared_modulus(z)).astype(z.dtype)


def _modulus(z: jax.Array) -> jax.Array:
    # Componentwise, also on complex fields, where |z| alone would lose N more reals.
    if jnp.iscomplexobj(z):
        return jax.lax.complex(jnp.abs(z.real), jnp.abs(z.imag))
    return jnp.abs(z)


def _max_min(z: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(z):
        return jax.lax.complex(_max_min(z.real), _max_min(z.imag))
    if z.shape[-1] % 2:
        raise ValueError(
            "max_min sorts pairs along the last axis (the channels), which must be "
            f"even; got a field of shape {z.shape}."
        )
    pairs = z.reshape(*z.shape[:-1], -1, 2)
    return jnp.stack([pairs.max(-1), pairs.min(-1)], -1).reshape(z.shape)


identity = Activation(apply=_identity, inverse=_identity)
"""φ(z) = z: the linear cell. Norm and gradient are preserved exactly."""

saturate = Activation(apply=_saturate, inverse=_desaturate)
"""φ(z) = z/√(1+|z|²), the phase-preserving sigmoid of the paper (|φ| < 1).

Not an isometry: as a map of the plane its singular values are (1+r²)^(-1/2) along
the phase and (1+r²)^(-3/2) along the radius r = |z|. Without input it forgets as
1/√n, not exponentially. Its inverse z/√(1-|z|²) is ill-conditioned near |z| = 1.
"""

modulus = Activation(apply=_modulus)
"""Componentwise |·| (of real and imaginary parts): keeps the norm, has no inverse."""

max_min = Activation(apply=_max_min)
"""(max, min) of each pair of channels (GroupSort): keeps the norm, no inverse."""
