"""OK-RTRL: the influence as a sum of Kronecker products, of least variance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from rbpjax._core.tree import widen
from rbpjax.online.cell import (
    PreactivationCell,
    check_cell,
    kernel_to_params,
    unit_jacobians,
)
from rbpjax.online.estimator import (
    Carry,
    Estimator,
    LossFn,
    OnlineOutput,
    check_count,
    check_real,
    checked,
    observe,
    start,
)
from rbpjax.online.kf_rtrl import Kronecker, immediate, pushed
from rbpjax.types import PyTree


def ok_rtrl(cell: PreactivationCell, loss: LossFn, *, rank: int = 1) -> Estimator:
    """Streams gradients with the optimal Kronecker-sum estimate of the influence.

    As in ``kf_rtrl`` F = D ⊗ ĥ with D = ∂h'/∂z, and with r products E Σᵢ Aᵢ ⊗ uᵢ = G.
    After a step there is one product more,

        Σᵢ J Aᵢ ⊗ uᵢ + D ⊗ ĥ,

    and of the unbiased estimates with r products the one of least variance is drawn.
    In the singular vectors of this sum, a matrix of rank r + 1 from k to S n a n
    numbers with singular values σ, the m largest are kept as they are. The rest,
    q = r - m + 1 values with the sum s, become q - 1 products,

        (s / (q - 1)) (ε ∘ Z) (ε ∘ Z)ᵀ,    Z Zᵀ = I - z zᵀ,    zᵢ² = 1 - (q - 1) σᵢ / s,

    with q signs ε. Their mean is diag(σ); m is the smallest for which no zᵢ² is
    negative. The gradient is ∂loss/∂θ + δD ⊗ ĥ + Σᵢ δJAᵢ ⊗ uᵢ, whose first two terms
    are exact.

    Unbiased at fixed parameters, at every step, and exact for the first r steps. From
    the same past the influence has the least variance of all its entries together,
    below that of ``kf_rtrl``; that of one gradient may be larger.

    Cost: r times that of ``kf_rtrl``, O(r n) JVPs, time O(r n³), and O(r² n²) for one
    QR and SVD of r + 1 columns; memory O(r n²), whatever the length of the run. Works
    under ``jit``, ``vmap`` and ``scan``. A run should not be differentiated: where
    singular values meet, or vanish as at the start, the SVD has no derivative.

    Args:
      cell: step function as a ``PreactivationCell``. Only ``cell.kernel`` sees
        the parameters, so no influence is lost.
      loss: ``loss(params, h, y) -> scalar`` at the new state.
      rank: r, the number of products, below the number k of features.

    Returns:
      An ``Estimator``. Its influence is ``Kronecker(u, a)`` with a leading axis of
      ``rank``; its noise ``rank`` + 1 signs.

    Raises:
      ValueError: ``cell`` is no ``PreactivationCell``, ``rank`` no positive int; from
        ``init`` if it is not below the number of features; from ``init`` and ``step``
        as in ``Estimator``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> cell = online.cells.vanilla(units=2, input_size=1).cell
      >>> est = online.ok_rtrl(cell, lambda p, h, y: jnp.sum((h - y) ** 2), rank=2)
      >>> params = {"W": jnp.eye(2), "U": jnp.ones((2, 1)), "b": jnp.zeros(2)}
      >>> carry = est.init(params, jnp.zeros(2))
      >>> noise = est.noise(jax.random.key(0), carry)
      >>> carry, out = est.step(params, carry, jnp.ones(1), jnp.zeros(2), noise)
      >>> carry.influence.u.shape, carry.influence.a.shape
      ((2, 4), (2, 1, 2, 1, 2))

    References:
      Benzing, Gauy, Mujika, Martinsson, Steger, "Optimal Kronecker-Sum Approximation of
      Real Time Recurrent Learning", https://arxiv.org/abs/1902.03993.
    """
    check_cell(cell)
    check_count("rank", rank)

    def init(params: PyTree, h0: PyTree) -> Carry:
        h0 = start(params, h0)
        check_real(h0, "h0")
        kernel = cell.kernel(params)
        gates, units, size = jnp.shape(kernel)
        if rank >= size:
            raise ValueError(
                f"`rank` = {rank} must be below the number of features, {size}: as "
                "many products are the whole influence. Take rtrl for that."
            )
        leaves = len(jax.tree.leaves(h0))
        zeros = lambda *shape: jnp.zeros((rank, *shape), kernel.dtype)
        return Carry(h0, Kronecker(zeros(size), zeros(leaves, units, gates, units)))

    def noise(key: jax.Array, carry: Carry) -> jax.Array:
        return jax.random.rademacher(key, (rank + 1,), carry.influence.u.dtype)

    def step(
        params: PyTree, carry: Carry, x: PyTree, y: PyTree, noise: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        u, a = carry.influence
        here = observe(cell, loss, params, carry.h, x, y)
        inside = jax.tree.map(
            lambda j: j.astype(a.dtype), unit_jacobians(cell, params, x, carry.h)
        )
        ja = jax.vmap(lambda one: pushed(cell, params, x, carry.h, one))(a)

        delta = jnp.stack(jax.tree.leaves(here.delta)).astype(a.dtype)
        kernel_grad = jnp.einsum("si,rsiaj,rk->ajk", delta, ja, u) + jnp.einsum(
            "si,sia,k->aik", delta, inside.gates, inside.features
        )
        past_and_last = kernel_to_params(cell, params, kernel_grad)
        grads = optax.tree.add(here.direct, past_and_last)

        us = jnp.concatenate([u, inside.features[None]])
        as_ = jnp.concatenate([ja, immediate(inside, a[0])[None]])
        left, right = reduce_sum(us, as_.reshape(rank + 1, -1), noise)
        influence = Kronecker(left, right.reshape(a.shape))
        return Carry(here.h_next, influence), OnlineOutput(here.loss, grads)

    return checked(init, noise, step)


def reduce_sum(
    us: jax.Array, ws: jax.Array, signs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Σᵢ uᵢ wᵢᵀ of r + 1 products as r random ones with the same mean, optimally.

    The factors are rows. Exact in the directions that are kept; a sum that is zero
    stays zero.
    """
    dtype = us.dtype
    rank = len(us) - 1
    # In float32 at least: there is no SVD in half precision.
    q_left, r_left = jnp.linalg.qr(widen(us).T)
    q_right, r_right = jnp.linalg.qr(widen(ws).T)
    left, sigma, right = jnp.linalg.svd(r_left @ r_right.T, full_matrices=False)
    # Values that are zero but for rounding: their roots would be far above it.
    floor = 4 * sigma.size * float(jnp.finfo(sigma.dtype).eps) * sigma[0]
    sigma = jnp.where(sigma > floor, sigma, 0)
    if sigma.size <= rank:  # fewer numbers than products: nothing to reduce
        short = rank - sigma.size
        root = jnp.pad(jnp.diag(jnp.sqrt(sigma)), ((0, 0), (0, short)))
        mixed = root
    else:
        mixed = signs.astype(sigma.dtype)[:, None] * _mixture(sigma)
    new_left = (q_left @ (left @ mixed)).T
    new_right = (q_right @ (right.T @ mixed)).T
    return new_left.astype(dtype), new_right.astype(dtype)


