"""NoBackTrack with the light Kalman-like filter."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from rbpjax._core.step import floats
from rbpjax.online.estimator import (
    Carry,
    Estimator,
    LossFn,
    OnlineOutput,
    checked,
    observe,
    parts,
)
from rbpjax.online.metric import (
    QuasiDiagonalState,
    Rows,
    all_finite,
    apply_inverse,
    check_filter,
    check_rows,
    empty,
    learn,
    newest_share,
    whitening,
)
from rbpjax.online.nobacktrack import Measure, owned_norms, reduce_units
from rbpjax.online.rank_one import state_signs, zero_pair
from rbpjax.types import PyTree, StepFn


class Metric(NamedTuple):
    """The running metrics of both spaces.

    Attributes:
      params: the quasi-diagonal metric of the gradients.
      state: running mean of δ², like the floating-point leaves of the state.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> f, loss = lambda a, x, h: a * h + x, lambda a, h, y: jnp.sum(h)
      >>> est = online.kalman_nobacktrack(f, loss, decay=0.1)
      >>> metric = est.init(jnp.array(0.5), jnp.zeros(3)).metric
      >>> int(metric.params.count), metric.state.shape
      (0, (3,))
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
    own_rows: bool = False,
    prior: float | None = None,
) -> Estimator:
    """Streams natural-gradient directions: NoBackTrack in a learned metric.

    The estimate of ``nobacktrack``, with two changes. Its scales minimize the variance
    in a metric of the problem, not in the Euclidean one: parameters are measured by
    ‖w‖² = wᵀM⁻¹w, states by ‖v‖² = Σᵢ vᵢ² (1 + sᵢ / mean s), where M is the
    quasi-diagonal metric of ``scale_by_quasi_diagonal`` and s a running mean of δ²,
    both of the past. And ``grads`` is M⁻¹ times the gradient: with a ``prior`` and the
    decay as step size, a light Kalman filter for the parameters. Without a prior the
    first steps of that filter are of size 1 / |gradient|, which spoils the network;
    take a step size of your own there. A filter forgets after 1 / decay steps: keep
    that above the number of parameters of a unit, better of all.

    A gradient that is not finite, or whose square is not, is not learnt: it is lost,
    with the direction of its step, and nothing else.

    The gradient inside is unbiased at fixed parameters, as ``nobacktrack``'s. The
    direction is not an unbiased estimate of M⁻¹ times the true gradient, because M
    depends on the noise of the past and, by default, of the present.

    A reconstruction, which departs from the paper in two points:

    1. The structure follows the paper, but the listing of its filter was not available
       to us.
    2. The norm of the state is our choice, as is the 1 in it, which keeps units that
       the loss does not see at present from being scaled up.

    Cost: as ``nobacktrack`` without ``row_norms``, O(n P) time, with ``own_rows`` as
    ``nobacktrack`` with ``rows``, O(n² + P), plus O(P) for each metric; memory four
    parameter trees, whatever the length of the run. Works under ``jit``, ``vmap`` and
    ``scan``. A run can be differentiated in forward and reverse mode; reverse mode
    stores its history.

    Args:
      f: step function ``f(params, x, h) -> h``; any pytrees.
      loss: ``loss(params, h, y) -> scalar`` at the new state.
      decay: γ in (0, 1], the forgetting of both metrics.
      rows: arrangement of the parameters by units; see ``scale_by_quasi_diagonal``.
      damping: positive, added to the diagonal of M.
      include_current: whether the M that is applied contains the present gradient.
      own_rows: whether units own their parameters, those of the rows of ``rows`` as in
        ``nobacktrack``: all norms by one product then. Where it does not hold it costs
        variance, never bias.
      prior: positive, or None; see ``scale_by_quasi_diagonal``.

    Returns:
      An ``Estimator``. Its influence is ``RankOne(v, w)``, v like ``h0``, w like
      ``params``, its metric ``Metric``; its noise is a pytree of signs like ``h0``.

    Raises:
      ValueError: an option is out of range, or ``own_rows`` without ``rows``; from
        ``init``, if ``rows`` does not use every number once; from ``step``, if it has
        no matrix for a leaf of the state; from both as in ``Estimator``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> f, loss = lambda W, x, h: jnp.tanh(W @ h + x), lambda W, h, y: jnp.sum(h**2)
      >>> est = online.kalman_nobacktrack(
      ...     f, loss, decay=0.1, rows=lambda W: W, own_rows=True, prior=1.0
      ... )
      >>> W, x, y = 0.5 * jnp.eye(2), jnp.ones(2), jnp.zeros(2)
      >>> carry = est.init(W, jnp.zeros(2))
      >>> noise = est.noise(jax.random.key(0), carry)
      >>> carry, out = est.step(W, carry, x, y, noise)
      >>> W = W - 0.1 * out.grads
      >>> W.shape, int(carry.metric.params.count)
      ((2, 2), 1)

    References:
      Ollivier, Tallec, Charpiat, "Training recurrent networks online without
      backtracking", https://arxiv.org/abs/1507.07680, section on the Kalman variant.
      Ollivier, "Online Natural Gradient as a Kalman Filter",
      https://arxiv.org/abs/1703.00209.
    """
    check_filter(decay, damping, prior)
    if own_rows and rows is None:
        raise ValueError(
            "`own_rows=True` says that unit i has row i of `rows(params)`, which is "
            "None; give `rows`, or leave `own_rows` out."
        )

    def init(params: PyTree, h0: PyTree) -> Carry:
        check_rows(rows, floats(params))
        return blank(params, h0)

    def blank(params: PyTree, h0: PyTree) -> Carry:
        carry = zero_pair(params, h0)
        unseen = optax.tree.zeros_like(parts(carry.h))
        return carry._replace(metric=Metric(empty(rows, floats(params), prior), unseen))

    def step(
        params: PyTree, carry: Carry, x: PyTree, y: PyTree, noise: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        learnt, seen = carry.metric
        here = observe(f, loss, params, carry.h, x, y)

        mean = jnp.mean(ravel_pytree(seen)[0])
        units = jax.tree.map(
            lambda s: jnp.sqrt(1 + s / jnp.where(mean > 0, mean, 1)), seen
        )

        white = whitening(rows, learnt.metric, damping)
        measure = Measure(lambda v: optax.tree.mul(v, units), white, units)
        norms = owned_norms(here.h, white) if own_rows else None
        influence, grads = reduce_units(here, carry.influence, noise, measure, norms)

        new = learn(decay, rows, learnt, grads, prior)
        used = new if include_current else learnt
        direction = apply_inverse(rows, used.metric, grads, damping)
        gamma = newest_share(decay, learnt.count)
        squares = jax.tree.map(jnp.square, here.delta)
        known = all_finite(squares)
        seen = jax.tree.map(
            lambda s, d: jnp.where(known, s + gamma.astype(s.dtype) * (d - s), s),
            seen,
            squares,
        )
        carry = Carry(here.h_next, influence, Metric(new, seen))
        return carry, OnlineOutput(here.loss, direction)

    return checked(init, state_signs, step, blank)
