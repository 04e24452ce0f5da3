"""NoBackTrack with the light Kalman-like filter."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from rbpjax.online.estimator import (
    Carry,
    Estimator,
    LossFn,
    OnlineOutput,
    floats,
    observe,
)
from rbpjax.online.metric import (
    QuasiDiagonalState,
    Rows,
    apply_inverse,
    check_filter,
    empty,
    learn,
    newest_share,
)
from rbpjax.online.nobacktrack import Norms, reduce_units
from rbpjax.online.noise import state_signs
from rbpjax.online.rank_one import RankOne
from rbpjax.types import PyTree, StepFn


class Metric(NamedTuple):
    """The running metrics of both spaces.

    Attributes:
      params: the quasi-diagonal metric of the gradients.
      state: running mean of δ², like the state.
    """

    params: QuasiDiagonalState
    state: PyTree


def kalman_nobacktrack(
    f: StepFn,
    loss: LossFn,
    *,
    decay: float,
    rows: Rows | None = None,
    damping: float = 1e-4,
    include_current: bool = True,
) -> Estimator:
    """Streams natural-gradient directions: NoBackTrack in a learned metric.

    The estimate of ``nobacktrack``, with two changes. Its scales minimize the variance
    in a metric of the problem, not in the Euclidean one: parameters are measured by
    ‖w‖² = wᵀM⁻¹w, states by ‖v‖² = Σᵢ vᵢ² (1 + sᵢ / mean s), where M is the
    quasi-diagonal metric of ``scale_by_quasi_diagonal`` and s a running mean of δ²,
    both of the past. And ``grads`` is M⁻¹ times the gradient: with the decay as
    step size, a light Kalman filter for the parameters.

    The gradient inside is unbiased at fixed parameters, as ``nobacktrack``'s. The
    direction is not an unbiased estimate of M⁻¹ times the true gradient, because M
    depends on the noise of the past and, by default, of the present.

    A reconstruction: the structure follows the paper, but the listing of its filter
    was not available to us; the norm of the state is our choice, as is the 1 in it,
    which keeps units that the loss does not see at present from being scaled up.

    Cost: as ``nobacktrack`` without ``row_norms``, O(n P) time, plus O(P) for each
    metric; memory four parameter trees. Works under ``jit``, ``vmap`` and ``scan``.

    Args:
      f: step function ``f(params, x, h) -> h``; any pytrees.
      loss: ``loss(params, h, y) -> scalar`` at the new state.
      decay: γ in (0, 1], the forgetting of both metrics.
      rows: arrangement of the parameters by units; see ``scale_by_quasi_diagonal``.
      damping: added to the diagonal of M.
      include_current: whether the M that is applied contains the present gradient.

    Returns:
      An ``Estimator``. Its influence is ``RankOne(v, w)``, its metric ``Metric``.

    Raises:
      ValueError: options out of range, or ``rows`` does not use every number once.

    Example:
      >>> f = lambda W, x, h: jnp.tanh(W @ h + x)
      >>> est = kalman_nobacktrack(f, lambda W, h, y: jnp.sum((h - y) ** 2), decay=0.1)
      >>> W, x, y = 0.5 * jnp.eye(2), jnp.ones(2), jnp.zeros(2)
      >>> carry = est.init(W, jnp.zeros(2))
      >>> noise = est.noise(jax.random.key(0), carry)
      >>> carry, out = est.step(W, carry, x, y, noise)
      >>> W = W - 0.1 * out.grads

    References:
      Ollivier, Tallec, Charpiat, "Training recurrent networks online without
      backtracking", https://arxiv.org/abs/1507.07680, section on the Kalman variant.
      Ollivier, "Online Natural Gradient as a Kalman Filter",
      https://arxiv.org/abs/1703.00209.
    """
    check_filter(decay, damping)

    def init(params, h0):
        zeros = optax.tree.zeros_like
        h0, p = jax.tree.map(jnp.asarray, h0), floats(params)
        pair = RankOne(zeros(floats(h0)), zeros(p))
        return Carry(h0, pair, Metric(empty(rows, p), zeros(floats(h0))))

    def step(params, carry, x, y, noise):
        learnt, seen = carry.metric
        here = observe(f, loss, params, carry.h, x, y)

        mean = jnp.mean(ravel_pytree(seen)[0])
        units = jax.tree.map(
            lambda s: jnp.sqrt(1 + s / jnp.where(mean > 0, mean, 1)), seen
        )

        def params_norm(w):
            solved = apply_inverse(rows, learnt.metric, w, damping)
            return jnp.sqrt(optax.tree.vdot(w, solved))

        norms = Norms(
            lambda v: optax.tree.norm(optax.tree.mul(v, units)), params_norm, units
        )
        influence, grads = reduce_units(here, carry.influence, noise, norms, None)

        new = learn(decay, rows, learnt, grads)
        used = new if include_current else learnt
        direction = apply_inverse(rows, used.metric, grads, damping)
        gamma = newest_share(decay, learnt.count)
        seen = jax.tree.map(
            lambda s, d: s + gamma.astype(s.dtype) * (d**2 - s), seen, here.delta
        )
        carry = Carry(here.h_next, influence, Metric(new, seen))
        return carry, OnlineOutput(here.loss, direction)

    return Estimator(init, state_signs, step)
