"""Forward solvers: find h* with h* = step(h*)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax.fixed_point import tree
from rbpjax.types import PyTree, Solution, check_count, check_real, strategy


def relative_change(new: PyTree, old: PyTree) -> jax.Array:
    """‖new - old‖ / max(‖new‖, ‖old‖), and zero where both vanish.

    Plain sums of squares where float32 can represent them, which is nearly always: one
    pass over the states. Where they are tiny or huge, entries are divided by the
    largest one first. Under ``vmap`` both are computed.
    """
    change = tree.sub(new, old)
    squares = jnp.maximum(tree.vdot(new, new), tree.vdot(old, old))
    difference = tree.vdot(change, change)
    # Squares that count must be normal numbers, and so must their products with ε².
    info = jnp.finfo(squares.dtype)
    low, high = float(info.tiny) / float(info.eps) ** 2, float(info.max) / 8
    return lax.cond(
        (squares > low) & (squares < high),
        lambda *_: jnp.sqrt(difference / squares),
        _scaled_change,
        new,
        old,
    )


def _scaled_change(new: PyTree, old: PyTree) -> jax.Array:
    """``relative_change`` for states of any scale."""
    largest = jnp.maximum(tree.max_abs(new), tree.max_abs(old))
    safe = jnp.where(largest == 0, 1, largest).astype(largest.dtype)
    new, old = tree.divide(new, safe), tree.divide(old, safe)
    size = jnp.maximum(tree.norm(new), tree.norm(old))
    return tree.norm(tree.sub(new, old)) / jnp.where(size == 0, 1, size)


def repeat(update: Callable, times: int, carry: tuple) -> tuple:
    """``update`` applied ``times`` times, without a loop for once."""
    if times == 1:
        return update(carry)
    return lax.fori_loop(0, times, lambda _, c: update(c), carry)


@strategy
class FixedPointIteration:
    """Iterates h ← (1 - damping) f(h) + damping h until f(h) = h to a tolerance.

    Converges from a nearby start if and only if ρ((1 - damping) J + damping I) < 1, at
    that rate. Damping helps where J has large negative or complex eigenvalues.

    The value returned is the iterate with the smallest residual, and the residual
    reported is that of this very value: it takes ``num_steps`` steps to reach the value
    and one evaluation of f more to know its residual. Divergence (a residual that is
    not finite, or 1/√ε times the best seen) stops the loop.

    Cost: one evaluation of f a step; memory: three states. Not differentiable by
    reverse mode on its own; ``rbp_solve`` gives its gradient.

    Attributes:
      max_steps: budget of steps.
      tol: bound on the relative residual ‖f(h) - h‖ / max(‖h‖, ‖f(h)‖). ``None`` asks
        for three quarters of the digits of the coarsest dtype in the state (6e-6 in
        float32, 2e-12 in float64).
      damping: weight of the old iterate, in [0, 1).
      steps: if given, take exactly this many steps and return the last iterate,
        whatever its residual, which is still reported (``converged`` compares it with
        the default tolerance); excludes ``tol``.
      check_every: look at the residual after every so many steps only. Where states are
        sharded, each look is a collective. The budget is used in whole multiples.

    Raises:
      ValueError: if a field is out of its range or not a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> solution = FixedPointIteration()(lambda h: 0.5 * jnp.cos(h), jnp.ones(2))
      >>> bool(solution.converged), bool(solution.residual < 1e-11)
      (True, True)
    """

    max_steps: int = 1000
    tol: float | None = None
    damping: float = 0.0
    steps: int | None = None
    check_every: int = 1

    def __post_init__(self) -> None:
        """Validates the fields."""
        check_count(self, "max_steps", self.max_steps, 1)
        check_real(self, "damping", self.damping, below=1.0)
        check_count(self, "check_every", self.check_every, 1)
        if self.tol is not None:
            check_real(self, "tol", self.tol)
        if self.steps is not None:
            check_count(self, "steps", self.steps, 0)
            if self.tol is not None:
                raise ValueError(
                    "FixedPointIteration: give `steps` (an exact count) or `tol` (an "
                    f"accuracy), not both; got steps={self.steps}, tol={self.tol}."
                )

    def __call__(self, step: Callable[[PyTree], PyTree], h0: PyTree) -> Solution:
        """Solves h = step(h) from ``h0``."""
        tol = tree.default_tol(h0) if self.tol is None else self.tol
        if self.steps is not None:
            h = lax.fori_loop(0, self.steps, lambda _, h: self._mix(step(h), h), h0)
            residual = relative_change(step(h), h)
            steps = jnp.int32(self.steps)
            return Solution(h, steps, residual, residual <= tol)

        eps = float(jnp.finfo(tree.real_dtype(h0)).eps)

        def unfinished(carry: tuple) -> jax.Array:
            _, _, k, best, _, residual = carry
            sane = (residual <= best * eps**-0.5) | (k == 0)  # False for NaN
            return (best > tol) & (k <= self.max_steps) & sane

        def advance(carry: tuple) -> tuple:
            h_next, _, _ = carry
            image = step(h_next)
            return self._mix(image, h_next), h_next, image

        def body(carry: tuple) -> tuple:
            h_next, h_best, k, best, k_best, _ = carry
            last = (h_next, h_next, h_next)
            h_next, h, image = repeat(advance, self.check_every, last)
            residual = relative_change(image, h)
            better = residual < best
            k = k + self.check_every
            return (
                h_next,
                tree.where(better, h, h_best),
                k,
                jnp.where(better, residual, best),
                jnp.where(better, k - 1, k_best),  # one evaluation looks at h itself
                residual,
            )

        k = tree.vary_like(jnp.int32(0), h0)
        infinity = tree.vary_like(jnp.array(jnp.inf, tree.real_dtype(h0)), h0)
        carry = lax.while_loop(unfinished, body, (h0, h0, k, infinity, k, infinity))
        _, value, _, residual, steps, _ = carry
        return Solution(value, steps, residual, residual <= tol)

    def _mix(self, image: PyTree, h: PyTree) -> PyTree:
        """The damped step; without damping, f's own output, bit for bit."""
        if self.damping == 0.0:
            return image
        return tree.axpy(self.damping, tree.sub(h, image), image)
