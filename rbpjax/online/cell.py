"""Cells that expose their pre-activations, for the methods that need them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbpjax._core import sharding
from rbpjax._core.step import floats, merge
from rbpjax._core.strategy import function, strategy
from rbpjax.types import PyTree


@strategy
class PreactivationCell:
    """A recurrent cell h' = activate(W ĥ, h), with ĥ = features(x, h).

    A cell of n units and a gates computes a pre-activations a unit from one matrix,
    and then each unit goes its own way. Vanilla, leaky, LSTM and (with the reset
    after the product) GRU cells have this form. The instance *is* the step function:
    it can be called, and given to any estimator.

    Cost and memory of a call are those of its three functions and one product of W
    and ĥ. All AD modes.

    Attributes:
      kernel: ``kernel(params)``: W, ``[a, n, k]``; any differentiable function of the
        parameters, so that the readout or separate matrices may live in ``params``.
      features: ``features(x, h)``: ĥ, ``[k]``, such as h, x and a 1 for the bias.
      activate: ``activate(z, h)`` for **one** unit: z is ``[a]``, h the state's pytree
        with scalars for leaves; returns the new state of the unit.

    States are pytrees of floating-point vectors of length n.

    Raises:
      ValueError: a function is not callable; when called, if the shapes of kernel,
        features and state do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> cell = online.PreactivationCell(
      ...     kernel=lambda params: params[None],
      ...     features=lambda x, h: jnp.concatenate([h, x, jnp.ones(1)]),
      ...     activate=lambda z, h: 0.9 * h + 0.1 * jnp.tanh(z[0]),
      ... )
      >>> h = cell(jnp.ones((2, 4)), jnp.zeros(1), jnp.zeros(2))
      >>> [round(float(unit), 4) for unit in h]
      [0.0762, 0.0762]

    References:
      The form that Mujika, Meier, Steger, "Approximating Real-Time Recurrent Learning
      with Random Kronecker Factors", https://arxiv.org/abs/1805.10842, asks of a cell.
    """

    kernel: Callable[[PyTree], jax.Array] = function(
        meaning="a callable", call="kernel(params) -> [gates, units, features]"
    )
    features: Callable[[PyTree, PyTree], jax.Array] = function(
        meaning="a callable", call="features(x, h) -> [features]"
    )
    activate: Callable[[jax.Array, PyTree], PyTree] = function(
        meaning="a callable", call="activate(z, h), for one unit"
    )

    def __call__(self, params: PyTree, x: PyTree, h: PyTree) -> PyTree:
        """One step, as every step function."""
        kernel, features = self.kernel(params), self.features(x, h)
        sizes = {jnp.shape(leaf) for leaf in jax.tree.leaves(h)}
        if (
            jnp.ndim(kernel) != 3
            or kernel.shape[2:] != jnp.shape(features)
            or sizes != {(kernel.shape[1],)}
        ):
            raise ValueError(
                "`kernel(params)` must be [gates, units, features] for states that are "
                f"vectors of `units` and a vector of `features`; got {kernel.shape} "
                f"with state leaves {sorted(sizes)} and features "
                f"{jnp.shape(features)}. Add the gate axis, kernel[None], if there is "
                "one gate."
            )
        return jax.vmap(self.activate, (1, 0))(kernel @ features, h)

    def row_norms(self, params: PyTree, x: PyTree, h: PyTree) -> PyTree:
        """‖Fᵢ‖ for each unit in O(n), for ``nobacktrack``; a pytree like ``h``.

        Give it as ``nobacktrack(cell, loss, row_norms=cell.row_norms)``. Exact where
        ``kernel`` is a rearrangement of the parameters, in which
        ‖Fᵢ‖ = ‖∂h'ᵢ/∂z‖ ‖ĥ‖; close to it where it pads with zeros.
        """
        inside = unit_jacobians(self, params, x, h)
        norms = jnp.linalg.norm(inside.gates, axis=2) * jnp.linalg.norm(inside.features)
        return jax.tree.structure(h).unflatten(list(norms))


class UnitJacobians(NamedTuple):
    """What one step of a cell looks like inside its units.

    States with S leaves are stacked to ``[S, n]``.

    Attributes:
      features: ĥ, ``[k]``.
      gates: ∂h'/∂z within a unit, ``[S, n, a]``.
      local: ∂h'/∂h within a unit at fixed z, ``[S, S, n]``, new state first.
    """

    features: jax.Array
    gates: jax.Array
    local: jax.Array


def unit_jacobians(
    cell: PreactivationCell, params: PyTree, x: PyTree, h: PyTree
) -> UnitJacobians:
    """Differentiates ``activate`` unit by unit: O(n), no matrix of n × n."""
    features = cell.features(x, h)
    z = cell.kernel(params) @ features
    gates = jax.vmap(jax.jacrev(cell.activate, 0), (1, 0))(z, h)
    local = jax.vmap(jax.jacrev(cell.activate, 1), (1, 0))(z, h)
    rows = jax.tree.structure(h).flatten_up_to(local)
    return UnitJacobians(
        features,
        jnp.stack(jax.tree.leaves(gates)),
        jnp.stack([jnp.stack(jax.tree.leaves(row)) for row in rows]),
    )


def kernel_to_params(
    cell: PreactivationCell, params: PyTree, kernel_grad: jax.Array
) -> PyTree:
    """The gradient in the parameters of one in W, ``[a, n, k]``; floats only."""
    own = sharding.vary_like(floats(params), kernel_grad)  # each device's own gradient
    _, vjp = jax.vjp(lambda p: cell.kernel(merge(p, params)), own)
    return vjp(kernel_grad)[0]


def check_cell(cell: object) -> None:
    """Raises ValueError unless ``cell`` exposes its pre-activations."""
    if not isinstance(cell, PreactivationCell):
        raise ValueError(
            "`cell` must be a PreactivationCell, which exposes the matrix its "
            f"pre-activations come from; got {cell!r}. For any other step function "
            "take uoro or nobacktrack."
        )
