"""How the backward pass gets its states: a public namespace of histories.

* `Inverse` recomputes h_t from h_{t+1} by the inverse of the step;
* `Replay` serves steps that have none: it replays them from a few snapshots;
* `HistoryReport` says how well the history was recomputed.

Example:
  >>> from rbpjax.unitary import history
  >>> history.Replay(slots=8)
  Replay(slots=8)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbpjax._core.sharding import vary_like
from rbpjax._core.strategy import count, function, strategy
from rbpjax._core.tree import max_abs, real_dtype
from rbpjax.types import PyTree, StepFn

__all__ = ["HistoryReport", "Inverse", "Replay"]


class HistoryReport(NamedTuple):
    """How well the history was recomputed; read it as the gradient of the probe.

    Attributes:
      drift: largest distance, over time and the leaves, between a state recomputed
        backwards and the one the forward pass had there, relative to the larger of the
        largest entries of this leaf there and in the last state; a float scalar. At
        anchors it is the largest entry of the difference, at up to 1,024 times between
        them the root mean square, estimated from one random sum of the entries that
        both passes take. Zero for `Replay`, which repeats the forward steps, and where
        no recomputed state was used (``anchors`` = T); NaN if a state is not finite.

    Example:
      >>> from rbpjax.unitary import history
      >>> float(history.HistoryReport.zeros().drift)
      0.0
    """

    drift: jax.Array

    @classmethod
    def zeros(cls) -> HistoryReport:
        """The probe to pass to `recomputed_scan`."""
        return cls(jnp.zeros(()))


@strategy
class Inverse:
    """Recomputes the states backwards with the inverse of the step.

    Exact up to rounding, which a backward step multiplies by the norm of ∂f⁻¹: not at
    all for a linear unitary cell, by up to (1 + r²)^(3/2) for `saturate` at amplitude
    r. Where it builds up, `anchors` > 1 restarts from states that were stored, and
    `HistoryReport.drift` says how large it was.
    Cost of the backward pass: one inverse and one VJP a step; memory: ``anchors``
    states. AD modes: reverse, to second order.

    Attributes:
      inverse: ``inverse(params, inputs, h)``, the h' with f(params, inputs, h') = h.
      anchors: number of stored states, evenly spaced; the first is h0.

    Raises:
      ValueError: if a field is not of its kind or range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.unitary import history, recomputed_scan
      >>> f = lambda params, inputs, h: params * h + inputs
      >>> inverse = lambda params, inputs, h: (h - inputs) / params
      >>> back = history.Inverse(inverse=inverse)
      >>> loss = lambda w: recomputed_scan(
      ...     f, w, jnp.ones(3), jnp.array(0.0), history=back)[0]
      >>> round(float(jax.grad(loss)(jnp.array(2.0))), 3)  # d/dw (1 + w + w²)
      5.0

    References:
      Maclaurin, Duvenaud and Adams, "Gradient-based Hyperparameter Optimization
      through Reversible Learning", ICML 2015 (recomputing a trajectory backwards).
    """

    inverse: StepFn = function(
        meaning="the inverse of the step", call="inverse(params, inputs, h)"
    )
    anchors: int = count(default=1)


@strategy
class Replay:
    """Replays the steps from at most ``slots`` snapshots; needs no inverse.

    Exact: each state is computed by the very operations of the forward pass. The
    snapshots sit on the binomial schedule, which is optimal: with s slots, r replays
    of each step suffice for T ≤ C(s + r, s) (s = 32: r = 2 for 561 steps, 4 for
    58,905). Memory: ``slots`` states. With one slot the cost is T²/2 steps.
    The backward pass has a `while_loop`: first-order reverse mode only.

    Attributes:
      slots: number of snapshots, h0 included.

    Raises:
      ValueError: if ``slots`` is no Python int of at least 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.unitary import history, recomputed_scan
      >>> f = lambda params, inputs, h: params * h + inputs
      >>> loss = lambda w: recomputed_scan(
      ...     f, w, jnp.ones(3), jnp.array(0.0), history=history.Replay(slots=2))[0]
      >>> round(float(jax.grad(loss)(jnp.array(2.0))), 3)  # d/dw (1 + w + w²)
      5.0

    References:
      Griewank and Walther, "Algorithm 799: revolve", ACM Transactions on
      Mathematical Software 26, 2000.
    """

    slots: int = count(default=32)


History = Inverse | Replay

Seek = Callable[[jax.Array, PyTree, PyTree], tuple[PyTree, PyTree]]
"""``seek(t, slice, state) -> (h_t, state)``, called with t = T-1, …, 0 in turn.

