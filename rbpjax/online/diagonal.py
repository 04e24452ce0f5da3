"""Diagonal RTRL: the whole influence of recurrences whose units are by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rbpjax._core import sharding
from rbpjax._core.step import floats, merge
from rbpjax.online.elementwise import ElementwiseCell, LayeredCell
from rbpjax.online.estimator import (
    Carry,
    Estimator,
    LossFn,
    OnlineOutput,
    checked,
    no_noise,
    observe,
    parts,
    start,
    whole,
)
from rbpjax.types import PyTree


class Traces(NamedTuple):
    """The influence of a cell's parameters on the units that they feed.

    For n units whose states hold S real numbers each (a complex leaf counts two), a
    gates and k features.

    Attributes:
      kernel: on W, ``[S, a, n, k]``.
      own: on the units' own numbers, a pytree like ``own(params)`` with a leading axis
        of S.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.online.diagonal import Traces
      >>> Traces(kernel=jnp.zeros((2, 1, 4, 3)), own=jnp.zeros((2, 4))).own.shape
      (2, 4)
    """

    kernel: jax.Array
    own: PyTree


def diagonal_rtrl(cell: ElementwiseCell | LayeredCell, loss: LossFn) -> Estimator:
    """Streams exact gradients of element-wise recurrences, at the cost of the step.

    Row i of W and the numbers that unit i owns reach the state of unit i alone, at all
    times: all other entries of RTRL's G = ∂h/∂θ are zero. With Jᵢ = ∂h'ᵢ/∂hᵢ, S × S
    for S real numbers in the state of a unit, the rest of G ← J G + F is

        Eᵢ ← Jᵢ Eᵢ + ∂h'ᵢ/∂(Wᵢ, ownᵢ),    gradient = ∂loss/∂θ + Σᵢ δᵢ Eᵢ.

    Exact for one layer: at fixed parameters the gradients, summed over time, are those
    of the unrolled loss. While the parameters change, E mixes Jacobians of old and new
    parameters, as in ``rtrl``. Complex states are exact, too, also where ``activate``
    is not holomorphic.

    Truncated (biased) for a ``LayeredCell``, by spatial backpropagation: each layer
    has its own exact E, its inputs taken as given, and δ is carried down through the
    layers at the present time only. What is lost, and nothing else: the way of a
    parameter from a lower layer's state into an upper layer's, and from there in time.
    With Cₗ = ∂h'ₗ₊₁/∂hₗ the influence of a layer's parameters on the next layer,

        Gₗ₊₁ ← Jₗ₊₁ Gₗ₊₁ + Cₗ Gₗ + Fₗ₊₁,

    is taken without its first term. So the gradients are exact for the parameters of
    the top layer's W and ``own`` and for those that only the loss sees, they lack that
    term for the layers below, and those of ``between`` count at the present step
    alone. All terms of the present step are exact.

    Cost: one step, its VJP, and O(P S²) for P entries of W and ``own``; memory
    P S numbers: no noise, and nothing grows with n² or with the length of the run.
    Works under ``jit``, ``vmap`` and ``scan``. A run can be differentiated in forward
    and reverse mode; reverse mode stores its history.

    Args:
      cell: step function as an ``ElementwiseCell``, or layers of them.
      loss: ``loss(params, h, y) -> scalar`` at the new state. It may share ``params``
        with ``cell``; its direct gradient is included.

    Returns:
      An ``Estimator``. Its influence is ``Traces(kernel, own)``, a tuple of them for
      layers; it needs no noise.

    Raises:
      ValueError: ``cell`` is neither; from ``init`` and ``step`` as in ``Estimator``.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> cell = online.ElementwiseCell(
      ...     kernel=lambda params: params["W"][None],
      ...     own=lambda params: params["decay"],
      ...     features=lambda x: x,
      ...     activate=lambda decay, z, h: decay * h + z[0],
      ... )
      >>> est = online.diagonal_rtrl(cell, lambda params, h, y: jnp.sum(h))
      >>> params = {"W": jnp.ones((1, 1)), "decay": jnp.array([0.5])}
      >>> carry = est.init(params, jnp.zeros(1))
      >>> for _ in range(3):  # h₃ = (a² + a + 1) w
      ...     carry, out = est.step(params, carry, jnp.ones(1), None, ())
      >>> float(out.grads["decay"][0]), float(out.grads["W"][0, 0])
      (2.0, 1.75)

    References:
      Zucchet, Meier, Schug, Mujika, Sacramento, "Online learning of long-range
      dependencies", https://arxiv.org/abs/2305.15947, section 3.
      Irie, Gopalakrishnan, Schmidhuber, "Exploring the Promise and Limits of Real-Time
      Recurrent Learning", https://arxiv.org/abs/2305.19044, section 3.
    """
    if not isinstance(cell, ElementwiseCell | LayeredCell):
        raise ValueError(
            "`cell` must be an ElementwiseCell or a LayeredCell, whose units do not "
            f"see each other; got {cell!r}. For any other step function take rtrl, "
            "uoro or nobacktrack."
        )
    layers = cell.cells if isinstance(cell, LayeredCell) else (cell,)

    def by_layer(tree: PyTree) -> tuple:
        return tree if isinstance(cell, LayeredCell) else (tree,)

    def of_layers(trees: tuple) -> PyTree:
        return trees if isinstance(cell, LayeredCell) else trees[0]

    def init(params: PyTree, h0: PyTree) -> Carry:
        h0 = start(params, h0)

        def zeros(layer: ElementwiseCell, h: PyTree) -> Traces:
            size = len(jax.tree.leaves(parts(h)))
            trace = lambda p: jnp.zeros((size, *jnp.shape(p)), jnp.result_type(p))
            return jax.tree.map(trace, Traces(layer.kernel(params), layer.own(params)))

        states = _states(by_layer(h0), layers)
        return Carry(h0, of_layers(tuple(map(zeros, layers, states))))

    def step(
        params: PyTree, carry: Carry, x: PyTree, y: PyTree, noise: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        del noise
        here = observe(cell, loss, params, carry.h, x, y)
        # A layer's old state enters through its own step alone, so that the derivative
        # in it is δₗ Jₗ, with δₗ taken down through the layers.
        _, vjp = jax.vjp(here.f, here.params, here.h)
        last, back = vjp(here.delta)
        grads = optax.tree.add(here.direct, last)

        inputs = [x]
        if isinstance(cell, LayeredCell):
            inputs = [given for given, _ in cell.layer_steps(params, x, carry.h)]
        olds, backs = by_layer(carry.h), by_layer(back)
        influence = []
        for i, old in enumerate(by_layer(carry.influence)):
            past = _read(backs[i], old)
            grads = optax.tree.add(grads, _to_params(layers[i], params, past))
            influence.append(_carry_on(layers[i], params, inputs[i], olds[i], old))
        carry = Carry(here.h_next, of_layers(tuple(influence)))
        return carry, OnlineOutput(here.loss, grads)

    return checked(init, no_noise, step)


def _states(states: PyTree, layers: tuple) -> tuple:
    """The states of the layers; ValueError unless there is one for each."""
    if not isinstance(states, tuple) or len(states) != len(layers):
        raise ValueError(
            f"`h0` must be a tuple of the states of {len(layers)} layers; got "
            f"{states!r}."
        )
    return states


def _read(delta: PyTree, trace: Traces) -> Traces:
    """Σ over a unit's state of δᵢ Eᵢ: the gradient in W and in ``own``."""

    def leaf(e: jax.Array, axis: int) -> jax.Array:
        rows = _along(_stack(delta, e.dtype), e, axis)
        return _sum(rows[s] * e[s] for s in range(len(e)))

    return _on_units(leaf, trace)


