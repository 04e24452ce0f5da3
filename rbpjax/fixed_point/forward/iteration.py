"""Forward solvers: find h* with h* = step(h*)."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax.types import PyTree, Solution, check_count, check_real, strategy


def relative_change(new: PyTree, old: PyTree) -> jax.Array:
    """‖new - old‖ / max(‖new‖, ‖old‖), and zero where both vanish.

    Plain sums of squares where they can be represented, which is nearly always: one
    pass over the states. Where states are tiny or huge, they are scaled by a power of
    two first, without rounding. Under ``vmap`` both are computed.
    """
    difference, squares = _squares(1.0, new, old)
    # Squares that count must be normal numbers, and so must their products with ε².
    info = jnp.finfo(squares.dtype)
    low, high = float(info.tiny) / float(info.eps) ** 2, float(info.max) / 8
    huge = squares >= high
    # Powers that bring a sum below `low` near the largest number, and the largest
    # entry to where as many of them as one likes can be summed.
    up = 2.0 ** ((math.log2(high) - math.log2(low)) // 2)
    down = 2.0 ** (-5 * info.maxexp // 8)
    scale = jnp.where(huge, down, up).astype(squares.dtype)
    difference, squares = lax.cond(
        huge | (squares <= low),
        _squares,
        lambda *_: (difference, squares),
        scale,
        new,
        old,
    )
    return jnp.sqrt(difference / jnp.where(squares == 0, 1, squares))


def _squares(scale: jax.Array | float, new: PyTree, old: PyTree) -> tuple:
    """‖new - old‖² and max(‖new‖², ‖old‖²) of the scaled states."""
    change = tree.scale(scale, tree.sub(new, old))
    new, old = tree.scale(scale, new), tree.scale(scale, old)
    squares = jnp.maximum(tree.vdot(new, new), tree.vdot(old, old))
    return tree.vdot(change, change), squares


def repeat(update: Callable, times: int | jax.Array, carry: tuple) -> tuple:
    """``update`` applied ``times`` times, without a loop for once or not at all."""
    if isinstance(times, int) and times <= 1:
        return update(carry) if times == 1 else carry
    zero = sharding.vary_like(jnp.int32(0), (times, carry))
    times = sharding.vary_like(jnp.int32(times), (times, carry))
    return lax.fori_loop(zero, times, lambda _, c: update(c), carry)


def next_look(
    every: int | None,
    k: jax.Array,
    since: int | jax.Array,
    residual: jax.Array,
    before: jax.Array,
    tol: float,
) -> int | jax.Array:
    """Number of steps, after ``k`` of them, to the next look at the residual.

    That is ``every``, or, if ``None``, three quarters of the way to the tolerance at
    the rate of the last ``since`` steps, in which the residual fell from ``before``:
    every step in a divergence and near the end, and never more than ``k``, so that a
    rate that misleads can at most double the steps.
    """
    if every is not None:
        return every
    fallen, to_fall = jnp.log(residual / before), jnp.log(tol / residual)
    ahead = 0.75 * to_fall / fallen * jnp.asarray(since).astype(residual.dtype)
    most = k.astype(residual.dtype)
    return jnp.where(ahead >= 1, jnp.minimum(ahead, most), 1).astype(k.dtype)


@strategy
class FixedPointIteration:
    """Iterates h ← (1 - damping) f(h) + damping h until f(h) = h to a tolerance.

    Converges from a nearby start if and only if ρ((1 - damping) J + damping I) < 1, at
    that rate. Damping helps where J has large negative or complex eigenvalues.

    The value returned is the one with the smallest residual looked at, and the residual
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
      check_every: look at the residual after every so many steps, and use the budget in
        whole multiples. ``None``: rarely while it is far from the tolerance at the rate
        so far, about log(num_steps) times in all, and never later than after twice the
        steps. A look costs passes over the state and, where that is sharded, a
        collective.

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
    check_every: int | None = None

    def __post_init__(self) -> None:
        """Validates the fields."""
        check_count(self, "max_steps", self.max_steps, 1)
        check_real(self, "damping", self.damping, below=1.0)
        if self.check_every is not None:
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
            _, _, _, k, _, best, residual, _ = carry
            sane = (residual <= best * eps**-0.5) | (k == 0)  # False for NaN
            return (best > tol) & (k <= self.max_steps) & sane

        def advance(carry: tuple) -> tuple:
            image, h = carry
            h = self._mix(image, h)
            return step(h), h

        def body(carry: tuple) -> tuple:
            image, h, h_best, k, k_best, best, before, ahead = carry
            ahead = ahead if self.check_every is None else self.check_every
            image, h = repeat(advance, ahead, (image, h))
            k = k + ahead
            residual = relative_change(image, h)
            better = residual < best
            after = next_look(self.check_every, k, ahead, residual, before, tol)
            return (
                image,
                h,
                tree.where(better, h, h_best),
                k,
                jnp.where(better, k - 1, k_best),  # one evaluation looks at h itself
                jnp.where(better, residual, best),
                residual,
                jnp.minimum(after, self.max_steps + 1 - k),
            )

        zero = sharding.vary_like(jnp.int32(0), h0)
        infinity = sharding.vary_like(jnp.array(jnp.inf, tree.real_dtype(h0)), h0)
        carry = (h0, h0, h0, zero, zero, infinity, infinity, zero + 1)
        carry = lax.while_loop(unfinished, body, carry)
        _, _, value, _, steps, residual, _, _ = carry
        return Solution(value, steps, residual, residual <= tol)

    def _mix(self, image: PyTree, h: PyTree) -> PyTree:
        """The damped step; without damping, f's own output, bit for bit."""
        if self.damping == 0.0:
            return image
        return tree.axpy(self.damping, tree.sub(h, image), image)