``slice`` holds what the step of time t was given, ``state`` is the seeker's own.
"""


CHECKS = 1024
"""Times at which states are compared, at most; as many numbers a leaf are kept."""


def spacing(total: int) -> int:
    """Steps from one such time to the next.

    A power of two from two on: by other numbers the compiler divides in other ways, and
    the memory would depend on ``total`` by some bytes.
    """
    return max(2, 1 << (-(-total // CHECKS) - 1).bit_length())


def fingerprint(h: PyTree) -> jax.Array:
    """A random sum of the entries of each leaf: an error adds about its norm to it.

    The same sum wherever it is taken, real, float32 at least, of shape [leaves].
    """

    def leaf(x: jax.Array) -> jax.Array:
        parts = jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x
        signs = jax.random.rademacher(jax.random.key(0), parts.shape, jnp.int8)
        wide = real_dtype(x)
        return jnp.sum(signs.astype(wide) * parts.astype(wide))

    sums = [leaf(x) for x in jax.tree.leaves(h)]
    return jnp.stack([s.astype(real_dtype(h)) for s in sums])


class Anchored(NamedTuple):
    """The state of the way back by the inverse: the state after, the drift so far."""

    after: PyTree
    drift: jax.Array


class Kept(NamedTuple):
    """What the forward pass leaves for the way back.

    Attributes:
      anchors: states at multiples of a stride, leaves ``[anchors, …]``.
      marks: fingerprints at multiples of another, ``[checks, leaves]``.
    """

    anchors: PyTree
    marks: jax.Array


def by_inverse(
    back: Callable[[PyTree, PyTree], PyTree],
    kept: Kept,
    stride: int,
    end: PyTree,
    total: int,
) -> tuple[Anchored, Seek]:
    """Finds h_t from h_{t+1} = ``end`` for the last t; anchors at multiples of stride.

    ``back(slice, h_{t+1})`` is h_t.
    """
    every = spacing(total)

    def seek(t: jax.Array, slice_: PyTree, state: Anchored) -> tuple[PyTree, Anchored]:
        drift = state.drift
        h = back(slice_, state.after)
        # A state between anchors, which is used as it is.
        lost = fingerprint(h) - kept.marks[t // every]
        between = (t % every == 0) & (t % stride != 0)
        error = _relative(jnp.abs(lost) / _root_sizes(h, lost), h, end)
        error = error.astype(drift.dtype)
        drift = jnp.where(between, jnp.maximum(drift, error), drift)
        anchor = jax.tree.map(lambda x: x[t // stride], kept.anchors)
        gap = _gap(h, anchor, end).astype(drift.dtype)
        here = t % stride == 0
        # The state compared is replaced; those between it and the next anchor, which
        # were used, are as good. Where there are none, there is nothing to report.
        told = here & (jnp.minimum(stride, total - t) > 1)
        h = jax.tree.map(lambda a, b: jnp.where(here, a, b), anchor, h)
        drift = jnp.where(told, jnp.maximum(drift, gap), drift)
        return h, Anchored(h, drift)

    return Anchored(end, vary_like(jnp.zeros(()), end)), seek


class Snapshots(NamedTuple):
    """A stack of states on the way back by replaying: those up to ``top`` are in use.

    Attributes:
      top: place of the latest one.
      times: their times, ``[slots]``.
      states: the states, leaves ``[slots, …]``.
    """

    top: jax.Array
    times: jax.Array
    states: PyTree


class Advance(NamedTuple):
    """The loop from a snapshot to the state sought: where we are, and the stack."""

    h: PyTree
    time: jax.Array
    snapshots: Snapshots


def by_replay(
    forth: Callable[[PyTree, PyTree], PyTree], slices: PyTree, h0: PyTree, slots: int
) -> tuple[Snapshots, Seek]:
    """Finds h_t from the latest snapshot before t, and sets others on the way.

    ``forth(slice, h_t)`` is h_{t+1}; ``slices`` have leaves ``[T, …]``.
    """

    def advance(h: PyTree, first: jax.Array, last: jax.Array) -> PyTree:
        one = lambda t, h: forth(jax.tree.map(lambda x: x[t], slices), h)
        return jax.lax.fori_loop(first, last, one, h)

    def hop(steps: jax.Array, free: jax.Array) -> jax.Array:
        """How far from a snapshot to set the next, with ``steps`` to be reversed."""
        # With s snapshots and r replays C(s + r, s) steps are reversible; the first
        # hop is C(s + r - 1, s), that is the fraction r / (s + r) of them.
        n, s = steps.astype(float), (free + 1).astype(float)
        grow = lambda v: (v[0] + 1, v[1] * (s + v[0] + 1) / (v[0] + 1))
        r, _ = jax.lax.while_loop(lambda v: v[1] < n, grow, (0 * s, 0 * s + 1))
        far = jnp.ceil(n * r / (s + r)).astype(steps.dtype)
        return jnp.where(free > 0, jnp.clip(far, 1, steps - 1), steps - 1)

    def push(t: jax.Array, now: Advance) -> Advance:
        top, times, states = now.snapshots
        free = slots - 1 - top
        later = now.time + hop(t - now.time + 1, free)
        h = advance(now.h, now.time, later)
        top = jnp.minimum(top + 1, slots - 1)
        # With no slot free we are at t, and the state is used without being stored.
        put = lambda all_, one: all_.at[top].set(jnp.where(free > 0, one, all_[top]))
        stack = Snapshots(top, put(times, later), jax.tree.map(put, states, h))
        return Advance(h, later, stack)

    def seek(t: jax.Array, _: PyTree, state: Snapshots) -> tuple[PyTree, Snapshots]:
        h = jax.tree.map(lambda x: x[state.top], state.states)
        at = jax.lax.while_loop(
            lambda now: now.time < t,
            lambda now: push(t, now),
            Advance(h, state.times[state.top], state),
        )
        top, times, states = at.snapshots
        # A snapshot at t is spent now; the earlier ones serve the steps before.
        top = jnp.where(times[top] == t, jnp.maximum(top - 1, 0), top)
        return at.h, Snapshots(top, times, states)

    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (slots, *x.shape)), h0)
    return Snapshots(jnp.array(0), jnp.zeros(slots, int), states), seek


def _gap(h: PyTree, anchor: PyTree, end: PyTree) -> jax.Array:
    """The largest relative distance of a leaf, by largest entries: no squares."""
    pairs = zip(jax.tree.leaves(h), jax.tree.leaves(anchor), strict=True)
    gap = jnp.stack([max_abs(a - b) for a, b in pairs])
    return _relative(gap, anchor, end)


def _relative(gap: jax.Array, h: PyTree, end: PyTree) -> jax.Array:
    """The largest of the leaves' distances from ``h``, relative to largest entries."""
    # A start at zero has no size of its own to compare with.
    pairs = zip(jax.tree.leaves(h), jax.tree.leaves(end), strict=True)
    scale = jnp.stack([jnp.maximum(max_abs(a), max_abs(b)) for a, b in pairs])
    scale = jnp.where(scale == 0, jnp.max(scale), scale)  # nor has a leaf at zero
    gap = gap.astype(scale.dtype)
    return jnp.max(jnp.where(gap == 0, 0.0, gap / scale))


def _root_sizes(h: PyTree, like: jax.Array) -> jax.Array:
    """√n of each leaf of n numbers: an error's norm over it is its root mean square."""
    sizes = [max(x.size, 1.0) ** 0.5 for x in jax.tree.leaves(h)]
    return jnp.array(sizes, like.dtype)
