"""NoBackTrack: one sign and one scale for each unit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from rbpjax._core.norm import norm, norms
from rbpjax._core.sharding import vary_like
from rbpjax._core.step import floats
from rbpjax._core.tree import axpy
from rbpjax.online.balance import Factors, balance
from rbpjax.online.estimator import (
    Carry,
    Estimator,
    LossFn,
    Observed,
    OnlineOutput,
    check_shapes,
    checked,
    observe,
)
from rbpjax.online.metric import Rows, arrange, check_rows
from rbpjax.online.rank_one import (
    RankOne,
    push,
    state_signs,
    zero_pair,
)
from rbpjax.types import PyTree, StepFn


def nobacktrack(
    f: StepFn,
    loss: LossFn,
    *,
    row_norms: Callable[[PyTree, PyTree, PyTree], PyTree] | None = None,
    rows: Rows | None = None,
) -> Estimator:
    """Streams gradients with a rank-one estimate, scaled unit by unit.

    As in ``uoro``, a pair (v, w) with E v wᵀ = G is carried, and the gradient is
    ∂loss/∂θ + δ F + (δ · J v) w. The reduction differs: J v wᵀ + F is a sum of
    1 + n outer products, J v wᵀ + Σᵢ eᵢ Fᵢ, with Fᵢ = ∂fᵢ/∂θ, and each gets its own
    sign and its own scale of minimum variance,

        v ← ρ₀ J v + Σᵢ εᵢ ρᵢ eᵢ,      ρ₀ = √(‖w‖ / ‖J v‖),
        w ← w / ρ₀ + Σᵢ εᵢ Fᵢ / ρᵢ,    ρᵢ = √‖Fᵢ‖.

    Unbiased at fixed parameters, at every step.

    The sum in w is one VJP, because Σᵢ cᵢ Fᵢ = cᵀF; only the norms ‖Fᵢ‖ need the
    rows one by one. Where each unit has parameters of its own, which reach no other
    unit in one step, they do not: no two Fᵢ have a nonzero in the same place, and the
    one product Σᵢ Fᵢ holds them all. ``rows`` says that it is so, and where they are.

    Departs from the paper in two points:

    1. The last step enters as the exact δ F, which has less variance than reading the
       gradient from the new pair.
    2. No ε is added to the norms of a scale: it is relative to the other norms of the
       step where one of them vanishes, as in ``uoro``.

    Cost: one step, one JVP and n + 2 VJPs, O(n P), one row at a time; with ``rows``
    one VJP for each leaf of the state and 2 more, with ``row_norms`` 2 VJPs, O(n² + P),
    as the paper promises. Memory one state and one parameter tree, whatever the length
    of the run. Works under ``jit``, ``vmap`` and ``scan``. A run can be differentiated
    in forward and reverse mode; reverse mode stores its history.

    Args:
      f: step function ``f(params, x, h) -> h``; any pytrees.
      loss: ``loss(params, h, y) -> scalar`` at the new state.
      row_norms: ``row_norms(params, x, h)``, a pytree like ``h`` with the ‖Fᵢ‖ (of
        complex leaves ``Parts``), where they are known in closed form. For
        h' = tanh(W h + U x + b), ‖Fᵢ‖ is (1 - h'ᵢ²) √(‖h‖² + ‖x‖² + 1). Wrong values
        cost variance, never bias.
      rows: for units that own their parameters: ``rows(params)`` arranges every number
        once, in matrices. In those of n rows, or 2 n, 3 n, …, as the gates of a unit
        are, row j belongs to unit j mod n of a leaf of n numbers; f uses no others
        (a readout of another number of rows may be among them). Of a ``f`` whose units
        share parameters it costs variance, never bias.

    Returns:
      An ``Estimator``. Its influence is ``RankOne(v, w)``, v like ``h0``, w like
      ``params``; its noise is a pytree of signs like ``h0``.

    Raises:
      ValueError: both ``row_norms`` and ``rows`` are given; ``rows`` does not use every
        number once, or has no matrix for a leaf of the state; from ``init`` and
        ``step``; see ``Estimator``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> f = lambda W, x, h: jnp.tanh(W @ h + x)
      >>> est = online.nobacktrack(f, lambda W, h, y: jnp.sum((h - y) ** 2))
      >>> W, x, y = 0.5 * jnp.eye(2), jnp.ones(2), jnp.zeros(2)
      >>> carry = est.init(W, jnp.zeros(2))
      >>> noise = est.noise(jax.random.key(0), carry)
      >>> carry, out = est.step(W, carry, x, y, noise)
      >>> out.grads.shape, carry.influence.v.shape
      ((2, 2), (2,))

      Row i of W reaches unit i alone, so that one product gives all norms:

      >>> loss = lambda W, h, y: jnp.sum((h - y) ** 2)
      >>> est = online.nobacktrack(f, loss, rows=lambda W: W)
      >>> carry, out = est.step(W, est.init(W, jnp.zeros(2)), x, y, noise)

    References:
      Ollivier, Tallec, Charpiat, "Training recurrent networks online without
      backtracking", https://arxiv.org/abs/1507.07680.
    """
    if row_norms is not None and rows is not None:
        raise ValueError(
            "`row_norms` and `rows` both give the norms of the rows; leave out `rows`, "
            "which is for steps without a closed form of them."
        )

    def init(params: PyTree, h0: PyTree) -> Carry:
        check_rows(rows, floats(params))
        return zero_pair(params, h0)

    def step(
        params: PyTree, carry: Carry, x: PyTree, y: PyTree, noise: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        here = observe(f, loss, params, carry.h, x, y)
        same = lambda tree: tree
        measure = Measure(same, same, optax.tree.ones_like(here.h))
        row_of = None
        if row_norms is not None:
            known = row_norms(params, x, carry.h)
            remedy = "It returns one norm for each unit."
            check_shapes(known, here.h, "`row_norms`' output", "the state", remedy)
            row_of = lambda _: known
        elif rows is not None:
            row_of = owned_norms(here.h, lambda tree: arrange(rows, tree))
        influence, grads = reduce_units(here, carry.influence, noise, measure, row_of)
        return Carry(here.h_next, influence), OnlineOutput(here.loss, grads)

    return checked(init, state_signs, step, zero_pair)


class Measure(NamedTuple):
    """The norms in which the variance of the reduction is minimal.

    Attributes:
      state: makes of a state a pytree whose Euclidean norm is that of the state.
      params: the same for a gradient.
      units: the norms of the unit vectors eᵢ in the state's norm, like a state.
    """

    state: Callable[[PyTree], PyTree]
    params: Callable[[PyTree], PyTree]
    units: PyTree


Vjp = Callable[[PyTree], PyTree]
"""c ↦ cᵀF, from states to gradients."""


def reduce_units(
    here: Observed,
    pair: RankOne,
    signs: PyTree,
    measure: Measure,
    row_norms: Callable[[Vjp], PyTree] | None = None,
) -> tuple[RankOne, PyTree]:
    """One step of the pair, and the gradient of the present loss.

    ``row_norms`` makes the ‖Fᵢ‖, in the measure, of c ↦ cᵀF; without it they are
    taken one row after another.
    """
    jv, vjp, grads = push(here, pair)
    rows = (row_norms or one_by_one(here.h, measure))(vjp)
    (rho0,), rho = balance(
        Factors((measure.state(jv),), measure.units),
        Factors((measure.params(pair.w),), rows),
    )
    like = lambda x, s: x.astype(s.dtype)
    sum_rows = vjp(jax.tree.map(lambda s, r: like(s / r, s), signs, rho))
    noise = jax.tree.map(lambda s, r: like(s * r, s), signs, rho)
    v = axpy(rho0, jv, noise)
    return RankOne(v, axpy(1 / rho0, pair.w, sum_rows)), grads


def one_by_one(h: PyTree, measure: Measure) -> Callable[[Vjp], PyTree]:
    """‖Fᵢ‖ for any f: a product for each unit."""
    flat_h, unravel = ravel_pytree(h)

    def row_norms(vjp: Vjp) -> PyTree:
        def row(i: jax.Array) -> PyTree:
            unit = unravel(jax.nn.one_hot(i, flat_h.size, dtype=flat_h.dtype))
            return measure.params(vjp(vary_like(unit, h)))

        # One row after another keeps the memory at one parameter tree.
        rows = norms(row, flat_h.size)
        return _split(rows, h)  # not `unravel`, which would round them

    return row_norms


def owned_norms(
    h: PyTree, matrices: Callable[[PyTree], PyTree]
) -> Callable[[Vjp], PyTree]:
    """‖Fᵢ‖ where units own their rows: a product for each leaf of the state.

    ``matrices`` arranges a gradient so that the leading axes count rows, see
    ``nobacktrack``, and the squares of row i of all of them sum to its norm's.
    """
    leaves, structure = jax.tree.flatten(h)
    zeros = [jnp.zeros_like(leaf) for leaf in leaves]

    def of_leaf(vjp: Vjp, k: int) -> jax.Array:
        ones = [*zeros[:k], jnp.ones_like(leaves[k]), *zeros[k + 1 :]]
        all_units = vary_like(structure.unflatten(ones), h)
        summed = jax.tree.leaves(matrices(vjp(all_units)))
        units = leaves[k].size
        mine = [m for m in summed if len(m) and len(m) % units == 0]
        if not mine:
            raise ValueError(
                f"`rows(params)` must have a matrix with a row for each of the {units} "
                f"units of a leaf of the state, {leaves[k].shape}; got matrices of "
                f"{[len(m) for m in summed]} rows. Where units share parameters leave "
                "out what says that they own them."
            )
        mine = [m.reshape(-1, units, *m.shape[1:]) for m in mine]
        return jax.vmap(norm, 1)(mine).reshape(leaves[k].shape)

    return lambda vjp: structure.unflatten(
        [of_leaf(vjp, k) for k in range(len(leaves))]
    )


def _split(flat: jax.Array, like: PyTree) -> PyTree:
    """A vector as a pytree with the shapes of ``like``, and its own dtype."""
    leaves, structure = jax.tree.flatten(like)
    ends = list(itertools.accumulate(leaf.size for leaf in leaves))
    parts = jnp.split(flat, ends[:-1])
    return structure.unflatten(
        [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )
