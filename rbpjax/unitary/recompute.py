"""Reverse mode through T steps without their history.

The forward pass keeps a number of states that does not depend on T; the backward pass
recomputes each state h_t when it is needed, and then takes one VJP of one step:

    g_t = (∂f/∂h)ᵀ g_{t+1},    θ̅ += (∂f/∂θ)ᵀ g_{t+1},    x̅_t = (∂f/∂x)ᵀ g_{t+1}.

How h_t is recomputed is the affair of a ``history``: see `rbpjax.unitary.history`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbpjax._core.batching import of_each_example
from rbpjax._core.sharding import vary_like
from rbpjax._core.step import check_like, close, convert, floats, merge, others
from rbpjax._core.tree import apart
from rbpjax.types import PyTree, StepFn
from rbpjax.unitary.history import (
    CHECKS,
    History,
    HistoryReport,
    Inverse,
    Kept,
    by_inverse,
    by_replay,
    fingerprint,
    spacing,
)


def recomputed_scan(
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h0: PyTree,
    *,
    history: History,
    length: int | None = None,
    emit: Callable[[PyTree, PyTree, PyTree], PyTree] | None = None,
    probe: HistoryReport | None = None,
) -> tuple[PyTree, PyTree]:
    """Runs h_{t+1} = f(params, inputs[t], h_t), to be differentiated without history.

    Value and gradient are those of `jax.lax.scan`; the compiled temporary memory of
    the gradient is the same for every T. Cost: T steps forward; backward one VJP a
    step, and what ``history`` needs to get its state back.

    Exact, up to the rounding that ``probe`` reports. Reverse mode; second order in
    reverse mode works with `Inverse` (that pass stores its history). Forward mode
    raises TypeError: use `jax.lax.scan`, whose forward mode has no history anyway.
    ``f``, its inverse and ``emit`` may close over traced arrays.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      params: pytree; integer and key leaves are passed on and get no gradient.
      inputs: pytree with a leading time axis [T, …] on every leaf, or None.
      h0: first state; a pytree of floating-point arrays.
      history: `Inverse` or `Replay`.
      length: T; needed if ``inputs`` has no leaf.
      emit: ``emit(params, inputs, h_next)``, a pytree of floating-point arrays to
        keep at each step, such as a read-out or a loss; stacked, hence [T, …].
      probe: `HistoryReport.zeros()`; its gradient is the report of this pass. Under
        `jax.vmap` each example has a probe of its own.

    Returns:
      The last state, like ``h0``, and the stacked results of ``emit`` or None.

    Raises:
      ValueError: for a missing or contradictory length, a ``history`` or ``probe`` that
        is none, a state that is not floating-point, an ``f`` that does not return the
        likes of ``h0``, or one probe for all examples of a `jax.vmap`.
      TypeError: from `jax.jvp` and what builds on it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.unitary import UnitaryCell, activation, history, recomputed_scan
      >>> cell = UnitaryCell(lattice=(16,), activation=activation.identity)
      >>> weights = cell.init(jax.random.key(0), radius=1, inputs=2)
      >>> back = history.Inverse(inverse=cell.inverse, anchors=4)
      >>> def loss(weights, probe=None):
      ...     params, inputs = cell.prepare(weights), jnp.ones((99, 2))
      ...     h, _ = recomputed_scan(
      ...         cell, params, inputs, cell.start(), history=back, probe=probe)
      ...     return jnp.sum(h.real)
      >>> probe = history.HistoryReport.zeros()
      >>> grads, report = jax.grad(loss, (0, 1))(weights, probe)
      >>> bool(report.drift < 1e-4)
      True

    References:
      Maclaurin, Duvenaud and Adams, "Gradient-based Hyperparameter Optimization
      through Reversible Learning", ICML 2015 (recomputing a trajectory backwards).
    """
    if not isinstance(history, History):
        raise ValueError(
            "`history` must be an Inverse or a Replay, such as Replay(slots=8); got "
            f"{history!r}. To store all states, use jax.lax.scan."
        )
    whole = isinstance(length, int) and not isinstance(length, bool)
    if length is not None and (not whole or length < 1):
        raise ValueError(
            f"`length` must be None or a Python int of at least one step; got "
            f"{length!r}."
        )
    if probe is not None and not isinstance(probe, HistoryReport):
        raise ValueError(
            "`probe` must be HistoryReport.zeros(), or what grad makes of it; got "
            f"{type(probe).__name__}."
        )
    inputs, h0 = jax.tree.map(jnp.asarray, (inputs, h0))
    steps = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(inputs)}
    if length is not None:
        steps.add(length)
    if len(steps) != 1 or 0 in steps:
        raise ValueError(
            "every leaf of `inputs` needs the same leading time axis of at least one "
            "step, equal to `length` if that is given; got sizes "
            f"{sorted(steps)} and length={length}."
        )
    (total,) = steps
    first = jax.tree.map(lambda x: x[0], inputs)
    closed, (f_consts, _, _), h0 = close(f, params, first, h0)
    h0 = vary_like(h0, h0)  # leaf by leaf; a scan's carry has one type
    emitted = convert(emit or (lambda *_: None), params, first, h0)
    if jax.tree.leaves(others(emitted.out)):
        raise ValueError(
            "`emit` must return a pytree of floating-point or complex arrays; got "
            f"{emitted.out}. Convert what it returns."
        )
    inverse_consts: tuple = ()
    if isinstance(history, Inverse):
        inverse = convert(history.inverse, params, first, h0)
        remedy = "It returns the state before the step."
        check_like(inverse.out, h0, "`inverse`'s output", "`h0`", remedy)
        inverse_consts = inverse.consts
        history = Inverse(
            inverse=lambda p, x, h: inverse.call(p.inverse, p.params, x, h),
            anchors=history.anchors,
        )

    def step(p: _Params, x: PyTree, h: PyTree) -> tuple[PyTree, PyTree]:
        h = closed((p.f, p.params, x), h)
        return h, emitted.call(p.emit, p.params, x, h)

    everything = (_Params(params, f_consts, emitted.consts, inverse_consts), inputs)
    if probe is None:
        probe = HistoryReport.zeros()
    else:
        probe = HistoryReport(of_each_example(probe.drift, (everything, h0)))
    run = _Run(step, history, total)
    return _scan(run, floats(everything), others(everything), h0, probe)


class _Params(NamedTuple):
    """What does not change with time: the parameters, and what functions close over."""

    params: PyTree
    f: tuple
    emit: tuple
    inverse: tuple


class _Run(NamedTuple):
    """What is static: the step that also emits, the history, the number of steps."""

    step: Callable[[_Params, PyTree, PyTree], tuple[PyTree, PyTree]]
    history: History
    total: int

    @property
    def anchors(self) -> int:
        """How many states are kept."""
        return self.history.anchors if isinstance(self.history, Inverse) else 1

    @property
    def stride(self) -> int:
        """How many steps lie between them."""
        return -(-self.total // self.anchors)


class _Saved(NamedTuple):
    """What the forward pass leaves for the backward pass."""

    floating: PyTree
    rest: PyTree
    end: PyTree
    kept: Kept
    probe: HistoryReport


class _Backward(NamedTuple):
    """The carry of the backward pass, at time t."""

    t: jax.Array
    state: PyTree  # the history's own
    g: PyTree
    params_bar: PyTree


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
    run: _Run, floating: PyTree, rest: PyTree, h0: PyTree, probe: HistoryReport
) -> tuple[PyTree, PyTree]:
    p, xs = merge(floating, rest)
    return jax.lax.scan(lambda h, x: run.step(p, x, h), h0, xs, run.total)


def _scan_fwd(
    run: _Run, floating: PyTree, rest: PyTree, h0: PyTree, probe: HistoryReport
) -> tuple[tuple[PyTree, PyTree], _Saved]:
    p, xs = merge(floating, rest)
    times = lambda count, x: jnp.broadcast_to(x, (count, *x.shape))
    anchors = jax.tree.map(lambda h: times(run.anchors, h), h0)
    kept = Kept(anchors, times(CHECKS, fingerprint(h0)))
    every = spacing(run.total)

    def keep(t: jax.Array, stride: int, kept: PyTree, now: PyTree) -> PyTree:
        """With what there is at time t, if that is a multiple of the stride."""
        place = t // stride
        put = lambda all_, one: all_.at[place].set(
            jnp.where(t % stride == 0, one, all_[place])
        )
        return jax.tree.map(put, kept, now)

    # Time is counted in the carry: an arange would be an array of T numbers.
    def body(
        carry: tuple[jax.Array, PyTree, Kept], x: PyTree
    ) -> tuple[tuple[jax.Array, PyTree, Kept], PyTree]:
        t, h, (anchors, marks) = carry
        if run.anchors > 1:
            anchors = keep(t, run.stride, anchors, h)
        if isinstance(run.history, Inverse):
            marks = keep(t, every, marks, fingerprint(h))
        h, y = run.step(p, x, h)
        return (t + 1, h, Kept(anchors, marks)), y

    start = (jnp.array(0), h0, kept)
    (_, h, kept), ys = jax.lax.scan(body, start, xs, run.total)
    floating, rest, probe = apart((floating, rest, probe))
    return (h, ys), _Saved(floating, rest, h, kept, probe)


def _scan_bwd(
    run: _Run, saved: _Saved, cotangents: tuple[PyTree, PyTree]
) -> tuple[PyTree, None, PyTree, HistoryReport]:
    (params, xs), (params_rest, xs_rest) = saved.floating, saved.rest
    g, y_bars = cotangents
    whole = merge(params, params_rest)
    slices = (xs, xs_rest, y_bars)

    def pull(slice_: PyTree, h: PyTree, g: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        """(θ̅, x̅, g) of one step at the state h."""
        x, x_rest, y_bar = slice_
        at = lambda p, x, h: run.step(merge(p, params_rest), merge(x, x_rest), h)
        return jax.vjp(at, params, x, h)[1]((g, y_bar))

    if isinstance(run.history, Inverse):
        inverse = run.history.inverse
        back = lambda slice_, h: inverse(whole, merge(slice_[0], slice_[1]), h)
        start, seek = by_inverse(back, saved.kept, run.stride, saved.end, run.total)
    else:
        forth = lambda slice_, h: run.step(whole, merge(slice_[0], slice_[1]), h)[0]
        h0 = jax.tree.map(lambda x: x[0], saved.kept.anchors)
        start, seek = by_replay(forth, slices, h0, run.history.slots)

    def body(now: _Backward, slice_: PyTree) -> tuple[_Backward, PyTree]:
        h, state = seek(now.t, slice_, now.state)
        more, x_bar, g = pull(slice_, h, now.g)
        params_bar = jax.tree.map(jnp.add, now.params_bar, more)
        return _Backward(now.t - 1, state, g, params_bar), x_bar

    zeros = jax.tree.map(jnp.zeros_like, params)
    last = _Backward(jnp.array(run.total - 1), start, g, zeros)
    end, x_bars = jax.lax.scan(body, last, slices, run.total, reverse=True)
    drift = saved.probe.drift
    inverted = isinstance(run.history, Inverse)
    drift = end.state.drift.astype(drift.dtype) if inverted else 0 * drift
    return (end.params_bar, x_bars), None, end.g, HistoryReport(drift)


_scan.defvjp(_scan_fwd, _scan_bwd)
