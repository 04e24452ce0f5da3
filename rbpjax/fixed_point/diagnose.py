"""Numbers that say whether, and how well, a fixed point can be differentiated."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax.fixed_point import tree
from rbpjax.fixed_point.backward import adjoint_defect
from rbpjax.fixed_point.solve import close
from rbpjax.types import LinearMap, PyTree, StepFn


def spectral_radius(
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h: PyTree,
    key: jax.Array,
    *,
    num_steps: int = 200,
) -> jax.Array:
    """An estimate of ρ(J), J = ∂f/∂h at h: the growth rate of ‖Jᵏv‖ for a random v.

    Neumann series and plain recurrent back-propagation converge if and only if
    ρ(J) < 1. The growth rate is right where a Rayleigh quotient fails: for a complex
    dominant pair, and for a pair ±ρ. It is the slope of log‖Jᵏv‖ over the second half
    of the steps, under weights that vanish at both ends: the dominant pair's rotation
    makes the logarithm oscillate, and the smooth window averages that out.

    A random estimate: eigenvalues closer in modulus than about 1/num_steps are not told
    apart, and a non-normal J overestimates until its transient is over. A nilpotent J
    gives 0.

    Cost: ``num_steps`` JVPs of f and one linearization; memory: two states and
    ``num_steps`` scalars.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      params: pytree.
      inputs: pytree.
      h: the state at which J is taken, usually a fixed point.
      key: PRNG key of the direction v.
      num_steps: number of products with J, at least 4.

    Returns:
      A scalar.

    Raises:
      ValueError: if ``num_steps`` is below 4, or f changes the state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> w = 0.9 * jnp.array([[0.0, -1.0], [1.0, 0.0]])  # a rotation, times 0.9
      >>> f = lambda w, x, h: w @ h + x
      >>> key = jax.random.key(0)
      >>> round(float(spectral_radius(f, w, jnp.ones(2), jnp.zeros(2), key)), 6)
      0.9
    """
    if num_steps < 4:
        raise ValueError(f"`num_steps` must be at least 4; got {num_steps}.")
    jvp, h = _jvp(f, params, inputs, h)

    def grow(v: PyTree, _: None) -> tuple[PyTree, jax.Array]:
        v, growth = tree.to_unit(jvp(v))
        return v, growth

    _, growth = lax.scan(grow, tree.random_unit(key, h), length=num_steps)
    # The weighted least-squares slope of the cumulative logs equals an average of the
    # increments under another window, which vanishes at both ends as well.
    recent = jnp.log(growth[num_steps // 2 :])
    window = jnp.hanning(len(recent) + 2)[1:-1].astype(recent.dtype)
    return jnp.exp(jnp.sum(recent * window) / jnp.sum(window))


def jacobian_norm(
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h: PyTree,
    key: jax.Array,
    *,
    num_steps: int = 20,
) -> jax.Array:
    """An estimate of ‖J‖₂, the largest singular value of J = ∂f/∂h at h.

    ‖J‖ < 1 makes f a contraction near h, and bounds ρ(J) ≤ ‖J‖. Lanczos on JᵀJ from a
    random start: a lower bound that increases with ``num_steps`` and meets the value
    much sooner than the power method.

    Cost: ``num_steps`` JVPs and VJPs of f, one linearization; memory: four states.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      params: pytree.
      inputs: pytree.
      h: the state at which J is taken.
      key: PRNG key of the start.
      num_steps: number of Lanczos steps, at least 1.

    Returns:
      A scalar.

    Raises:
      ValueError: if ``num_steps`` is below 1, or f changes the state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> w = jnp.array([[0.0, 3.0], [0.0, 0.0]])  # ρ(J) = 0, ‖J‖ = 3
      >>> f = lambda w, x, h: w @ h + x
      >>> key = jax.random.key(0)
      >>> round(float(jacobian_norm(f, w, jnp.ones(2), jnp.zeros(2), key)), 6)
      3.0

    References:
      Golub and Van Loan, "Matrix Computations", 4th edition, section 10.1.
    """
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1; got {num_steps}.")
    jvp, h = _jvp(f, params, inputs, h)
    vjp = tree.adjoint(jvp, h)

    def lanczos(carry: tuple, _: None) -> tuple[tuple, tuple]:
        q_old, q, beta = carry
        w = vjp(jvp(q))
        alpha = tree.vdot(q, w)
        w = tree.axpy(-beta, q_old, tree.axpy(-alpha, q, w))
        q_new, beta = tree.to_unit(w)
        return (q, q_new, beta), (alpha, beta)

    q = tree.random_unit(key, h)
    start = (tree.scale(0.0, q), q, tree.vary_like(jnp.zeros_like(tree.norm(q)), q))
    _, (alpha, beta) = lax.scan(lanczos, start, length=num_steps)
    beta = beta[:-1]
    # After an exact breakdown (beta = 0) q is zero, and so are the rows that follow.
    tridiagonal = jnp.diag(alpha) + jnp.diag(beta, 1) + jnp.diag(beta, -1)
    largest = jnp.linalg.eigvalsh(tridiagonal)[-1]
    return jnp.sqrt(jnp.maximum(largest, 0))


def adjoint_residual(
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h: PyTree,
    cotangent: PyTree,
    z: PyTree,
) -> jax.Array:
    """‖g + Jᵀz - z‖ / ‖g‖: how far z is from the adjoint, whoever computed it.

    Cost: one VJP of f.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      params: pytree.
      inputs: pytree.
      h: the fixed point.
      cotangent: g, a pytree like h.
      z: the candidate adjoint, a pytree like h.

    Returns:
      A scalar; ‖z - Jᵀz‖ itself where g = 0.

    Raises:
      ValueError: if f changes the state.

    Example:
      >>> import jax.numpy as jnp
      >>> f = lambda a, x, h: a * h + x  # z = g / (1 - a)
      >>> one = jnp.ones(1)
      >>> float(adjoint_residual(f, 0.5 * one, one, one, one, 2 * one))
      0.0
    """
    step, args, h = close(f, params, inputs, h)
    _, vjp = jax.vjp(partial(step, args), h)
    defect = adjoint_defect(lambda v: vjp(v)[0], cotangent, z)
    size = tree.to_unit(cotangent)[1]
    return tree.to_unit(defect)[1] / jnp.where(size == 0, 1, size)


def _jvp(
    f: StepFn, params: PyTree, inputs: PyTree, h: PyTree
) -> tuple[LinearMap, PyTree]:
    """The map v ↦ Jv at h, and h as arrays."""
    step, args, h = close(f, params, inputs, h)
    return jax.linearize(partial(step, args), h)[1], h
