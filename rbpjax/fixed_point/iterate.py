"""What iterations share: the residual, when to look at it, and what it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax.types import PyTree, Solution, Status

C = TypeVar("C")


class Look(NamedTuple):
    """Sizes of a residual and of its state, leaf by leaf: root mean squares.

    Attributes:
      change: of f(h) - h, one entry a leaf.
      size: the larger of those of h and of f(h), one entry a leaf.
    """

    change: jax.Array
    size: jax.Array

    @classmethod
    def at(cls, image: PyTree, h: PyTree) -> Look:
        """The look at ``h``, whose image under f is ``image``.

        Plain sums of squares where they can be represented, which is nearly always: one
        pass over the states. Where a leaf is tiny or huge, leaves are scaled by powers
        of two first, without rounding. Under ``vmap`` both are computed.
        """
        plain = cls._squares(image, h)
        # Squares that count must be normal numbers, and so must their products with ε².
        info = jnp.finfo(plain.size.dtype)
        low, high = float(info.tiny) / float(info.eps) ** 2, float(info.max) / 8
        huge, tiny = plain.size >= high, plain.size <= low
        # Powers that bring a mean below `low` near the largest number, and the largest
        # entry to where as many of them as one likes can be summed.
        up = 2.0 ** ((math.log2(high) - math.log2(low)) // 2)
        down = 2.0 ** (-5 * info.maxexp // 8)
        scales = jnp.where(huge, down, jnp.where(tiny, up, 1)).astype(plain.size.dtype)
        squares = lax.cond(
            jnp.any(huge | tiny),
            lambda scales: cls._squares(
                tree.scale_leaves(scales, image), tree.scale_leaves(scales, h)
            ),
            lambda _: plain,
            scales,
        )
        return cls(*(jnp.sqrt(square) / scales for square in squares))

    @classmethod
    def near_one(cls, image: PyTree, h: PyTree) -> Look:
        """The look at states whose squares can be represented."""
        return cls(*map(jnp.sqrt, cls._squares(image, h)))

    @classmethod
    def _squares(cls, image: PyTree, h: PyTree) -> Look:
        """The squares of the sizes."""

        def leaf(u: jax.Array, v: jax.Array) -> jax.Array:
            mean = lambda x: tree.own_vdot(x, x) / tree.entries(x)
            u, v = tree.widen(u), tree.widen(v)
            return jnp.stack([mean(u - v), mean(u), mean(v)])

        pairs = zip(jax.tree.leaves(image), jax.tree.leaves(h), strict=True)
        dtype = tree.real_dtype(h)
        squares = jnp.stack([leaf(u, v).astype(dtype) for u, v in pairs], axis=1)
        change, *sizes = sharding.total(squares)  # all of them by one collective
        return cls(change, jnp.maximum(*sizes))

    def residual(self, units: jax.Array, eps: jax.Array) -> jax.Array:
        """The largest of the leaves' relative residuals."""
        return jnp.max(self.relative(units, eps))

    def relative(self, units: jax.Array, eps: jax.Array) -> jax.Array:
        """The leaves' relative residuals; 0 for a leaf at rest at zero.

        ``units``: a size that each leaf has had. It is measured by no less than ``eps``
        times this, or a state that tends to zero would never come to rest.
        """
        return ratio(self.change, jnp.maximum(self.size, eps * units))

    def merit(self, units: jax.Array) -> jax.Array:
        """The size of the residual itself, leaves in their ``units``.

        By this iterates are compared: relative residuals also fall while a state grows.
        """
        return jnp.linalg.norm(ratio(self.change, units))


