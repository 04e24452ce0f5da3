"""The search for a fixed point: the best state so far, and whether to go on."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbpjax._core import sharding, tree
from rbpjax.fixed_point.iterate import Look, leaf_eps, ratio, status_of
from rbpjax.types import PyTree, Solution, Status

STUCK = 40
"""Evaluations without a better iterate that end a search that stays where it is: so
many at least, and as many as there were up to the best."""
PHASES = 20
"""Looks among them, at least."""


class Leaves(NamedTuple):
    """What is known of the leaves of a state that has several.

    A leaf that tends to zero, as a momentum does, has a relative residual that does not
    fall. It is measured by what passes through f to it instead: by the size that it has
    where its terms do not cancel. That takes an evaluation of f at a state that differs
    in the last places, once another leaf is at rest or the search is stuck.

    Attributes:
      peak: the largest size that each leaf has had.
      flow: what passes through f to each leaf; zero if not known yet.
      size: the size that each leaf had then.
      asks: whether the next evaluation of f is for ``flow``.
      asked: the number of evaluations for it.
      stuck: whether residuals stay where they are.
    """

    peak: jax.Array
    flow: jax.Array
    size: jax.Array
    asks: jax.Array
    asked: jax.Array
    stuck: jax.Array

    @classmethod
    def begin(cls, zeros: jax.Array) -> Leaves:
        """Before the first look."""
        never = zeros[0] > 0
        return cls(zeros, zeros, zeros, never, never.astype(jnp.int32), never)

    def residuals(self, look: Look, eps: jax.Array) -> jax.Array:
        """Residuals relative to ``flow`` where that is what counts, else infinite.

        What has faded counts by its size, which is the error if the limit is zero. What
        is stuck, or rounding, counts by its residual: there is no smaller one.
        """
        least = self.stuck | (look.change <= 4 * eps * self.flow)
        error = jnp.where(least, look.change, jnp.maximum(look.change, look.size))
        counts = (self.flow > 0) & ~self._outdated(look)
        counts &= least | (look.size <= self.peak / FADED)
        return jnp.where(counts, ratio(error, self.flow), jnp.inf)

    def looked(self, look: Look, rests: jax.Array, stuck: jax.Array) -> Leaves:
        """After a look; ``rests``: which leaves meet the tolerance."""
        new = (self.asked == 0) | jnp.any(self._outdated(look) & ~rests)
        asks = new & ((jnp.any(rests) & ~jnp.all(rests)) | stuck)
        return self._replace(
            peak=jnp.maximum(self.peak, look.size),
            asks=asks,
            stuck=self.stuck | stuck,
        )

    def answered(self, flow: jax.Array, look: Look) -> Leaves:
        """With ``flow``, as it is at that look."""
        return self._replace(
            flow=jnp.where(jnp.isfinite(flow), flow, 0),
            size=look.size,
            asks=self.asks & False,
            asked=self.asked + 1,
        )

    def _outdated(self, look: Look) -> jax.Array:
        """Which leaves have become so small that ``flow`` may have changed, too."""
        return look.size < self.size / FADED


FADED = 100
"""By how much a leaf has to shrink before it may count as zero."""


class Search(NamedTuple):
    """How the search for a fixed point stands.

    Attributes:
      value: the best state of those looked at.
      num_steps: steps taken to reach it; negative before the first look.
      residual: its relative residual.
      merit: the size of its residual, by which it is the best.
      units: the size of each leaf when it was first looked at and not zero, or what
        passes through f to it, if that is known and larger.
      last: the relative residual at the last look.
      last_merit: the size of the residual there, by which its rate is measured: beside
        a leaf that tends to zero the relative one does not fall.
      done: whether the last look met the tolerance.
      good: whether there is hope: residuals neither stay where they are nor explode.
      lost: looks since the best.
      leaves: what is known of them, if there are several.
    """

    value: PyTree
    num_steps: jax.Array
    residual: jax.Array
    merit: jax.Array
    units: jax.Array
    last: jax.Array
    last_merit: jax.Array
    done: jax.Array
    good: jax.Array
    lost: jax.Array
    leaves: Leaves | None

    @classmethod
    def begin(cls, h0: PyTree) -> Search:
        """Before the first look."""
        infinity = jnp.array(jnp.inf, tree.real_dtype(h0))
        infinity = sharding.vary_like(infinity, h0)
        zeros = jnp.stack([0 / infinity for _ in jax.tree.leaves(h0)])
        never = infinity < 0
        before = never.astype(jnp.int32) - 1
        sizes = (infinity, infinity, zeros, infinity, infinity)
        leaves = Leaves.begin(zeros) if len(zeros) > 1 else None
        return cls(h0, before, *sizes, never, ~never, before + 1, leaves)

    def residuals_at(self, look: Look, h: PyTree) -> jax.Array:
        """The relative residuals of the leaves, of a look at ``h``."""
        relative = look.relative(self.units, leaf_eps(h))
        if self.leaves is None:
            return relative
        return jnp.minimum(relative, self.leaves.residuals(look, leaf_eps(h)))

    def residual_at(self, look: Look, h: PyTree) -> jax.Array:
        """The largest of them."""
        return jnp.max(self.residuals_at(look, h))

    def to_evaluate(self, h: PyTree, base: PyTree) -> PyTree:
        """Where to evaluate f: at ``h``, or near ``base`` for what passes through f."""
        if self.leaves is None:
            return h
        nudged = tree.add(base, tree.last_places(base))
        return tree.where(self.leaves.asks, nudged, h)

    def answered(self, nudged: PyTree, image: PyTree, h: PyTree) -> Search:
        """With the images of ``h`` and of its neighbour."""
        assert self.leaves is not None
        flow = Look.at(nudged, image).change / leaf_eps(h)
        leaves = self.leaves.answered(flow, Look.at(image, h))
        # From now on leaves are measured in other units.
        units = jnp.maximum(self.units, leaves.flow)
        return self._replace(leaves=leaves, units=units)

    def looked(
        self,
        look: Look,
        h: PyTree,
        num_steps: jax.Array,
        done: jax.Array,
        tol: float | jax.Array,
        patience: int = STUCK,
    ) -> Search:
        """With the state ``h`` looked at; ``done``: whether it meets the tolerance.

        ``patience``: evaluations without a better iterate that are not too many.

        The best has the smallest residual, in absolute terms, or is the answer. The
        start is not preferred to what came of it, unless that is far worse: nothing was
        computed there.
        """
        residuals = self.residuals_at(look, h)
        residual = jnp.max(residuals)
        units = jnp.where(self.units == 0, look.size, self.units)
        merit = look.merit(units)
        bonus = jnp.where(self.num_steps == 0, AWAY, 1)
        better = done | (merit < bonus * self.merit)  # False for NaN
        best = jnp.where(better, num_steps, self.num_steps)
        lost = jnp.where(better, 0, self.lost + 1)
        # Residuals that oscillate as they fall are not stuck: the deeper they are, the
        # longer it may take to the next dip, and not every step is looked at.
        waited = (num_steps - best > jnp.maximum(patience, best)) & (lost >= PHASES)
        stuck = waited & (merit <= AWAY * self.merit)
        leaves = self.leaves
        if leaves is not None:
            # Stuck once, leaves are measured by what passes through f; then it counts.
            first = stuck & ~leaves.stuck
            leaves = leaves.looked(look, residuals <= tol, first & ~done)
            stuck &= ~first
        eps = float(jnp.finfo(residual.dtype).eps)
        return Search(
            tree.where(better, h, self.value),
            best,
            jnp.where(better, residual, self.residual),
            jnp.where(better, merit, self.merit),
            units,
            residual,
            merit,
            done,
            (merit * eps <= self.merit) & ~stuck,  # False for NaN
            lost,
            leaves,
        )

    def rate(self, look: Look) -> tuple[jax.Array, jax.Array]:
        """By what residuals fell since the last look, and whether that means anything.

        Not at the first look, and not at rounding.
        """
        merit = look.merit(jnp.where(self.units == 0, look.size, self.units))
        eps = float(jnp.finfo(merit.dtype).eps)
        measured = jnp.isfinite(self.last_merit) & (merit > 8 * eps)
        return ratio(merit, self.last_merit), measured

    def unfinished(self, k: jax.Array, max_steps: int | jax.Array) -> jax.Array:
        """Whether to go on after ``k`` evaluations."""
        return ~self.done & (k <= max_steps) & self.good

    def solution(
        self, k: jax.Array, tol: float | jax.Array, max_steps: int | jax.Array
    ) -> Solution:
        """What a solver returns after ``k`` evaluations."""
        failed = status_of(self.residual, tol, k > max_steps, False)
        status = jnp.where(self.done, jnp.int32(Status.CONVERGED), failed)
        steps = jnp.maximum(self.num_steps, 0)
        return Solution(self.value, steps, k, self.residual, status, self.done)


AWAY = 10.0
"""A residual larger by so much than the best: the solver moves away from it."""
