"""SnAp-1: the influence kept where it is immediate."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rbpjax.online.cell import (
    PreactivationCell,
    UnitJacobians,
    check_cell,
    unit_jacobians,
)
from rbpjax.online.estimator import (
    Carry,
    Estimator,
    LossFn,
    OnlineOutput,
    merge,
    no_noise,
    observe,
)
from rbpjax.types import PyTree


def snap1(cell: PreactivationCell, loss: LossFn) -> Estimator:
    """Streams gradients with the sparse one-step approximation of the influence.

    Each entry of W reaches one unit within one step. RTRL's recursion is carried for
    this unit only, all other entries of G are dropped:

        B ← diag(J) B + D ⊗ ĥ,    gradient = ∂loss/∂θ + δ B,

    where diag(J) is the part of J from each unit to itself (a small block if the
    state has several leaves).

    Truncated (biased): influence through other units is lost. Exact where each unit
    feeds back on itself only. No noise. Cost: time and memory O(P S²) for P entries of
    W and S state leaves, plus the O(n k) of ∂ĥ/∂h. Works under ``jit``, ``vmap``,
    ``scan``.

    Args:
      cell: step function as a ``PreactivationCell``.
      loss: ``loss(params, h, y) -> scalar`` at the new state.

    Returns:
      An ``Estimator``. Its influence is B, ``[S, a, n, k]``; it needs no noise.

    Raises:
      ValueError: ``cell`` is no ``PreactivationCell``.

    Example:
      >>> cell = PreactivationCell(
      ...     kernel=lambda W: W[None],
      ...     features=lambda x, h: jnp.concatenate([h, x]),
      ...     activate=lambda z, h: jnp.tanh(z[0]),
      ... )
      >>> est = snap1(cell, loss=lambda W, h, y: jnp.sum((h - y) ** 2))
      >>> W = jnp.full((2, 3), 0.5)
      >>> carry = est.init(W, jnp.zeros(2))
      >>> carry, out = est.step(W, carry, jnp.ones(1), jnp.zeros(2), ())
      >>> out.grads.shape, carry.influence.shape
      ((2, 3), (1, 1, 2, 3))

    References:
      Menick et al., "A Practical Sparse Approximation for Real Time Recurrent
      Learning", https://arxiv.org/abs/2006.07232.
    """

    def self_jacobian(params, x, h, inside):
        leaves, treedef = jax.tree.flatten(h)

        def features(stacked):
            return cell.features(x, treedef.unflatten(list(stacked)))

        across = jax.jacfwd(features)(jnp.stack(leaves))  # [k, S, n]
        to_gates = jnp.einsum("aik,ksi->asi", cell.kernel(params), across)
        return inside.local + jnp.einsum("tia,asi->tsi", inside.gates, to_gates)

    return local_influence(cell, loss, self_jacobian)


SelfJacobian = Callable[[PyTree, PyTree, PyTree, UnitJacobians], jax.Array]
"""``(params, x, h, inside) -> [S, S, n]``, new state first."""


def local_influence(
    cell: PreactivationCell, loss: LossFn, self_jacobian: SelfJacobian
) -> Estimator:
    """An estimator whose influence stays within the units, B ← (self) B + D ⊗ ĥ."""
    check_cell(cell)

    def init(params, h0):
        h0 = jax.tree.map(jnp.asarray, h0)
        kernel = cell.kernel(params)
        shape = (len(jax.tree.leaves(h0)), *kernel.shape)
        return Carry(h0, jnp.zeros(shape, kernel.dtype))

    def step(params, carry, x, y, noise):
        del noise
        here = observe(cell, loss, params, carry.h, x, y)
        inside = unit_jacobians(cell, params, x, carry.h)
        own = self_jacobian(params, x, carry.h, inside)
        influence = jnp.einsum("tsi,saik->taik", own, carry.influence) + jnp.einsum(
            "tia,k->taik", inside.gates, inside.features
        )
        delta = jnp.stack(jax.tree.leaves(here.delta))
        _, to_params = jax.vjp(lambda p: cell.kernel(merge(p, params)), here.params)
        (total,) = to_params(jnp.einsum("ti,taik->aik", delta, influence))
        out = OnlineOutput(here.loss, optax.tree.add(here.direct, total))
        return Carry(here.h_next, influence), out

    return Estimator(init, no_noise, step)
