"""Decorrelation: a linear map that keeps activities uncorrelated."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Init(Protocol):
    """``init(n, dtype)``: the identity, ``[n, n]``."""

    def __call__(self, n: int, dtype: jax.typing.DTypeLike = float) -> jax.Array:
        """Returns the matrix to start from."""
        ...


class Decorrelation(NamedTuple):
    """Three pure functions around one matrix D, ``[n, n]``.

    Attributes:
      init: ``init(n, dtype) -> D``, the identity.
      apply: ``apply(D, x) -> x̂ = D x``, for x ``[…, n]``. No gradient reaches D.
      update: ``update(D, x) -> D`` from activities x ``[…, n]``, all rows alike.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> decorrelation = perturb.decorrelate(0.1)
      >>> decorrelation.apply(decorrelation.init(2), jnp.array([1.0, 2.0])).tolist()
      [1.0, 2.0]
    """

    init: Init
    apply: Callable[[jax.Array, jax.Array], jax.Array]
    update: Callable[[jax.Array, jax.Array], jax.Array]


def decorrelate(
    rate: float,
    *,
    multiply: bool = True,
    center: bool = False,
    keep_norm: bool = False,
) -> Decorrelation:
    """Makes the update that learns to decorrelate activities.

    With x̂ = D x and C the mean of x̂ x̂ᵀ over rows, its diagonal set to zero,

        D ← D - rate C D.

    As a flow on activities with covariance Σ (X = DΣDᵀ) it lets ‖C‖² fall
    monotonically, d‖C‖²/dt = -4 tr(C²X) ≤ 0, keeps det D, and stops where C = 0. It
    knows no loss and no gradient, so that it composes with every estimator and with
    ``jax.grad``: update D beside the parameters, and hand it to the cell (see
    ``DenseCell``) by closure.

    Cost: one product [n, n] with [n, n] and one with the rows, an update;
    memory: one matrix [n, n]. Works under ``jit``, ``vmap``, ``scan``; no AD mode goes
    through D.

    Args:
      rate: step size, at least 0; too large a one diverges, as any gradient step.
      multiply: False for D ← D - rate C, the update of the authors' code at the time of
        the paper. It decorrelates too, but to another D, with a smaller det D.
      center: subtract the mean of the rows before C is formed. The authors' code does
        not: then the mean counts as correlation.
      keep_norm: rescale D so that the mean of ‖x̂‖ stays that of ‖x‖; without it
        activities shrink, and with them effective step sizes.

    Returns:
      A ``Decorrelation``.

    Raises:
      ValueError: ``rate`` is no Python number of at least 0; from ``update``, if the
        shapes of D and x do not agree.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> mix = jnp.array([[1.0, 0.0], [0.9, 0.4]])
      >>> x = jax.random.normal(jax.random.key(0), (500, 2)) @ mix
      >>> init, apply, update = perturb.decorrelate(0.1)
      >>> D = jax.lax.fori_loop(0, 500, lambda _, D: update(D, x), init(2))
      >>> y = apply(D, x)
      >>> bool(jnp.abs(jnp.mean(y[:, 0] * y[:, 1])) < 1e-5)
      True

    References:
      García Fernández, Keemink, van Gerven, https://arxiv.org/abs/2405.08967, and
      their public code.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate >= 0:
        raise ValueError(f"`rate` must be a Python number of at least 0; got {rate!r}.")

    def init(n: int, dtype: jax.typing.DTypeLike = float) -> jax.Array:
        return jnp.eye(n, dtype=dtype)

    def apply(matrix: jax.Array, x: jax.Array) -> jax.Array:
        return x @ jax.lax.stop_gradient(matrix).T

    def update(matrix: jax.Array, x: jax.Array) -> jax.Array:
        n = matrix.shape[-1]
        if matrix.shape != (n, n) or jnp.ndim(x) < 1 or x.shape[-1] != n:
            raise ValueError(
                f"`x` must be [..., n] for a `D` of [n, n]; got {jnp.shape(x)} and "
                f"{matrix.shape}."
            )
        x = x.reshape(-1, n)
        seen = x @ matrix.T
        rows = seen - jnp.mean(seen, axis=0, keepdims=True) if center else seen
        correlation = rows.T @ rows / len(rows) * (1 - jnp.eye(n, dtype=matrix.dtype))
        new = matrix - rate * (correlation @ matrix if multiply else correlation)
        if keep_norm:
            length = lambda a: jnp.mean(jnp.linalg.norm(a, axis=1))
            old, now = length(x), length(x @ new.T)
            new = new * jnp.where(now > 0, old / jnp.where(now > 0, now, 1), 1)
        return jax.lax.stop_gradient(new)

    return Decorrelation(init, apply, update)
