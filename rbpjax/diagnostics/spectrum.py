"""The spectrum of J: spectral radius, norm, and singular values."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax._core.arnoldi import arnoldi
from rbpjax._core.step import close
from rbpjax.types import LinearMap, PyTree, StepFn


def spectral_radius(
    key: jax.Array,
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h: PyTree,
    *,
    num_steps: int = 200,
    basis: int = 30,
) -> jax.Array:
    """An estimate of ρ(J), J = ∂f/∂h at h: growth of ‖Jᵏv‖, and Ritz values.

    Neumann series and plain recurrent back-propagation converge if and only if
    ρ(J) < 1. The growth rate is right where a Rayleigh quotient fails: for a complex
    dominant pair, and for a pair ±ρ. It is the slope of log‖Jᵏv‖ over the second half
    of the steps, under weights that vanish at both ends: the dominant pair's rotation
    makes the logarithm oscillate, and the smooth window averages that out. It stays
    below ρ(J) by about 1/num_steps where many eigenvalues have nearly that modulus.
    There the largest Ritz value of an Arnoldi basis from the same v is closer, which is
    taken where it is larger, but by no more than that: of a J that is far from normal
    Ritz values may be far outside the spectrum.

    A random estimate; a non-normal J overestimates until its transient is over. A
    nilpotent J gives 0.

    Cost: ``num_steps`` + ``basis`` JVPs of f and one linearization; memory: ``basis`` +
    3 states and ``num_steps`` scalars.

    Args:
      key: PRNG key of the direction v.
      f: step function ``f(params, inputs, h) -> h``.
      params: pytree.
      inputs: pytree.
      h: the state at which J is taken, usually a fixed point.
      num_steps: number of products with J for the growth, at least 4.
      basis: number of products with J for the Ritz values, and of states to keep; 0 for
        the growth alone.

    Returns:
      A scalar.

    Raises:
      ValueError: if ``num_steps`` is below 4 or ``basis`` below 0, or f changes the
        state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.diagnostics import spectral_radius
      >>> w = 0.9 * jnp.array([[0.0, -1.0], [1.0, 0.0]])  # a rotation, times 0.9
      >>> f = lambda w, x, h: w @ h + x
      >>> key = jax.random.key(0)
      >>> round(float(spectral_radius(key, f, w, jnp.ones(2), jnp.zeros(2))), 3)
      0.9

    References:
      Gelfand's formula, ρ(J) = lim ‖Jᵏ‖^(1/k): Horn and Johnson, "Matrix Analysis", 2nd
      edition, corollary 5.6.14. Arnoldi: Golub and Van Loan, "Matrix Computations",
      4th edition, section 10.5.
    """
    if num_steps < 4:
        raise ValueError(f"`num_steps` must be at least 4; got {num_steps}.")
    if basis < 0:
        raise ValueError(f"`basis` must be at least 0; got {basis}.")
    _, jvp, h = linearized(f, params, inputs, h)
    with sharding.summed(jvp, h):
        v = tree.random_unit(key, h)
        return radius(jvp, v, growth(jvp, v, num_steps)[1], basis)


def jacobian_norm(
    key: jax.Array,
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h: PyTree,
    *,
    num_steps: int = 20,
) -> jax.Array:
    """An estimate of ‖J‖₂, the largest singular value of J = ∂f/∂h at h.

    ‖J‖ < 1 makes f a contraction near h, and bounds ρ(J) ≤ ‖J‖. Lanczos on JᵀJ from a
    random start: a lower bound that increases with ``num_steps`` and meets the value
    much sooner than the power method.

    Cost: ``num_steps`` JVPs and VJPs of f, one linearization; memory: four states.

    Args:
      key: PRNG key of the start.
      f: step function ``f(params, inputs, h) -> h``.
      params: pytree.
      inputs: pytree.
      h: the state at which J is taken.
      num_steps: number of Lanczos steps, at least 1.

    Returns:
      A scalar.

    Raises:
      ValueError: if ``num_steps`` is below 1, or f changes the state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.diagnostics import jacobian_norm
      >>> w = jnp.array([[0.0, 3.0], [0.0, 0.0]])  # ρ(J) = 0, ‖J‖ = 3
      >>> f = lambda w, x, h: w @ h + x
      >>> key = jax.random.key(0)
      >>> round(float(jacobian_norm(key, f, w, jnp.ones(2), jnp.zeros(2))), 3)
      3.0

    References:
      Golub and Van Loan, "Matrix Computations", 4th edition, section 10.1.
    """
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1; got {num_steps}.")
    _, jvp, h = linearized(f, params, inputs, h)
    with sharding.summed(jvp, h):
        return singular_range(jvp, tree.random_unit(key, h), num_steps)[0]


def linearized(
    f: StepFn, params: PyTree, inputs: PyTree, h: PyTree
) -> tuple[LinearMap, LinearMap, PyTree]:
    """The step h ↦ f(θ, x, h), the map v ↦ Jv at h, and h as arrays."""
    step, args, h = close(f, params, inputs, h)
    step = partial(step, args)
    return step, jax.linearize(step, h)[1], h


def growth(linear: LinearMap, v: PyTree, num_steps: int) -> tuple[PyTree, jax.Array]:
    """Where v points after ``num_steps`` applications, and the factors of its norm."""

    def grow(v: PyTree, _: None) -> tuple[PyTree, jax.Array]:
        return tree.to_unit(linear(v))

    return lax.scan(grow, v, length=num_steps)


def radius(linear: LinearMap, v: PyTree, factors: jax.Array, basis: int) -> jax.Array:
    """The growth rate of ``factors``, or a Ritz value a little above it."""
    rate = growth_rate(factors)
    numbers = (tree.entries(u) * (1 + jnp.iscomplexobj(u)) for u in jax.tree.leaves(v))
    size = min(basis, sum(numbers))
    if size == 0:
        return rate
    krylov = arnoldi(linear, v, size, jnp.zeros_like(rate))
    ritz = matrix_radius(krylov.hessenberg[:-1])
    return jnp.clip(ritz, rate, rate * (1 + SLACK / len(factors)))


SLACK = 4.0
"""By how many steps' share growth may fall short of the spectral radius."""


