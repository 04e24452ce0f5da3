"""Reverse mode through T steps without their history.

The forward pass keeps a number of states that does not depend on T; the backward pass
recomputes each state h_t when it is needed, and then takes one VJP of one step:

    g_t = (∂f/∂h)ᵀ g_{t+1},    θ̅ += (∂f/∂θ)ᵀ g_{t+1},    x̅_t = (∂f/∂x)ᵀ g_{t+1}.

`Inverse` recomputes h_t from h_{t+1} by the inverse of the step. `Replay` serves steps
that have none: it replays the steps from a fixed number of snapshots.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rbpjax.types import PyTree, StepFn, check_count, strategy
from rbpjax.unitary.history import by_inverse, by_replay


class HistoryReport(NamedTuple):
    """How well the history was recomputed; read it as the gradient of the probe.

    Attributes:
      drift: largest distance, over the anchors, between the state recomputed
        backwards and the one the forward pass had there, relative to the larger of
        its norm and that of the last state. Zero for `Replay`, which repeats the
        forward steps; NaN if a state is not finite.
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
    states.

    Attributes:
      inverse: ``inverse(params, inputs, h)``, the h' with f(params, inputs, h') = h.
      anchors: number of stored states, evenly spaced; the first is h0.
    """

    inverse: StepFn
    anchors: int = 1

    def __post_init__(self) -> None:
        """Validates the static fields."""
        check_count(self, "anchors", self.anchors, 1)


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

    References:
      Griewank and Walther, "Algorithm 799: revolve", ACM Transactions on
      Mathematical Software 26, 2000.
    """

    slots: int = 32

    def __post_init__(self) -> None:
        """Validates the static fields."""
        check_count(self, "slots", self.slots, 1)


def recomputed_scan(
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h0: PyTree,
    *,
    history: Inverse | Replay,
    length: int | None = None,
    emit: Callable[[PyTree, PyTree, PyTree], PyTree] | None = None,
    probe: HistoryReport | None = None,
) -> tuple[PyTree, PyTree]:
    """Runs h_{t+1} = f(params, inputs[t], h_t), to be differentiated without history.

    Value and gradient are those of `jax.lax.scan`; the compiled temporary memory of
    the gradient is the same for every T.

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
      probe: `HistoryReport.zeros()`; its gradient is the report of this pass.

    Returns:
      The last state, like ``h0``, and the stacked results of ``emit`` or None.

    Raises:
      ValueError: for a missing or contradictory length, a state that is not
        floating-point, or an ``f`` that does not return the likes of ``h0``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.unitary import (
      ...     HistoryReport, Inverse, UnitaryCell, identity, recomputed_scan)
      >>> cell = UnitaryCell((16,), activation=identity)
      >>> weights = cell.init(jax.random.key(0), radius=1, inputs=2)
      >>> def loss(weights, probe=None):
      ...     h, _ = recomputed_scan(cell, cell.prepare(weights), jnp.ones((99, 2)),
      ...         cell.start(), history=Inverse(cell.inverse, anchors=4), probe=probe)
      ...     return jnp.sum(h.real)
      >>> grads, report = jax.grad(loss, (0, 1))(weights, HistoryReport.zeros())
      >>> print(bool(report.drift < 1e-12))
      True

    References:
      Maclaurin, Duvenaud and Adams, "Gradient-based Hyperparameter Optimization
      through Reversible Learning", ICML 2015 (recomputing a trajectory backwards).
    """
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
    _check_floats("h0", h0, "Counters belong into `inputs`.")
    examples = (params, jax.tree.map(lambda x: x[0], inputs), h0)
    f, f_consts, shape = _hoist(f, *examples)
    _check_like("f", shape, h0)
    emit, emit_consts, shape = _hoist(emit or (lambda *_: None), *examples)
    _check_floats("emit", shape, "Convert what it returns.")
    inverse_consts: Any = ()
    if isinstance(history, Inverse):
        inverse, inverse_consts, shape = _hoist(history.inverse, *examples)
        _check_like("inverse", shape, h0)
        history = Inverse(
            lambda p, x, h: inverse(p[3], p[0], x, h), anchors=history.anchors
        )

    def step(p: PyTree, x: PyTree, h: PyTree) -> tuple[PyTree, PyTree]:
        h = f(p[1], p[0], x, h)
        return h, emit(p[2], p[0], x, h)

    p = _split((params, f_consts, emit_consts, inverse_consts))
    x = _split(inputs)
    probe = HistoryReport.zeros() if probe is None else probe
    return _scan(step, history, total, (p[0], x[0]), (p[1], x[1]), h0, probe)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scan(
    step: Any, history: Any, total: int, floats: Any, rest: Any, h0: Any, probe: Any
) -> Any:
    p, xs = jax.tree.map(_merge, floats, rest, is_leaf=_is_none)
    return jax.lax.scan(lambda h, x: step(p, x, h), h0, xs, total)


