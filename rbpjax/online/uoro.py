"""UORO: unbiased online recurrent optimization."""

from __future__ import annotations

from rbpjax._core.tree import axpy, scale
from rbpjax.online.balance import Factors, balance
from rbpjax.online.estimator import (
    Carry,
    Estimator,
    LossFn,
    OnlineOutput,
    checked,
    observe,
)
from rbpjax.online.rank_one import (
    RankOne,
    push,
    state_signs,
    zero_pair,
)
from rbpjax.types import PyTree, StepFn


def uoro(f: StepFn, loss: LossFn) -> Estimator:
    """Streams gradients with a rank-one estimate of the influence.

    The pair (v, w) with E v wᵀ = G = ∂h/∂θ is carried forward. The gradient of the
    present loss is

        ∂loss/∂θ + δ F + (δ · J v) w,

    whose first two terms are exact. With signs ν the pair then becomes

        v ← ρ₀ J v + ρ₁ ν,    w ← w / ρ₀ + (νᵀF) / ρ₁,
        ρ₀ = √(‖w‖ / ‖J v‖),  ρ₁ = √(‖νᵀF‖ / ‖ν‖).

    Unbiased at fixed parameters, at every step; estimates at different steps share
    noise. While the parameters change, a bias proportional to the step size appears,
    as it does in RTRL. Where J does not contract, the variance grows with time.

    Departs from the authors' code in two points:

    1. J v is an exact JVP, not a finite difference, which would be biased (badly so
       in float32).
    2. No ε is added to the norms of a scale: it is relative to the other norms of the
       step where one of them vanishes. In any units of parameters, state and loss the
       estimate is the same, scaled.

    Cost: one step, one JVP, two VJPs in the parameters, some passes over the
    parameters; memory one state and one parameter tree, whatever the length of the
    run. Works under ``jit``, ``vmap`` and ``scan``. A run can be differentiated in
    forward and reverse mode; reverse mode stores its history.

    Args:
      f: step function ``f(params, x, h) -> h``; any pytrees.
      loss: ``loss(params, h, y) -> scalar`` at the new state. It may share ``params``
        with ``f``; its direct gradient is included.

    Returns:
      An ``Estimator``. Its influence is ``RankOne(v, w)``, v like ``h0``, w like
      ``params``; its noise is a pytree of signs like ``h0``.

    Raises:
      ValueError: from ``init`` and ``step``; see ``Estimator``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> f = lambda params, x, h: jnp.tanh(params["W"] @ h + x)
      >>> loss = lambda params, h, y: jnp.sum((h - y) ** 2)
      >>> params, xs, ys = {"W": 0.5 * jnp.eye(2)}, jnp.ones((9, 2)), jnp.zeros((9, 2))
      >>> est = online.uoro(f, loss)
      >>> carry = est.init(params, jnp.zeros(2))
      >>> keys = jax.random.split(jax.random.key(0), 9)
      >>> noise = jax.vmap(est.noise, (0, None))(keys, carry)
      >>> carry, out = jax.lax.scan(
      ...     lambda carry, xyn: est.step(params, carry, *xyn), carry, (xs, ys, noise)
      ... )
      >>> out.loss.shape, out.grads["W"].shape
      ((9,), (9, 2, 2))

    References:
      Tallec, Ollivier, "Unbiased Online Recurrent Optimization",
      https://arxiv.org/abs/1702.05043, Algorithm 1; the placement of the exact last
      step and of ρ follows the authors' code.
    """

    def step(
        params: PyTree, carry: Carry, x: PyTree, y: PyTree, noise: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        here = observe(f, loss, params, carry.h, x, y)
        jv, vjp, grads = push(here, carry.influence)

        w, nu_f = carry.influence.w, vjp(noise)
        # One scale for each outer product: w may not be scaled leaf by leaf. That ρ₁
        # sees the present signs does no harm, since it is even in them.
        rho0, rho1 = balance(Factors((jv, noise)), Factors((w, nu_f))).vectors
        influence = RankOne(
            axpy(rho0, jv, scale(rho1, noise)),
            axpy(1 / rho0, w, scale(1 / rho1, nu_f)),
        )
        return Carry(here.h_next, influence), OnlineOutput(here.loss, grads)

    return checked(zero_pair, state_signs, step)
