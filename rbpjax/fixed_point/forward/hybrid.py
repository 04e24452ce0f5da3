"""The default solver: plain iteration, and Newton-GMRES where that is not the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import tree
from rbpjax._core.arnoldi import Krylov, arnoldi
from rbpjax._core.step import has_sure_products
from rbpjax._core.strategy import budget, strategy, tolerance
from rbpjax.fixed_point.forward.anderson import Anderson
from rbpjax.fixed_point.forward.iteration import FixedPointIteration
from rbpjax.fixed_point.iterate import (
    Look,
    error_tol,
    leaf_eps,
    ratio,
)
from rbpjax.fixed_point.search import Search
from rbpjax.types import PyTree, Solution

PATIENCE = 30
"""Plain steps that are worth waiting for."""
DIMENSION = 30
"""Of the Krylov space: the whole one for up to 60 numbers, a third from 2¹² on."""
SHORTEST = 2.0**-10
"""Of a step; a direction that is no better so near is wrong."""
WAIT = 150
"""Evaluations and products that an attempt may go on without a gain of 0.7."""
ATTEMPTS = 3


@strategy
class Hybrid:
    """Plain iteration while it converges soon, and Newton-Krylov steps where not.

    1. Plain iteration h ← f(h), until it converges, more than about 30 steps are left
       at the rate so far, or it moves away.
    2. Newton's method from the best point, each linear system by GMRES, steps halved
       while the residual ‖f(h) - h‖ does not fall. Where it stagnates it is tried with
       shifted systems (pseudo-transient continuation), and from the start with whole
       steps. Where f has a backward pass of its own, and there are no products with J,
       Anderson's method takes this place.

    Converged means that the residual and the distance to the fixed point are small (see
    ``Solution``). A state that is as good as rounding allows, and no better, ends as
    ``Status.ROUNDING``: I - J is singular there, or nearly so, or f computes in a lower
    precision than its state.

    Converges to *a* fixed point, where there are several. No guarantee: the best state
    found is returned, with the reason.

    Cost: where plain iteration takes up to about 25 steps, the same evaluations of f;
    else evaluations and products with J, which ``num_products`` counts together.
    Memory: the Krylov basis of 10 states, of 30 for up to 2¹² numbers, and some twenty
    more. AD modes: none of its own; ``rbp_solve`` gives its gradient.

    Attributes:
      tol: bound on the relative residual, leaf by leaf: ‖f(h) - h‖ / max(‖h‖, ‖f(h)‖)
        of each, in [0, 1). ``None``: three quarters of the digits of the coarsest dtype
        in the state (6e-6 in float32, 2e-12 in float64).
      max_steps: budget of evaluations of f and products with J.

    Raises:
      ValueError: if an option is out of its range or not a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import Hybrid
      >>> jnp.set_printoptions(precision=4, suppress=True)
      >>> solution = Hybrid()(lambda h: 1 - 5 * h, jnp.ones(2))
      >>> print(solution.converged, solution.value)
      True [0.1667 0.1667]

    References:
      Walker and Ni 2011 (Anderson); Kelley, "Iterative Methods for Linear and Nonlinear
      Equations", SIAM 1995, chapters 6 and 8 (Newton-GMRES); Kelley and Keyes,
      "Convergence analysis of pseudo-transient continuation", 1998.
    """

    tol: float | jax.Array | None = tolerance(default=None)
    max_steps: int | jax.Array = budget(default=1000)

    def __call__(self, step: Callable[[PyTree], PyTree], h0: PyTree) -> Solution:
        """Solves h = step(h) from ``h0``."""
        tol = tree.tol_for(h0, self.tol)
        plain = FixedPointIteration(max_steps=self.max_steps)
        end = plain.run(step, h0, tol, PATIENCE)
        return lax.cond(
            end.search.done,
            lambda: end.search.solution(end.k, tol, self.max_steps),
            lambda: self._other_ways(step, h0, tol, end.search, end.k),
        )

    def _other_ways(
        self,
        step: Callable[[PyTree], PyTree],
        h0: PyTree,
        tol: float | jax.Array,
        plain: Search,
        k: jax.Array,
    ) -> Solution:
        """Newton's method from the best point of plain iteration.

        In variables of magnitude one, leaf by leaf: all leaves count alike.
        """
        units = jnp.maximum(plain.units, self._flow(step, plain.value))
        units = jnp.ldexp(jnp.ones_like(units), jnp.frexp(units)[1])
        inwards = lambda h: tree.cast_like(tree.scale_leaves(1 / units, h), h0)
        outwards = lambda u: tree.cast_like(tree.scale_leaves(units, u), h0)
        scaled = lambda u: inwards(step(outwards(u)))
        search = plain._replace(
            value=inwards(plain.value),
            merit=jnp.full_like(plain.merit, jnp.inf),
            units=jnp.ones_like(units),
            good=jnp.ones_like(plain.good),
            leaves=None,
        )
        if not has_sure_products(step, h0):
            search, k = Anderson(max_steps=self.max_steps).run(scaled, search, k, tol)
            found = search.solution(k, tol, self.max_steps)
        else:
            end = newton_krylov(
                scaled, inwards(h0), search, k, tol, self.max_steps, plain.done
            )
            goal = jnp.maximum(tol, 4 * end.noise)
            found = end.search.solution(end.k, goal, self.max_steps)
        return found._replace(value=outwards(found.value))

    def _flow(self, step: Callable[[PyTree], PyTree], h: PyTree) -> jax.Array:
        """What passes through f to each leaf of several: its size, but for cancelling.

        A momentum that starts at rest is no unit to measure it by.
        """
        eps = leaf_eps(h)
        if len(eps) == 1:
            return 0 * eps
        nudged = step(tree.add(h, tree.last_places(h)))
        flow = Look.at(nudged, step(h)).change / eps
        return jnp.where(jnp.isfinite(flow), flow, 0)


def newton_krylov(
    step: Callable[[PyTree], PyTree],
    h0: PyTree,
    search: Search,
    k: jax.Array,
    tol: float | jax.Array,
    max_steps: int | jax.Array,
    settled: jax.Array,
) -> _State:
    """Newton-GMRES from the best point of a search, in up to three attempts.

    For states of magnitude one. ``settled``: whether there is nothing to do.
    """
    eps = tree.coarsest_eps(h0)
    numbers = sum(
        tree.entries(u) * (1 + jnp.iscomplexobj(u)) for u in jax.tree.leaves(h0)
    )
    dimension = DIMENSION if numbers <= 2**12 else DIMENSION // 3
    dimension = numbers if numbers <= 2 * DIMENSION else dimension

    def unfinished(now: _State) -> jax.Array:
        more = (now.k <= max_steps) & (now.attempt < ATTEMPTS)
        return more & ~now.search.done & ~settled

    def body(now: _State) -> _State:
        image, jvp = jax.linearize(step, now.h)
        look = Look.near_one(image, now.h)
        # What passes through J, and what the products of two parts differ by from that
        # of the whole: where terms of f cancel, rounding is that of the terms; and f
        # may compute in a lower precision than its state.
        whole = tree.scale(1 / eps, tree.last_places(now.h))
        part = _share(whole)
        flow = jvp(whole)
        sums = tree.add(jvp(part), jvp(tree.sub(whole, part)))
        lost = Look.near_one(sums, flow)
        look = look._replace(size=jnp.maximum(look.size, lost.size))
        noise = 2 * jnp.max(ratio(lost.change, look.size))
        noise = jnp.where(noise > 16 * eps, noise, 0)
        residual = now.search.residual_at(look, now.h)
        merit = look.merit(now.search.units)
        rounding = eps * jnp.linalg.norm(look.size)
        fresh = now.length == 0
        # Newton's steps must gain, shifted ones may lose, whole ones may do anything.
        growth = jnp.where(now.attempt == 1, 2, 1e6).astype(merit.dtype)
        growth = jnp.where(now.attempt == 0, 1 - 1e-4, growth).astype(merit.dtype)
        better = jnp.isfinite(merit) & (fresh | (merit < growth * now.merit))
        # Far out, rounding alone makes residuals small.
        better &= rounding <= jnp.maximum(now.search.merit / 10, 4 * now.rounding)

        # Where the residual is lost in rounding, an error of rounding is looked at.
        r = tree.sub(image, now.h)
        r = tree.where(residual > eps / 4, r, tree.last_places(now.h))
        v, beta = tree.to_unit(r)
        fallen = ratio(merit, now.merit)
        enough = jnp.clip(0.9 * fallen * fallen, 1e-3, 0.1)
        sufficient = jnp.minimum(0.5, ratio(tol, 4 * residual))
        enough = jnp.maximum(enough, jnp.where(residual > tol, sufficient, 0))
        enough = jnp.where(better, enough, jnp.inf).astype(beta.dtype)
        krylov = arnoldi(lambda v: tree.sub(v, jvp(v)), v, dimension, enough)
        scale = jnp.where(fresh, merit, now.scale)
        shift = jnp.where(now.attempt == 1, ratio(merit, scale), 0)
        y, smallest = _least_squares(krylov, beta, shift)
        # The length of the step, and of what it may leave out, relative to the state.
        left = jnp.maximum(krylov.left * beta, rounding)
        left = jnp.where(left == 0, 0, left / smallest)  # at rest at zero
        smallest_leaf = jnp.min(jnp.where(look.size > eps, look.size, 1))
        error = (jnp.linalg.norm(y) + left) / smallest_leaf
        certain = (error <= error_tol(tol)) & (krylov.left <= 0.9)
        done = better & (residual <= tol) & certain & (4 * noise <= tol)

        k = now.k + 4
        search = now.search.looked(look, now.h, k, done, tol)
        k += krylov.dim
        gained = better & (fresh | (merit < 0.7 * now.mark))
        since = jnp.where(gained, k, now.since)
        length = jnp.where(better, 1, now.length / 2).astype(now.length.dtype)
        direction = tree.where(better, krylov.combine(y), now.direction)
        base = tree.where(better, now.h, now.base)
        # A state as good as rounding allows is not bettered by other attempts.
        final = (~better & (search.residual <= tol)) | (residual <= 4 * noise)
        over = (length < SHORTEST) | (k - since > WAIT) | (fresh & ~better)
        attempt = now.attempt + over.astype(jnp.int32)
        again = tree.where(attempt == 1, begin.base, h0)
        return _State(
            h=tree.where(over, again, tree.axpy(length, direction, base)),
            base=base,
            direction=direction,
            merit=jnp.where(better, merit, now.merit),
            rounding=jnp.where(better, rounding, now.rounding),
            length=jnp.where(over, 0, length),
            attempt=jnp.where(final, ATTEMPTS, attempt),
            scale=scale,
            mark=jnp.where(gained, merit, now.mark),
            since=jnp.where(over, k, since),
            k=k,
            noise=jnp.where(better, noise, now.noise),
            search=search,
        )

    h, zero = search.value, jnp.zeros_like(search.residual)
    begin = _State(
        h=h,
        base=h,
        direction=tree.scale(0.0, h),
        merit=search.merit,
        rounding=jnp.full_like(zero, jnp.inf),
        length=zero,
        attempt=jnp.zeros_like(k),
        scale=zero,
        mark=zero,
        since=k,
        k=k,
        noise=zero,
        search=search._replace(done=jnp.zeros_like(search.done)),
    )
    return lax.while_loop(unfinished, body, begin)


def _share(h: PyTree) -> PyTree:
    """A part of each entry, spread over (0, 1)."""

    def leaf(u: jax.Array) -> jax.Array:
        golden = 0.618034 * lax.iota(jnp.float32, u.size)
        return (golden - jnp.floor(golden)).reshape(u.shape).astype(u.dtype) * u

    return jax.tree.map(leaf, h)


def _least_squares(
    krylov: Krylov, beta: jax.Array, shift: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Y of least ‖β e₁ - (H + shift I) y‖, and the smallest singular value of that."""
    rows, columns = krylov.hessenberg.shape
    used = jnp.arange(columns, dtype=krylov.dim.dtype) < krylov.dim
    diagonal = jnp.where(used, shift, 0)[None] * jnp.eye(
        rows, columns, dtype=beta.dtype
    )
    u, s, vt = jnp.linalg.svd(krylov.hessenberg + diagonal, full_matrices=False)
    kept = used & (s > 10 * float(jnp.finfo(s.dtype).eps) * s[0])
    y = vt.T @ jnp.where(kept, beta * u[0] / jnp.where(kept, s, 1), 0)
    return y, jnp.min(jnp.where(used, s, jnp.inf))


class _State(NamedTuple):
    """What the Newton loop carries.

    Attributes:
      h: the iterate that is tried.
      base: where the step to it began.
      direction: of the step.
      merit: the size of the residual at ``base``.
      rounding: the size of a rounding error there.
      length: how far along the direction; zero at the beginning of an attempt.
      attempt: its number.
      scale: what shifts are relative to: the residual at the start of the attempt.
      mark: the residual that has to fall, and
      since: the evaluations and products when it did.
      k: evaluations of f and products with J.
      noise: the relative rounding error of f at ``base``, if above that of the state.
      search: what was found.
    """

    h: PyTree
    base: PyTree
    direction: PyTree
    merit: jax.Array
    rounding: jax.Array
    length: jax.Array
    attempt: jax.Array
    scale: jax.Array
    mark: jax.Array
    since: jax.Array
    k: jax.Array
    noise: jax.Array
    search: Search
