"""Numbers that say whether, and how well, a fixed point can be differentiated."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import tree
from rbpjax._core.step import close
from rbpjax.fixed_point.backward.neumann import adjoint_defect
from rbpjax.fixed_point.hoisting import hoist_linear
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
    _, jvp, h = linearized(f, params, inputs, h)
    return growth_rate(growth(jvp, tree.random_unit(key, h), num_steps))


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
    _, jvp, h = linearized(f, params, inputs, h)
    return singular_range(jvp, tree.random_unit(key, h), num_steps)[0]


def loop_cut_error(
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h: PyTree,
    key: jax.Array,
    *,
    num_probes: int = 8,
) -> jax.Array:
    """How wrong the one-step gradient is: ‖Jᵀg‖ / ‖g‖, over random cotangents g.

    Cutting the loop takes z = g (``Neumann(0)``, the "Jacobian-free" gradient), and
    Jᵀg is what that leaves of the adjoint equation: its relative residual, for one
    VJP. For the cotangent of your own loss it is
    ``adjoint_residual(f, params, inputs, h, g, g)``.

    The root mean square over random directions, an unbiased estimate of ‖J‖_F² / n
    under the root, n being the number of entries of the state.

    Cost: ``num_probes`` VJPs of f, one after the other; memory: two states.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      params: pytree.
      inputs: pytree.
      h: the fixed point.
      key: PRNG key of the cotangents.
      num_probes: number of cotangents, at least 1.

    Returns:
      A scalar.

    Raises:
      ValueError: if ``num_probes`` is below 1, or f changes the state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> w = 0.9 * jnp.array([[0.0, -1.0], [1.0, 0.0]])
      >>> f = lambda w, x, h: w @ h + x
      >>> key = jax.random.key(0)
      >>> round(float(loop_cut_error(f, w, jnp.ones(2), jnp.zeros(2), key)), 6)
      0.9
    """
    if num_probes < 1:
        raise ValueError(f"`num_probes` must be at least 1; got {num_probes}.")
    _, jvp, h = linearized(f, params, inputs, h)
    vjp = hoist_linear(tree.adjoint(jvp, h), h)
    return loop_cut(vjp, h, key, num_probes)


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


def linearized(
    f: StepFn, params: PyTree, inputs: PyTree, h: PyTree
) -> tuple[LinearMap, LinearMap, PyTree]:
    """The step h ↦ f(θ, x, h), the map v ↦ Jv at h, and h as arrays."""
    step, args, h = close(f, params, inputs, h)
    step = partial(step, args)
    return step, jax.linearize(step, h)[1], h


def growth(linear: LinearMap, v: PyTree, num_steps: int) -> jax.Array:
    """The factors by which ‖v‖ grows in each of ``num_steps`` applications."""

    def grow(v: PyTree, _: None) -> tuple[PyTree, jax.Array]:
        return tree.to_unit(linear(v))

    return lax.scan(grow, v, length=num_steps)[1]


def growth_rate(factors: jax.Array) -> jax.Array:
    """The smoothed growth a step over the second half of the steps."""
    # The weighted least-squares slope of the cumulative logs equals an average of the
    # increments under another window, which vanishes at both ends as well.
    recent = jnp.log(factors[len(factors) // 2 :])
    window = jnp.hanning(len(recent) + 2)[1:-1].astype(recent.dtype)
    return jnp.exp(jnp.sum(recent * window) / jnp.sum(window))


def loop_cut(vjp: LinearMap, h: PyTree, key: jax.Array, num_probes: int) -> jax.Array:
    """The root mean square of ‖Jᵀg‖ over random unit g."""
    probe = lambda key: tree.norm(vjp(tree.random_unit(key, h)))
    errors = lax.map(probe, jax.random.split(key, num_probes))
    return jnp.sqrt(jnp.mean(errors**2))


def singular_range(
    apply: LinearMap, v: PyTree, num_steps: int
) -> tuple[jax.Array, jax.Array]:
    """The largest and the smallest singular value that ``num_steps`` of Lanczos see.

    Golub and Kahan's bidiagonalization, which is Lanczos on AᵀA without its squared
    condition number. Both values lie between the true extremes.
    """
    adjoint = tree.adjoint(apply, v)

    def step(carry: tuple, _: None) -> tuple[tuple, tuple]:
        u, v, beta, live = carry
        u, alpha = tree.to_unit(tree.axpy(-beta, u, apply(v)))
        v, beta = tree.to_unit(tree.axpy(-alpha, v, adjoint(u)))
        return (u, v, beta, live & (beta > 0)), (alpha, beta, live)

    zero = 0 * tree.norm(v)
    start = (tree.scale(0.0, v), v, zero, zero == 0)
    _, (alpha, beta, live) = lax.scan(step, start, length=num_steps)
    # After an exact breakdown (beta = 0) the space is exhausted: the rows that follow
    # are zero, and would be taken for a singular value. alpha[0] = ‖Av‖ is none of
    # the extremes.
    alpha = jnp.where(live, alpha, alpha[0])
    values = jnp.linalg.svd(jnp.diag(alpha) + jnp.diag(beta[:-1], 1), compute_uv=False)
    return values[0], values[-1]
