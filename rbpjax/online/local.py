"""SnAp-1, RFLO and e-prop: the influence kept within the units."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

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
    check_shapes,
    checked,
    no_noise,
    observe,
    start,
)
from rbpjax.types import PyTree

SelfJacobian = Callable[[PyTree, PyTree, PyTree, UnitJacobians], jax.Array]
"""``(params, x, h, inside) -> [S, S, n]``, new state first."""


def snap1(cell: PreactivationCell, loss: LossFn) -> Estimator:
    """Streams gradients with the sparse one-step approximation of the influence.

    Each entry of W reaches one unit within one step. RTRL's recursion is carried for
    this unit only, all other entries of G are dropped:

        B ← diag(J) B + D ⊗ ĥ,    gradient = ∂loss/∂θ + δ B,

    where diag(J) is the part of J from each unit to itself (a small block if the
    state has several leaves).

    Truncated (biased): influence through other units is lost. Exact where each unit
    feeds back on itself only. No noise. Cost: time and memory O(P S²) for P entries of
    W and S state leaves, plus the O(n k) of ∂ĥ/∂h, whatever the length of the run.
    Works under ``jit``, ``vmap`` and ``scan``. A run can be differentiated in forward
    and reverse mode; reverse mode stores its history.

    Args:
      cell: step function as a ``PreactivationCell``.
      loss: ``loss(params, h, y) -> scalar`` at the new state.

    Returns:
      An ``Estimator``. Its influence is B, ``[S, a, n, k]``; it needs no noise.

    Raises:
      ValueError: ``cell`` is no ``PreactivationCell``; from ``init`` and ``step`` as
        in ``Estimator``.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> cell = online.PreactivationCell(
      ...     kernel=lambda W: W[None],
      ...     features=lambda x, h: jnp.concatenate([h, x]),
      ...     activate=lambda z, h: jnp.tanh(z[0]),
      ... )
      >>> est = online.snap1(cell, lambda W, h, y: jnp.sum((h - y) ** 2))
      >>> W = jnp.full((2, 3), 0.5)
      >>> carry = est.init(W, jnp.zeros(2))
      >>> carry, out = est.step(W, carry, jnp.ones(1), jnp.zeros(2), ())
      >>> out.grads.shape, carry.influence.shape
      ((2, 3), (1, 1, 2, 3))

    References:
      Menick et al., "A Practical Sparse Approximation for Real Time Recurrent
      Learning", https://arxiv.org/abs/2006.07232.
    """

    def self_jacobian(
        params: PyTree, x: PyTree, h: PyTree, inside: UnitJacobians
    ) -> jax.Array:
        leaves, treedef = jax.tree.flatten(h)

        def features(stacked: jax.Array) -> jax.Array:
            rows = zip(stacked, leaves, strict=True)
            parts = [row.astype(leaf.dtype) for row, leaf in rows]
            return cell.features(x, treedef.unflatten(parts))

        across = jax.jacfwd(features)(jnp.stack(leaves))  # [k, S, n]
        to_gates = jnp.einsum("aik,ksi->asi", cell.kernel(params), across)
        return inside.local + jnp.einsum("tia,asi->tsi", inside.gates, to_gates)

    return local_influence(cell, loss, self_jacobian)


def rflo(
    cell: PreactivationCell,
    loss: LossFn,
    *,
    feedback: Callable[[PyTree, PyTree, PyTree], PyTree] | None = None,
) -> Estimator:
    """Streams gradients with an eligibility trace in each unit: RFLO and e-prop.

    All influence through the recurrent matrix is dropped; what remains is the memory
    inside the units, such as the leak or the forget gate:

        B ← (∂h'/∂h at fixed z) B + D ⊗ ĥ,    gradient = ∂loss/∂θ + δ B.

    For the leaky cell h' = (1-α) h + α φ(W ĥ) this is RFLO, whose trace is
    B ← (1-α) B + α φ' ĥᵀ. For spiking units, such as ``cells.lif``, it is e-prop: B are
    its eligibility vectors, one a leaf of the state, with the surrogate derivative of
    a spike, and δ B sums what its learning signals multiply.

    With ``feedback`` the learning signal takes the place of δ = ∂loss/∂h in δ B, as
    where fixed random weights carry the error back to the units. Without it, feedback
    is symmetric, in the words of both papers.

    Truncated (biased): it is the gradient of an unrolled run that is stopped where the
    state enters the pre-activations. Exact where W has no recurrent part and there is
    no ``feedback``. No noise. Cost: time and memory O(P S²) for P entries of W and S
    state leaves, without any product with W, whatever the length of the run. Works
    under ``jit``, ``vmap`` and ``scan``. A run can be differentiated in forward and
    reverse mode; reverse mode stores its history.

    Args:
      cell: step function as a ``PreactivationCell``.
      loss: ``loss(params, h, y) -> scalar`` at the new state.
      feedback: ``feedback(params, h, y)``, the learning signal, a pytree like the
        state. For a readout C h with a squared error and fixed random weights R, ``[n,
        outputs]``, it is ``2 * R @ (params["C"] @ h - y)``.

    Returns:
      An ``Estimator``. Its influence is B, ``[S, a, n, k]``; it needs no noise.

    Raises:
      ValueError: ``cell`` is no ``PreactivationCell``; from ``step``, if ``feedback``
        returns no pytree like the state; from ``init`` and ``step`` as in
        ``Estimator``.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> cell = online.PreactivationCell(
      ...     kernel=lambda W: W[None],
      ...     features=lambda x, h: jnp.concatenate([h, x]),
      ...     activate=lambda z, h: 0.9 * h + 0.1 * jnp.tanh(z[0]),
      ... )
      >>> est = online.rflo(cell, lambda W, h, y: jnp.sum((h - y) ** 2))
      >>> W = jnp.full((2, 3), 0.5)
      >>> carry = est.init(W, jnp.zeros(2))
      >>> carry, out = est.step(W, carry, jnp.ones(1), jnp.zeros(2), ())
      >>> out.grads.shape
      (2, 3)

    References:
      Murray, "Local online learning in recurrent networks with random feedback",
      eLife 8, 2019, https://elifesciences.org/articles/43299. Bellec et al., "A
      solution to the learning dilemma for recurrent networks of spiking neurons",
      Nature Communications 11, 2020,
      https://www.nature.com/articles/s41467-020-17236-y, equation 1.
    """

    def self_jacobian(
        params: PyTree, x: PyTree, h: PyTree, inside: UnitJacobians
    ) -> jax.Array:
        del params, x, h
        return inside.local

    return local_influence(cell, loss, self_jacobian, feedback)


def local_influence(
    cell: PreactivationCell,
    loss: LossFn,
    self_jacobian: SelfJacobian,
    feedback: Callable[[PyTree, PyTree, PyTree], PyTree] | None = None,
) -> Estimator:
    """An estimator whose influence stays within the units, B ← (self) B + D ⊗ ĥ."""
    check_cell(cell)

    def init(params: PyTree, h0: PyTree) -> Carry:
        h0 = start(params, h0)
        check_real(h0, "h0")
        kernel = cell.kernel(params)
        shape = (len(jax.tree.leaves(h0)), *kernel.shape)
        return Carry(h0, jnp.zeros(shape, kernel.dtype))

    def step(
        params: PyTree, carry: Carry, x: PyTree, y: PyTree, noise: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        del noise
        here = observe(cell, loss, params, carry.h, x, y)
        dtype = carry.influence.dtype
        cast = lambda j: j.astype(dtype)
        inside = jax.tree.map(cast, unit_jacobians(cell, params, x, carry.h))
        own = self_jacobian(params, x, carry.h, inside)
        influence = jnp.einsum(
            "tsi,saik->taik", cast(own), carry.influence
        ) + jnp.einsum("tia,k->taik", inside.gates, inside.features)
        signal = here.delta
        if feedback is not None:
            signal = feedback(params, here.h_next, y)
            remedy = "It returns a learning signal for each unit."
            check_shapes(signal, here.delta, "`feedback`'s output", "the state", remedy)
        delta = jnp.stack([cast(s) for s in jax.tree.leaves(signal)])
        kernel_grad = jnp.einsum("ti,taik->aik", delta, influence)
        total = kernel_to_params(cell, params, kernel_grad)
        out = OnlineOutput(here.loss, optax.tree.add(here.direct, total))
        return Carry(here.h_next, influence), out

    return checked(init, no_noise, step)
