"""Equilibrium propagation: a gradient from two states of rest of an energy."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import tree
from rbpjax.fixed_point.implicit import rbp_root
from rbpjax.fixed_point.newton import Newton
from rbpjax.types import ForwardSolver, PyTree, Solution

Scalar = Callable[[PyTree, PyTree, PyTree], jax.Array]
"""An energy or a loss: ``(params, inputs, h) -> scalar``."""


class EquilibriumEstimate(NamedTuple):
    """What ``equilibrium_propagation`` found.

    Attributes:
      loss: at the free state, a scalar.
      grads: the estimate of its gradient, a pytree like params.
      free: the ``Solution`` of the free phase.
      nudged: those of the nudged phases, of β and of -β if centred, stacked along a
        first axis.
      converged: whether all of them did, a bool scalar. Of a phase that did not, the
        error goes into the estimate divided by β.
    """

    loss: jax.Array
    grads: PyTree
    free: Solution
    nudged: Solution
    converged: jax.Array


def equilibrium_propagation(
    energy: Scalar,
    loss: Scalar,
    *,
    nudge: float | jax.Array,
    centred: bool = True,
    forward: ForwardSolver = Newton(),
) -> Callable[[PyTree, PyTree, PyTree], EquilibriumEstimate]:
    """A gradient from a free and a nudged state of rest, by no adjoint at all.

    With the energy E, the loss L and F = E + βL, let h_β be at rest: ∂F/∂h = 0. Then
    the gradient of L(h₀) for the params θ is that of ∂F/∂θ for β at β = 0, and for a
    finite nudge β it is estimated by

        (∂F/∂θ at (β, h_β) - ∂F/∂θ at (-β, h_-β)) / 2β,

    or, if not ``centred``, by the difference to the free state, divided by β. Biased:
    by O(β²) and by O(β), and exact in the limit, where it is the implicit gradient.
    J = I - ∂²E/∂h² is symmetric, which is why the nudge does the work of the adjoint.
    What the solves leave of their residuals, and rounding, is divided by β: about
    their tolerance's third root is a good nudge where E and L are of one size.

    The state of rest is the one found from h0: a minimum, where ``forward`` descends.
    The nudged phases start from the free state. For a negative nudge the loss pushes
    away, and an energy that grows more slowly than it has no state of rest there.

    Cost: two solves of ∂F/∂h = 0, or three, and as many gradients for θ. Memory: that
    of a solve. AD modes: it is a gradient; differentiate the loss of ``rbp_root`` for
    derivatives of it. Composes with ``jit``, ``vmap``, ``scan``.

    Args:
      energy: E, ``energy(params, inputs, h) -> scalar``.
      loss: L, ``loss(params, inputs, h) -> scalar``, with targets among the inputs.
      nudge: β, in units of the energy over those of the loss; not zero.
      centred: whether to nudge to both sides.
      forward: any ``ForwardSolver``, as of ``rbp_root``:
        ``FixedPointIteration(damping=0.7)`` relaxes by gradient steps, in 0.3 of the
        energy's own scale.

    Returns:
      ``estimate(params, inputs, h0) -> EquilibriumEstimate``, for h0 a pytree of
      floating-point arrays, and so params.

    Raises:
      ValueError: if a function is none, or ``nudge`` is no number or zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import equilibrium_propagation
      >>> energy = lambda a, x, h: jnp.sum(0.5 * h**2 - a * x["in"] * h)  # h = a x
      >>> loss = lambda a, x, h: 0.5 * jnp.sum((h - x["out"]) ** 2)
      >>> estimate = equilibrium_propagation(energy, loss, nudge=0.01)
      >>> x = {"in": jnp.array([2.0]), "out": jnp.array([1.0])}
      >>> found = estimate(1.5, x, jnp.zeros(1))
      >>> round(float(found.grads), 2), bool(found.converged)  # (a x - y) x
      (4.0, True)

    References:
      Scellier and Bengio, "Equilibrium Propagation: Bridging the Gap between
      Energy-Based Models and Backpropagation", Frontiers in Computational
      Neuroscience 11, 2017, theorem 1. Laborieux et al., "Scaling Equilibrium
      Propagation to Deep ConvNets by Drastically Reducing its Gradient Estimator Bias",
      Frontiers in Neuroscience 15, 2021, section 2.3 (the centred estimate).
    """
    for name, function in (("energy", energy), ("loss", loss)):
        if not callable(function):
            raise ValueError(
                f"equilibrium_propagation: `{name}` must be called as {name}(params, "
                f"inputs, h) -> scalar; got {function!r}."
            )
    number = isinstance(nudge, int | float) and not isinstance(nudge, bool)
    if not isinstance(nudge, jax.Array) and (not number or nudge == 0):
        raise ValueError(
            "equilibrium_propagation: `nudge` must be a number other than zero, such "
            f"as 0.01; got {nudge!r}."
        )

    def total(params: PyTree, inputs: PyTree, h: PyTree, beta: jax.Array) -> jax.Array:
        """F, the energy with the nudge."""
        nudged = beta * loss(params, inputs, h)
        return energy(params, inputs, h) + nudged

    def force(args: tuple[PyTree, jax.Array], inputs: PyTree, h: PyTree) -> PyTree:
        """∂F/∂h, zero at rest."""
        params, beta = args
        slope = jax.grad(total, argnums=2)(params, inputs, h, beta)
        return jax.tree.map(jnp.conj, slope)

    rest = rbp_root(force, forward=forward)
    of_params = jax.grad(total)

    def estimate(params: PyTree, inputs: PyTree, h0: PyTree) -> EquilibriumEstimate:
        """Loss at the free state from h0, and the estimate of its gradient."""
        params, inputs, h0 = lax.stop_gradient((params, inputs, h0))
        like = jax.eval_shape(loss, params, inputs, h0)
        beta = jnp.asarray(nudge, like.dtype)
        free = rest((params, 0 * beta), inputs, h0)

        def phase(beta: jax.Array) -> tuple[Solution, PyTree]:
            """At rest with that nudge, and ∂F/∂θ there."""
            nudged = rest((params, beta), inputs, free.value)
            return nudged, of_params(params, inputs, nudged.value, beta)

        betas = jnp.stack([beta, -beta] if centred else [beta])
        nudged, slopes = lax.map(phase, betas)  # one program for both
        first = jax.tree.map(lambda s: s[0], slopes)
        if centred:
            other, width = jax.tree.map(lambda s: s[1], slopes), 2 * beta
        else:
            other, width = of_params(params, inputs, free.value, 0 * beta), beta
        grads = tree.scale(1 / width, jax.tree.map(jnp.subtract, first, other))
        converged = free.converged & jnp.all(nudged.converged)
        value = loss(params, inputs, free.value)
        return EquilibriumEstimate(value, grads, free, nudged, converged)

    return estimate