def matrix_radius(a: jax.Array) -> jax.Array:
    """The spectral radius of a small matrix, by squaring: ‖Aᴺ‖^(1/N), N = 2⁴⁰.

    A general eigenvalue solver there is none on every device.
    """

    def square(i: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple:
        a, log = now
        size = jnp.max(jnp.abs(a))
        a = a / jnp.where(size == 0, 1, size)
        weight = 0.5 ** i.astype(log.dtype)
        a = jnp.dot(a, a, precision=lax.Precision.HIGHEST)
        return a, log + weight * jnp.log(size)

    zero = 0 * jnp.sum(a)
    return jnp.exp(lax.fori_loop(0, 40, square, (a, zero))[1])


def growth_rate(factors: jax.Array) -> jax.Array:
    """The smoothed growth a step over the second half of the steps."""
    # The weighted least-squares slope of the cumulative logs equals an average of the
    # increments under another window, which vanishes at both ends as well.
    recent = jnp.log(factors[len(factors) // 2 :])
    window = jnp.hanning(len(recent) + 2)[1:-1].astype(recent.dtype)
    return jnp.exp(jnp.sum(recent * window) / jnp.sum(window))


def singular_range(
    apply: LinearMap, v: PyTree, num_steps: int
) -> tuple[jax.Array, jax.Array]:
    """The largest and the smallest singular value that ``num_steps`` of Lanczos see.

    Golub and Kahan's bidiagonalization, which is Lanczos on AᵀA without its squared
    condition number. Both values lie between the true extremes.
    """
    adjoint = tree.adjoint(apply, v)

    def step(now: _Lanczos, _: None) -> tuple[_Lanczos, tuple]:
        u, alpha = tree.to_unit(tree.axpy(-now.beta, now.u, apply(now.v)))
        v, beta = tree.to_unit(tree.axpy(-alpha, now.v, adjoint(u)))
        return _Lanczos(u, v, beta, now.live & (beta > 0)), (alpha, beta, now.live)

    zero = 0 * tree.norm(v)
    start = _Lanczos(tree.scale(0.0, v), v, zero, zero == 0)
    _, (alpha, beta, live) = lax.scan(step, start, length=num_steps)
    # After an exact breakdown (beta = 0) the space is exhausted: the rows that follow
    # are zero, and would be taken for a singular value. alpha[0] = ‖Av‖ is none of
    # the extremes.
    alpha = jnp.where(live, alpha, alpha[0])
    values = jnp.linalg.svd(jnp.diag(alpha) + jnp.diag(beta[:-1], 1), compute_uv=False)
    return values[0], values[-1]


class _Lanczos(NamedTuple):
    """Two vectors, the coefficient that joins them, and no breakdown yet."""

    u: PyTree
    v: PyTree
    beta: jax.Array
    live: jax.Array