def _carry_on(
    cell: ElementwiseCell, params: PyTree, x: PyTree, h: PyTree, trace: Traces
) -> Traces:
    """E ← J E + ∂h'/∂(W, own) of one layer."""
    features, own = cell.features(x), cell.own(params)

    def unit(own: PyTree, z: jax.Array, h: PyTree) -> PyTree:
        return parts(cell.activate(own, z, whole(h)))

    jacobian = jax.vmap(jax.jacrev(unit, (0, 1, 2)), (0, 1, 0))
    made = jacobian(own, cell.kernel(params) @ features, parts(h))
    # One row of them for each real number in the new state of a unit.
    rows = jax.tree.structure(parts(h)).flatten_up_to(made)
    by_own, by_z, by_h = zip(*rows, strict=True)
    dtype = trace.kernel.dtype
    jac = jnp.stack([_stack(row, dtype) for row in by_h])  # [S, S, n], new first
    gates = jnp.swapaxes(_stack(by_z, dtype), 1, 2)  # [S, a, n]
    new = Traces(
        jnp.tensordot(gates, features.astype(dtype), 0),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *by_own),
    )

    def leaf(e: jax.Array, axis: int) -> jax.Array:
        columns = _along(jac.astype(e.dtype), e, axis)
        return _sum(columns[:, s] * e[None, s] for s in range(len(e)))

    return jax.tree.map(lambda e, f: e + f.astype(e.dtype), _on_units(leaf, trace), new)


def _on_units(leaf: Callable[[jax.Array, int], jax.Array], trace: Traces) -> Traces:
    """``leaf(e, axis)`` of each trace, whose axis over the units it is behind S."""
    return Traces(leaf(trace.kernel, 1), jax.tree.map(lambda e: leaf(e, 0), trace.own))


def _along(x: jax.Array, e: jax.Array, axis: int) -> jax.Array:
    """``x [..., n]`` with n where the trace ``e`` has its units."""
    shape = [1] * (e.ndim - 1)
    shape[axis] = x.shape[-1]
    return x.reshape(*x.shape[:-1], *shape)


def _sum(terms: Iterable[jax.Array]) -> jax.Array:
    """One or two terms, S of them: written out, they are fused with their products."""
    return reduce(jnp.add, terms)


def _stack(tree: PyTree, dtype: jnp.dtype) -> jax.Array:
    return jnp.stack([leaf.astype(dtype) for leaf in jax.tree.leaves(tree)])


def _to_params(cell: ElementwiseCell, params: PyTree, grads: Traces) -> PyTree:
    """The gradient in the parameters of one in W and ``own``; floats only."""
    expose = lambda p: Traces(cell.kernel(merge(p, params)), cell.own(merge(p, params)))
    mine = sharding.vary_like(floats(params), grads.kernel)  # each device's gradient
    _, vjp = jax.vjp(expose, mine)
    return vjp(grads)[0]