def ratio(a: jax.Array | float, b: jax.Array) -> jax.Array:
    """``a / b``, and 0 where b = 0."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def leaf_eps(h: PyTree) -> jax.Array:
    """The machine epsilon of each leaf."""
    # Computed, not an array that a custom_vjp would close over.
    eps = lambda x: jnp.full((), jnp.finfo(x.dtype).eps, tree.real_dtype(h))
    return jnp.stack([eps(x) for x in jax.tree.leaves(h)])


def relative_change(new: PyTree, old: PyTree) -> jax.Array:
    """The largest ‖new - old‖ / max(‖new‖, ‖old‖) of a leaf; 0 where both vanish."""
    look = Look.at(new, old)
    return look.residual(look.size, leaf_eps(old))


def repeat(update: Callable[[C], C], times: int | jax.Array, carry: C) -> C:
    """``update`` applied ``times`` times, without a loop for once or not at all."""
    if isinstance(times, int) and times <= 1:
        return update(carry) if times == 1 else carry
    zero = sharding.vary_like(jnp.int32(0), (times, carry))
    times = sharding.vary_like(jnp.int32(times), (times, carry))
    return lax.fori_loop(zero, times, lambda _, c: update(c), carry)


def once(wanted: jax.Array, update: Callable[[C], C], carry: C) -> C:
    """``update`` applied where ``wanted``, else nothing: a loop of one turn or none.

    ``lax.cond`` does the same, but copies what its branches hand through.
    """
    turn = lambda now: (now[0] & False, update(now[1]))
    return lax.while_loop(lambda now: now[0], turn, (wanted, carry))[1]


def next_look(
    every: int | None,
    k: jax.Array,
    since: int | jax.Array,
    residual: jax.Array,
    before: jax.Array,
    tol: float | jax.Array,
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


def meets(residual: jax.Array, reach: jax.Array, tol: float | jax.Array) -> jax.Array:
    """Whether a state counts as the fixed point: its error, too, must be small.

    A small residual alone says little where I - J is nearly singular, nor where there
    is no fixed point at all, as of h + e⁻ʰ. So ``reach`` times the residual, an
    estimate of the distance, must be at most tol^⅔: 3e-4 in float32 and 1.5e-8 in
    float64 by default.
    """
    # A residual of zero is known to rounding only: h + e⁻ʰ has one at h = 40.
    floor = jnp.minimum(jnp.finfo(residual.dtype).eps / 4, tol)
    error = jnp.maximum(residual, floor.astype(residual.dtype)) * reach
    return (residual <= tol) & (error <= error_tol(tol))


def error_tol(tol: float | jax.Array) -> float | jax.Array:
    """The bound on the relative error of the state that goes with ``tol``."""
    return tol ** (2 / 3)


def reached(travelled: PyTree, h: PyTree, look: Look, before: jax.Array) -> jax.Array:
    """How far a step from ``h`` to ``travelled`` went per residual: its reach.

    The largest of the steps so far, those before fading by a factor of 4 each.
    """
    step, residual = Look.at(travelled, h).merit(look.size), look.merit(look.size)
    # Where no residual is left, nothing new is known.
    known = jnp.maximum(ratio(step, residual), before / 4)
    return jnp.where(residual == 0, before, known)


def unknown_reach(tol: float | jax.Array, h: PyTree) -> float | jax.Array:
    """The reach of a state of which one residual is known: only rounding passes."""
    return error_tol(tol) / (4 * tree.coarsest_eps(h))


def judged(
    step: Callable[[PyTree], PyTree],
    h: PyTree,
    num_steps: int | jax.Array,
    tol: float | jax.Array,
    damping: float = 0.0,
) -> Solution:
    """The solution of a given number of steps that came to ``h``.

    Two evaluations of f, for a residual and the rate at which it falls, which the
    compiler removes where nobody reads them.
    """
    image = step(h)
    look = Look.at(image, h)
    mixed = image if damping == 0 else tree.axpy(damping, tree.sub(h, image), image)
    after = Look.at(step(mixed), mixed)
    units = jnp.maximum(look.size, after.size)
    residual = look.residual(look.size, leaf_eps(h))
    rate = ratio(after.merit(units), look.merit(units))
    reach = jnp.where(rate < 1, (1 - damping) / (1 - rate), jnp.inf)
    rounded = residual <= 4 * tree.coarsest_eps(h)
    reach = jnp.where(rounded, unknown_reach(tol, h), reach)
    steps = jnp.int32(num_steps)
    status = status_of(residual, tol, True, meets(residual, reach, tol))
    converged = status == Status.CONVERGED
    return Solution(h, steps, steps + 2, residual, status, converged)


def status_of(
    residual: jax.Array,
    tol: float | jax.Array,
    exhausted: jax.Array | bool,
    resolved: jax.Array | bool = True,
) -> jax.Array:
    """The ``Status`` of a value with that residual, as an int32 scalar.

    ``exhausted``: whether the budget is spent; ``resolved``: whether the residual says
    that the error is small too.
    """
    pick = lambda condition, status, other: jnp.where(
        condition, jnp.int32(status), other
    )
    small = residual <= tol
    status = pick(exhausted, Status.OUT_OF_BUDGET, jnp.int32(Status.STAGNATED))
    status = pick(small, pick(resolved, Status.CONVERGED, Status.ROUNDING), status)
    return pick(jnp.isfinite(residual), status, Status.NOT_FINITE)