def _scan_fwd(
    step: Any, history: Any, total: int, floats: Any, rest: Any, h0: Any, probe: Any
) -> Any:
    p, xs = jax.tree.map(_merge, floats, rest, is_leaf=_is_none)
    anchors = history.anchors if isinstance(history, Inverse) else 1
    stride = -(-total // anchors)
    kept = jax.tree.map(lambda h: jnp.broadcast_to(h, (anchors, *h.shape)), h0)

    # Time is counted in the carry: an arange would be an array of T numbers.
    def body(carry: Any, x: Any) -> Any:
        t, h, kept = carry
        if anchors > 1:
            keep = lambda all_, one: all_.at[t // stride].set(
                jnp.where(t % stride == 0, one, all_[t // stride])
            )
            kept = jax.tree.map(keep, kept, h)
        h, y = step(p, x, h)
        return (t + 1, h, kept), y

    (_, h, kept), ys = jax.lax.scan(body, (jnp.array(0), h0, kept), xs, total)
    return (h, ys), (floats, rest, h, kept, probe)


def _scan_bwd(
    step: Any, history: Any, total: int, residuals: Any, cotangents: Any
) -> Any:
    floats, rest, end, kept, probe = residuals
    g, y_bars = cotangents
    params = jax.tree.map(_merge, floats[0], rest[0], is_leaf=_is_none)

    def pull(slice_: Any, h: PyTree, g: PyTree) -> Any:
        """(θ̅, x̅, g) of one step at the state h."""
        x, x_rest, y_bar = slice_

        def at(p: Any, x: Any, h: Any) -> Any:
            p, x = jax.tree.map(_merge, (p, x), (rest[0], x_rest), is_leaf=_is_none)
            return step(p, x, h)

        return jax.vjp(at, floats[0], x, h)[1]((g, y_bar))

    slices = (floats[1], rest[1], y_bars)
    join = lambda slice_: jax.tree.map(_merge, slice_[0], slice_[1], is_leaf=_is_none)
    if isinstance(history, Inverse):
        back = lambda slice_, h: history.inverse(params, join(slice_), h)
        stride = -(-total // history.anchors)
        start, seek = (end, jnp.zeros(())), by_inverse(back, kept, stride, end)
    else:
        forth = lambda slice_, h: step(params, join(slice_), h)[0]
        start, seek = by_replay(forth, slices, kept, history.slots)

    def body(carry: Any, slice_: Any) -> Any:
        t, state, g, p_bar = carry
        h, state = seek(t, slice_, state)
        p_add, x_bar, g = pull(slice_, h, g)
        return (t - 1, state, g, jax.tree.map(jnp.add, p_bar, p_add)), x_bar

    p_bar = jax.tree.map(jnp.zeros_like, floats[0])
    (_, state, g, p_bar), x_bars = jax.lax.scan(
        body, (jnp.array(total - 1), start, g, p_bar), slices, total, reverse=True
    )
    drift = state[1] if isinstance(history, Inverse) else 0 * probe.drift
    return (p_bar, x_bars), None, g, HistoryReport(drift.astype(probe.drift.dtype))


_scan.defvjp(_scan_fwd, _scan_bwd)


def _check_floats(name: str, tree: PyTree, remedy: str) -> None:
    kinds = jax.tree.map(lambda x: x.dtype, tree)
    if not all(jnp.issubdtype(kind, jnp.inexact) for kind in jax.tree.leaves(kinds)):
        raise ValueError(
            f"`{name}` must be a pytree of floating-point arrays; got {kinds}. {remedy}"
        )


def _check_like(name: str, shape: PyTree, h0: PyTree) -> None:
    spec = lambda x: (x.shape, str(x.dtype))
    got, expected = jax.tree.map(spec, shape), jax.tree.map(spec, h0)
    if got != expected:
        raise ValueError(
            f"`{name}` must return the same structure, shapes and dtypes as `h0`; "
            f"got {got} for {expected}."
        )


def _is_none(x: object) -> bool:
    return x is None


def _merge(a: Any, b: Any) -> Any:
    return b if a is None else a


def _split(tree: PyTree) -> tuple[PyTree, PyTree]:
    """The tree with only its differentiable leaves, and with only the others."""
    is_float = lambda x: jnp.issubdtype(jnp.asarray(x).dtype, jnp.inexact)
    floats = jax.tree.map(lambda x: x if is_float(x) else None, tree)
    return floats, jax.tree.map(lambda x: None if is_float(x) else x, tree)


def _hoist(fun: Any, *examples: Any) -> tuple[Any, Any, Any]:
    """``fun`` with all arrays it closes over as a first argument."""
    closed, shape = jax.make_jaxpr(fun, return_shape=True)(*examples)
    tree = jax.tree.structure(shape)

    def hoisted(consts: Any, *args: Any) -> Any:
        out = jax.core.eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(tree, out)

    return hoisted, closed.consts, shape
