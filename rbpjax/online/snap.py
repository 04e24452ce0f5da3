"""SnAp-n: the influence that a few steps of a sparse recurrence carry."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rbpjax.online.cell import (
    PreactivationCell,
    UnitJacobians,
    check_cell,
    kernel_to_params,
    unit_jacobians,
)
from rbpjax.online.estimator import (
    Carry,
    Estimator,
    LossFn,
    OnlineOutput,
    check_count,
    check_real,
    checked,
    no_noise,
    observe,
    start,
)
from rbpjax.types import PyTree


def snap(
    cell: PreactivationCell,
    loss: LossFn,
    *,
    order: int,
    connections: np.ndarray | None = None,
) -> Estimator:
    """Streams gradients with the sparse n-step approximation of the influence.

    Of G = ∂h/∂W the entries are kept that can be other than zero within ``order``
    steps after W has acted: those of a unit's row of W on itself, for order 1, on the
    units that it is connected to, for order 2, and so on. RTRL's recursion is carried
    for them, all other entries are dropped:

        G ← (J G + F) ∘ M,    gradient = ∂loss/∂θ + δ G,

    where M has the pattern of (I + C)ⁿ⁻¹ F for order n and connections C.

    Truncated (biased), as a rule the less the higher the order. Exact where M holds all
    that can be reached: where no unit is further than order - 1 steps behind one that
    it follows from. Order 1 is ``snap1``. No noise. Cost: with E entries of
    (I + C)ⁿ⁻¹ and at most d connections to a unit, time O(E d a k S²) and memory
    O(E a k S) for a gates, k features and S state leaves, plus the O(n k) of ∂ĥ/∂h,
    whatever the length of the run. Dense connections make it RTRL from order 2 on, at
    RTRL's cost. Works under ``jit``, ``vmap`` and ``scan``. A run can be differentiated
    in forward and reverse mode; reverse mode stores its history.

    Args:
      cell: step function as a ``PreactivationCell``, whose ``kernel`` is sparse, such
        as ``lambda params: (mask * params["W"])[None]``.
      loss: ``loss(params, h, y) -> scalar`` at the new state.
      order: n, a number of steps.
      connections: C, an array of bools ``[units, units]``: whether a unit (row) sees
        the state of another (column). The rest of J is taken for zero. None connects
        all units.

    Returns:
      An ``Estimator``. Its influence has the kept entries, ``[S, E, a, k]``; it needs
      no noise.

    Raises:
      ValueError: ``cell`` is no ``PreactivationCell``, ``order`` no positive int, or
        ``connections`` no square array of bools; from ``init`` if it is of another
        number of units; from ``init`` and ``step`` as in ``Estimator``.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from rbpjax import online
      >>> ring = np.roll(np.eye(4, dtype=bool), 1, 0)  # each unit sees the one before
      >>> cell = online.PreactivationCell(
      ...     kernel=lambda W: jnp.where(jnp.asarray(ring), W, 0.0)[None],
      ...     features=lambda x, h: h + x,
      ...     activate=lambda z, h: jnp.tanh(z[0]),
      ... )
      >>> loss = lambda W, h, y: jnp.sum(h)
      >>> est = online.snap(cell, loss, order=2, connections=ring)
      >>> carry = est.init(jnp.ones((4, 4)), jnp.zeros(4))
      >>> carry.influence.shape  # each row of W on its unit and the next one
      (1, 8, 1, 4)

    References:
      Menick et al., "A Practical Sparse Approximation for Real Time Recurrent
      Learning", https://arxiv.org/abs/2006.07232, section 3.
    """
    check_cell(cell)
    check_count("order", order)
    if connections is not None:
        connections = _as_connections(connections)

    def init(params: PyTree, h0: PyTree) -> Carry:
        h0 = start(params, h0)
        check_real(h0, "h0")
        kernel = cell.kernel(params)
        gates, units, size = kernel.shape
        kept = len(_plan(units, order, connections).unit)
        shape = (len(jax.tree.leaves(h0)), kept, gates, size)
        return Carry(h0, jnp.zeros(shape, kernel.dtype))

    def step(
        params: PyTree, carry: Carry, x: PyTree, y: PyTree, noise: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        del noise
        here = observe(cell, loss, params, carry.h, x, y)
        old, dtype = carry.influence, carry.influence.dtype
        kernel = cell.kernel(params)
        plan = _plan(kernel.shape[1], order, connections)
        cast = lambda j: j.astype(dtype)
        inside = jax.tree.map(cast, unit_jacobians(cell, params, x, carry.h))
        jac = cast(_jacobian(cell, kernel, x, carry.h, inside, plan))

        def add(total: jax.Array, at: tuple) -> tuple[jax.Array, None]:
            pair, source = at
            term = jnp.einsum("tse,seak->teak", jac[:, :, pair], old[:, source])
            return total + term, None

        influence, _ = jax.lax.scan(
            add, jnp.zeros_like(old), (plan.pairs, plan.sources)
        )
        immediate = jnp.einsum("tia,k->tiak", inside.gates, inside.features)
        influence = influence.at[:, plan.own].add(immediate)

        delta = cast(jnp.stack(jax.tree.leaves(here.delta)))
        by_entry = jnp.einsum("te,teak->eak", delta[:, plan.unit], influence)
        by_row = jnp.zeros((kernel.shape[1], *by_entry.shape[1:]), dtype)
        by_row = by_row.at[plan.row].add(by_entry)
        total = kernel_to_params(cell, params, jnp.swapaxes(by_row, 0, 1))
        out = OnlineOutput(here.loss, optax.tree.add(here.direct, total))
        return Carry(here.h_next, influence), out

    return checked(init, no_noise, step)


class _Plan(NamedTuple):
    """Which entries are kept, and of which the next ones are made; all of NumPy.

    Attributes:
      unit: of each of the E kept entries the unit that is influenced.
      row: of each the row of W that influences it.
      own: the n of them in which both are the same, in the units' order.
      seeing: of each connection, a unit with itself among them, who sees.
      seen: and who is seen.
      pairs: ``[d, E]``, the connections through which an entry is made; one more than
        the last for none.
      sources: ``[d, E]``, the entry that comes through each of them.
    """

    unit: np.ndarray
    row: np.ndarray
    own: np.ndarray
    seeing: np.ndarray
    seen: np.ndarray
    pairs: np.ndarray
    sources: np.ndarray


def _plan(units: int, order: int, connections: np.ndarray | None) -> _Plan:
    """The entries of units that have these connections."""
    if connections is None:
        connections = np.ones((units, units), bool)
    if len(connections) != units:
        raise ValueError(
            f"`connections` must be [units, units] for the {units} units of the cell; "
            f"got {list(connections.shape)}."
        )
    direct = connections | np.eye(units, dtype=bool)
    kept = np.eye(units, dtype=bool)
    for _ in range(min(order - 1, units)):  # no way is longer than that
        kept = (direct.astype(int) @ kept) > 0
    unit, row = np.nonzero(kept)
    seeing, seen = np.nonzero(direct)
    entry = np.full((units, units), -1)
    entry[unit, row] = np.arange(len(unit))

    # Of an entry (u, i) those (v, i) with u connected to v, padded to equal numbers.
    ways = [
        np.flatnonzero(direct[u] & kept[:, i]) for u, i in zip(unit, row, strict=True)
    ]
    pair = np.zeros((units, units), int)
    pair[seeing, seen] = np.arange(len(seeing))
    most = max(map(len, ways))
    pairs = np.full((most, len(unit)), len(seeing))
    sources = np.zeros((most, len(unit)), int)
    for e, (u, i, through) in enumerate(zip(unit, row, ways, strict=True)):
        pairs[: len(through), e] = pair[u, through]
        sources[: len(through), e] = entry[through, i]
    own = entry[np.arange(units), np.arange(units)]
    return _Plan(unit, row, own, seeing, seen, pairs, sources)


def _jacobian(
    cell: PreactivationCell,
    kernel: jax.Array,
    x: PyTree,
    h: PyTree,
    inside: UnitJacobians,
    plan: _Plan,
) -> jax.Array:
    """J at the connections, ``[S, S, connections + 1]``, new state first; last zero."""
    leaves, treedef = jax.tree.flatten(h)

    def features(stacked: jax.Array) -> jax.Array:
        rows = zip(stacked, leaves, strict=True)
        parts = [row.astype(leaf.dtype) for row, leaf in rows]
        return cell.features(x, treedef.unflatten(parts))

    across = jax.jacfwd(features)(jnp.stack(leaves))  # [k, S, n]
    dtype = inside.gates.dtype
    to_gates = jnp.einsum(
        "apk,ksp->asp",
        kernel[:, plan.seeing].astype(dtype),
        across[:, :, plan.seen].astype(dtype),
    )
    jac = jnp.einsum("tpa,asp->tsp", inside.gates[:, plan.seeing], to_gates)
    alone = np.flatnonzero(plan.seeing == plan.seen)  # in the units' order
    jac = jac.at[:, :, alone].add(inside.local)
    return jnp.pad(jac, ((0, 0), (0, 0), (0, 1)))


def _as_connections(connections: np.ndarray) -> np.ndarray:
    """As a NumPy array; ValueError unless square and of bools."""
    if isinstance(connections, jax.core.Tracer):
        raise ValueError(
            "`connections` must be known while tracing; got a tracer. Close over a "
            "NumPy array."
        )
    found = np.asarray(connections)
    if found.dtype != bool or found.ndim != 2 or found.shape[0] != found.shape[1]:
        raise ValueError(
            "`connections` must be an array of bools, [units, units]; got "
            f"{found.dtype}{list(found.shape)}. For weights take weights != 0."
        )
    return found
