"""KF-RTRL: a random Kronecker factorization of the influence."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rbpjax._core.norm import plain, root
from rbpjax._core.tree import axpy, scale
from rbpjax.online.balance import scales
from rbpjax.online.cell import (
    PreactivationCell,
    UnitJacobians,
    check_cell,
    kernel_to_params,
    unit_jacobians,
)
from rbpjax.online.estimator import (
    Carry,
    Estimator,
    LossFn,
    OnlineOutput,
    check_real,
    checked,
    observe,
    start,
)
from rbpjax.types import PyTree


class Kronecker(NamedTuple):
    """The influence A ⊗ u on the cell's matrix W, in O(n²) memory.

    For n units with S state leaves, a gates and k features; the influence on
    ``params`` is what ``cell.kernel`` makes of it.

    Attributes:
      u: ``[k]``, in the space of the features ĥ.
      a: ``[S, n, a, n]``, in the space of ∂h/∂z: state leaf and unit, gate and unit.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.online.kf_rtrl import Kronecker
      >>> g = Kronecker(u=jnp.ones(3), a=jnp.zeros((1, 2, 1, 2)))
      >>> jnp.einsum("siaj,k->siajk", g.a, g.u).shape  # ∂h/∂W, the whole of it
      (1, 2, 1, 2, 3)
    """

    u: jax.Array
    a: jax.Array


def pushed(
    cell: PreactivationCell, params: PyTree, x: PyTree, h: PyTree, a: jax.Array
) -> jax.Array:
    """J A, column by column of A."""

    def push(column: jax.Array) -> jax.Array:
        leaves, treedef = jax.tree.flatten(h)
        parts = [c.astype(s.dtype) for c, s in zip(column, leaves, strict=True)]
        tangent = treedef.unflatten(parts)
        _, out = jax.jvp(lambda s: cell(params, x, s), (h,), (tangent,))
        return jnp.stack(jax.tree.leaves(out)).astype(a.dtype)

    return jax.vmap(jax.vmap(push, -1, -1), -1, -1)(a)


def immediate(inside: UnitJacobians, like: jax.Array) -> jax.Array:
    """D = ∂h'/∂z, in the form of A: zero between units."""
    units = jnp.arange(like.shape[1])
    by_unit = jnp.swapaxes(inside.gates, 0, 1)
    return jnp.zeros_like(like).at[:, units, :, units].set(by_unit)


def kf_rtrl(cell: PreactivationCell, loss: LossFn) -> Estimator:
    """Streams gradients with a Kronecker product as estimate of the influence.

    For h' = activate(W ĥ, h), the immediate influence on W is a Kronecker product,
    F = D ⊗ ĥ with D = ∂h'/∂z. With E A ⊗ u = G, two signs a step merge the products:

        u ← ε₁ p₁ u + ε₂ p₂ ĥ,            p₁ = √(‖J A‖ / ‖u‖),
        A ← ε₁ J A / p₁ + ε₂ D / p₂,      p₂ = √(‖D‖ / ‖ĥ‖).

    The gradient is ∂loss/∂θ + δD ⊗ ĥ + δJA ⊗ u, whose first two terms are exact.

    Unbiased at fixed parameters, at every step. There is no noise between units,
    only between times, so the variance is far below ``uoro``'s, for more computation.

    Cost: O(n) JVPs, time O(n³), memory O(n²), whatever the length of the run. Works
    under ``jit``, ``vmap`` and ``scan``. A run can be differentiated in forward and
    reverse mode; reverse mode stores its history.

    Args:
      cell: step function as a ``PreactivationCell``. Only ``cell.kernel`` sees
        the parameters, so no influence is lost.
      loss: ``loss(params, h, y) -> scalar`` at the new state.

    Returns:
      An ``Estimator``. Its influence is ``Kronecker(u, a)``; its noise two signs.

    Raises:
      ValueError: ``cell`` is no ``PreactivationCell``; from ``init`` and ``step`` as
        in ``Estimator``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> cell = online.PreactivationCell(
      ...     kernel=lambda W: W[None],
      ...     features=lambda x, h: jnp.concatenate([h, x]),
      ...     activate=lambda z, h: jnp.tanh(z[0]),
      ... )
      >>> est = online.kf_rtrl(cell, lambda W, h, y: jnp.sum((h - y) ** 2))
      >>> W, x, y = jnp.full((2, 3), 0.5), jnp.ones(1), jnp.zeros(2)
      >>> carry = est.init(W, jnp.zeros(2))
      >>> carry, out = est.step(W, carry, x, y, est.noise(jax.random.key(0), carry))
      >>> out.grads.shape, carry.influence.a.shape
      ((2, 3), (1, 2, 1, 2))

    References:
      Mujika, Meier, Steger, "Approximating Real-Time Recurrent Learning with Random
      Kronecker Factors", https://arxiv.org/abs/1805.10842; recursion as in the public
      code omarschall/vanilla-rtrl.
    """
    check_cell(cell)

    def init(params: PyTree, h0: PyTree) -> Carry:
        h0 = start(params, h0)
        check_real(h0, "h0")
        gates, units, size = jnp.shape(cell.kernel(params))
        leaves = len(jax.tree.leaves(h0))
        dtype = jnp.result_type(cell.kernel(params))
        u = jnp.zeros(size, dtype)
        return Carry(h0, Kronecker(u, jnp.zeros((leaves, units, gates, units), dtype)))

    def noise(key: jax.Array, carry: Carry) -> jax.Array:
        return jax.random.rademacher(key, (2,), carry.influence.u.dtype)

    def step(
        params: PyTree, carry: Carry, x: PyTree, y: PyTree, noise: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        u, a = carry.influence
        here = observe(cell, loss, params, carry.h, x, y)
        inside = jax.tree.map(
            lambda j: j.astype(a.dtype), unit_jacobians(cell, params, x, carry.h)
        )
        ja = pushed(cell, params, x, carry.h, a)
        d = immediate(inside, a)

        delta = jnp.stack(jax.tree.leaves(here.delta)).astype(a.dtype)
        kernel_grad = jnp.einsum("si,siaj,k->ajk", delta, ja, u) + jnp.einsum(
            "si,sia,k->aik", delta, inside.gates, inside.features
        )
        past_and_last = kernel_to_params(cell, params, kernel_grad)
        grads = optax.tree.add(here.direct, past_and_last)

        # No care for magnitudes: those of the parameters are not in here, and those of
        # states and inputs are what the loss squares too.
        p1, p2 = scales(
            [root(plain(x)) for x in (u, inside.features)],
            [root(plain(x)) for x in (ja, inside.gates)],
        )
        influence = Kronecker(
            axpy(noise[0] * p1, u, scale(noise[1] * p2, inside.features)),
            axpy(noise[0] / p1, ja, scale(noise[1] / p2, d)),
        )
        return Carry(here.h_next, influence), OnlineOutput(here.loss, grads)

    return checked(init, noise, step)