def _mixture(sigma: jax.Array) -> jax.Array:
    """B, ``[r + 1, r]``, with the diagonal of B Bᵀ equal to ``sigma``."""
    rank = sigma.size - 1
    tails = jnp.cumsum(sigma[::-1])[::-1]  # of σᵢ and all behind it
    behind = rank - jnp.arange(rank)  # products for the values from the i-th on
    fits = sigma[:-1] * behind.astype(sigma.dtype) <= tails[:-1]
    m = jnp.argmax(fits)  # the first; the last always fits, but for rounding
    m = jnp.where(jnp.any(fits), m, rank - 1)

    mixed, total = jnp.arange(rank + 1) >= m, tails[m]
    left = total - (rank - m).astype(sigma.dtype) * sigma  # exactly 0 for one value
    left = jnp.maximum(left, 0) / jnp.where(total > 0, total, 1)
    square = jnp.where(mixed, left, 0)
    last = jnp.arange(rank + 1) == rank
    z = jnp.sqrt(jnp.where(total > 0, square, last.astype(sigma.dtype)))
    z = z / jnp.linalg.norm(z)
    # A reflection that takes the last unit vector to -z: its other columns are
    # orthonormal, and orthogonal to z. No cancellation: no entry of z is negative.
    w = z + last.astype(z.dtype)
    across = jnp.eye(rank + 1, dtype=z.dtype) - jnp.outer(w, w) * (2 / jnp.sum(w * w))
    kept = jnp.arange(rank) < m
    even = total / jnp.maximum(rank - m, 1).astype(sigma.dtype)
    return across[:, :-1] * jnp.sqrt(jnp.where(kept, sigma[:-1], even))[None]
