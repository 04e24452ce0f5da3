"""UORO: unbiased online recurrent optimization."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from rbpjax.online.estimator import (
    Carry,
    Estimator,
    LossFn,
    OnlineOutput,
    floats,
    observe,
)
from rbpjax.online.noise import state_signs
from rbpjax.online.rank_one import RankOne, axpy, balance
from rbpjax.types import StepFn


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

    Departs from the authors' code in one point: J v is an exact JVP, not a finite
    difference, which would be biased (badly so in float32).

    Cost: one step, one JVP, two VJPs in the parameters; memory one state and one
    parameter tree, whatever the length of the run. Works under ``jit``, ``vmap`` and
    ``scan``. Differentiating through it is possible but stores the history.

    Args:
      f: step function ``f(params, x, h) -> h``; any pytrees.
      loss: ``loss(params, h, y) -> scalar`` at the new state. It may share ``params``
        with ``f``; its direct gradient is included.

    Returns:
      An ``Estimator``. Its influence is ``RankOne(v, w)``, v like ``h0``, w like
      ``params``; its noise is a pytree of signs like ``h0``.

    Raises:
      ValueError: from ``step``, if ``f`` does not return its state's shapes and
        dtypes, or ``loss`` no scalar.

    Example:
      >>> f = lambda params, x, h: jnp.tanh(params["W"] @ h + x)
      >>> loss = lambda params, h, y: jnp.sum((h - y) ** 2)
      >>> params, xs, ys = {"W": 0.5 * jnp.eye(2)}, jnp.ones((9, 2)), jnp.zeros((9, 2))
      >>> est = uoro(f, loss)
      >>> carry = est.init(params, jnp.zeros(2))
      >>> noise = jax.vmap(est.noise, (0, None))(jax.random.split(jax.random.key(0), 9),
      ...                                        carry)
      >>> carry, out = jax.lax.scan(lambda c, a: est.step(params, c, *a), carry,
      ...                           (xs, ys, noise))
      >>> out.loss.shape, out.grads["W"].shape
      ((9,), (9, 2, 2))

    References:
      Tallec, Ollivier, "Unbiased Online Recurrent Optimization",
      https://arxiv.org/abs/1702.05043; the placement of the exact last step and of ρ
      follows the authors' code.
    """

    def init(params, h0):
        zeros = optax.tree.zeros_like
        h0 = jax.tree.map(jnp.asarray, h0)
        return Carry(h0, RankOne(zeros(floats(h0)), zeros(floats(params))))

    def step(params, carry, x, y, noise):
        v, w = carry.influence
        here = observe(f, loss, params, carry.h, x, y)
        _, vjp = jax.vjp(lambda p: here.f(p, here.h), here.params)
        _, jv = jax.jvp(lambda s: here.f(here.params, s), (here.h,), (v,))

        (last,) = vjp(here.delta)
        past = optax.tree.vdot(here.delta, jv)  # δ J v without the VJP in h
        grads = axpy(past, w, optax.tree.add(here.direct, last))

        (nu_f,) = vjp(noise)
        # One scale for each outer product: w may not be scaled leaf by leaf. That ρ₁
        # sees the present signs does no harm, since it is even in them.
        rho0 = balance(optax.tree.norm(jv), optax.tree.norm(w))
        rho1 = balance(optax.tree.norm(noise), optax.tree.norm(nu_f))
        influence = RankOne(
            axpy(rho0, jv, optax.tree.scale(rho1, noise)),
            axpy(1 / rho0, w, optax.tree.scale(1 / rho1, nu_f)),
        )
        return Carry(here.h_next, influence), OnlineOutput(here.loss, grads)

    return Estimator(init, state_signs, step)
