"""Cells whose nodes can be perturbed: functions of this form, with any pytrees.

    cell(params, inputs, h, noise) -> (h, out, nodes)

``nodes`` are the pre-activations of one step, ``noise`` is a pytree like them, and the
cell adds the one to the other *before* it returns and uses the sum:

    a = W inputs + R h + noise,    h = φ(a),    nodes = a.

Every parameter should act through nodes: what
does not has gradient zero. Entries of one leaf may not depend on each other within a
step; a node that depends on another is a leaf of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from rbpjax._core.step import check_like
from rbpjax.types import PyTree

Cell = Callable[[PyTree, PyTree, PyTree, PyTree], tuple[PyTree, PyTree, PyTree]]
"""``cell(params, inputs, h, noise) -> (h, out, nodes)``: one step, its nodes shown."""


class Nodes(NamedTuple):
    """Nodes (or noise) that feed the state, apart from those that only feed outputs.

    Noise in a readout changes the loss of its own step only, so that it deserves
    another credit: rules have ``readout_credit`` for it. Nodes that are no ``Nodes``
    all count as recurrent.

    Attributes:
      recurrent: pytree of nodes from which the next state can be reached.
      readout: pytree of nodes from which it cannot.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> def cell(params, inputs, h, noise):
      ...     a = params["w"] * h + inputs + noise.recurrent
      ...     b = params["c"] * jnp.tanh(a) + noise.readout
      ...     return jnp.tanh(a), b, perturb.Nodes(a, b)
      >>> params = {"w": jnp.array(0.5), "c": jnp.array(2.0)}
      >>> perturb.unroll(cell, params, jnp.zeros(3), jnp.array(0.0)).outputs.tolist()
      [0.0, 0.0, 0.0]
    """

    recurrent: PyTree
    readout: PyTree = ()


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["decorrelation"],
    meta_fields=["activation"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseCell:
    """A plain recurrent network with a linear readout.

        a = A x + R h + ξ,    h' = D φ(a),    b = B h' + ν,

    with nodes a and b, noise ξ and ν. D is the decorrelation, the identity if there is
    none; no gradient reaches it. For a bias give x, the inputs, an entry that is 1.
    Leading axes of ``inputs`` and ``h`` are batch axes; ``inputs`` without them are
    shared.

    The parameters are ``{"input": A, "recurrent": R, "readout": B}``, of shapes
    ``[units, inputs]``, ``[units, units]`` and ``[outputs, units]``. Cost: a product a
    matrix and step. AD modes: all. A pytree, so that D may be a traced array.

    Attributes:
      activation: φ, elementwise.
      decorrelation: D, ``[units, units]`` (see ``decorrelate``), or None.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> cell = perturb.DenseCell()
      >>> params = cell.init(jax.random.key(0), inputs=3, units=8, outputs=2)
      >>> noise = perturb.Nodes(jnp.zeros(8), jnp.zeros(2))
      >>> h, out, nodes = cell(params, jnp.ones(3), jnp.zeros(8), noise)
      >>> h.shape, out.shape, nodes.recurrent.shape
      ((8,), (2,), (8,))

    References:
      García Fernández, Keemink, van Gerven, "Gradient-Free Training of Recurrent
      Neural Networks using Random Perturbations", https://arxiv.org/abs/2405.08967:
      the network of their public code.
    """

    activation: Callable[[jax.Array], jax.Array] = jnp.tanh
    decorrelation: jax.Array | None = None

    def init(
        self, key: jax.Array, *, inputs: int, units: int, outputs: int
    ) -> dict[str, jax.Array]:
        """Draws Xavier-normal parameters, as the authors' code does."""
        draw = jax.nn.initializers.glorot_normal(in_axis=1, out_axis=0)
        keys = jax.random.split(key, 3)
        return {
            "input": draw(keys[0], (units, inputs)),
            "recurrent": draw(keys[1], (units, units)),
            "readout": draw(keys[2], (outputs, units)),
        }

    def __call__(
        self,
        params: dict[str, jax.Array],
        inputs: jax.Array,
        h: jax.Array,
        noise: Nodes,
    ) -> tuple[jax.Array, jax.Array, Nodes]:
        """One step: ``(h, out, nodes)``."""
        driven = inputs @ params["input"].T
        driven = jnp.expand_dims(driven, tuple(range(h.ndim - driven.ndim)))
        a = driven + h @ params["recurrent"].T + noise.recurrent
        h = self.activation(a)
        if self.decorrelation is not None:
            h = h @ jax.lax.stop_gradient(self.decorrelation).T
        b = h @ params["readout"].T + noise.readout
        return h, b, Nodes(a, b)

    def pullback(
        self,
        params: dict[str, jax.Array],
        inputs: jax.Array,
        before: jax.Array,
        after: jax.Array,
        errors: Nodes,
    ) -> dict[str, jax.Array]:
        """Weight gradients from node errors: Σ_t e_tᵀ x_t, one product a matrix."""
        del params

        def outer(e: jax.Array, x: jax.Array) -> jax.Array:
            x = jnp.broadcast_to(x, (*e.shape[:-1], x.shape[-1]))
            return e.reshape(-1, e.shape[-1]).T @ x.reshape(-1, x.shape[-1])

        # Of inputs that all examples share there is one row a step.
        axes = tuple(range(1, 1 + errors.recurrent.ndim - inputs.ndim))
        inputs = jnp.expand_dims(inputs, axes)
        return {
            "input": outer(errors.recurrent, inputs),
            "recurrent": outer(errors.recurrent, before),
            "readout": outer(errors.readout, after),
        }


def local_pullback(
    cell: Cell,
    params: PyTree,
    inputs: PyTree,
    before: PyTree,
    noise: PyTree,
    errors: PyTree,
) -> PyTree:
    """Weight gradients from node errors, for any cell, within each step alone.

    Wanted is Σ_t Dᵀe_t with D = ∂nodes/∂params at fixed other nodes. The VJP of the
    step has the total derivative instead: with M = ∂nodes/∂(other nodes) of one step,
    ∂nodes/∂params = N D and ∂nodes/∂noise = N, where N = (I - M)⁻¹. So e is first
    turned into λ with Nᵀλ = e. M only leads from leaf to later leaf, hence is
    nilpotent, and λ ← λ + e - Nᵀλ is done after one correction a leaf less one: exact,
    and no correction at all for a single leaf.
    """
    step = jax.vmap(lambda p, n, x, h: cell(p, x, h, n)[2], (None, 0, 0, 0))
    _, vjp = jax.vjp(lambda p, n: step(p, n, inputs, before), params, noise)
    adjoint = errors
    for _ in range(len(jax.tree.leaves(errors)) - 1):
        adjoint = jax.tree.map(
            lambda a, e, n: a + e - n, adjoint, errors, vjp(adjoint)[1]
        )
    return vjp(adjoint)[0]


class _AnyNoise:
    """Noise of any structure, all zero: shows which structure a cell asks for."""

    def __getitem__(self, key: object) -> Self:
        return self

    def __getattr__(self, name: str) -> Self:
        if name.startswith("_"):
            raise AttributeError(name)
        return self

    def __jax_array__(self) -> jax.Array:
        return jnp.asarray(0.0)  # weakly typed: the nodes keep their dtype

    def __iter__(self) -> None:
        raise TypeError("noise is not iterated over here: index it")


def nodes_like(cell: Cell, params: PyTree, inputs: PyTree, h: PyTree) -> PyTree:
    """Shapes of the nodes of one step, checked; ValueError if the cell is none."""
    probe = lambda p, x, h: cell(p, x, h, _AnyNoise())
    try:
        result = jax.eval_shape(probe, params, inputs, h)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            "`cell(params, inputs, h, noise)` could not be called with noise of the "
            f"structure of its nodes ({type(error).__name__}: {error}). Add the noise "
            "leaf by leaf (noise.recurrent, noise[0], noise['gate']) to the nodes."
        ) from error
    if not isinstance(result, tuple) or len(result) != 3:
        raise ValueError(
            "`cell(params, inputs, h, noise)` must return (h, out, nodes); got "
            f"{jax.tree.structure(result)}."
        )
    nodes = result[2]
    _check_call(cell, params, inputs, h, nodes)
    return nodes


def _check_call(
    cell: Cell, params: PyTree, inputs: PyTree, h: PyTree, nodes: PyTree
) -> None:
    """Raises ValueError unless noise like the nodes goes in and shows in them."""
    if not jax.tree.leaves(nodes):
        raise ValueError("`cell` returned no nodes: there is nothing to perturb.")
    try:
        traced = jax.make_jaxpr(lambda n, p, x, h: cell(p, x, h, n), return_shape=True)(
            nodes, params, inputs, h
        )
    except Exception as error:
        raise ValueError(
            f"`cell` asks for noise of another structure than its nodes, {nodes} "
            f"({type(error).__name__}: {error}). Return as nodes just those values "
            "that noise was added to, in the same structure."
        ) from error
    jaxpr, (new_h, _, new_nodes) = traced
    remedy = "Return as nodes just those values that noise was added to."
    check_like(new_nodes, nodes, "`cell`'s nodes", "the noise", remedy)
    remedy = "A cell returns (h, out, nodes), h in the dtypes of `h0`."
    check_like(new_h, h, "`cell`'s state", "`h0`", remedy)
    count = len(jax.tree.leaves(nodes))
    outputs = jaxpr.jaxpr.outvars[-count:]
    for noise, node in zip(jaxpr.jaxpr.invars[:count], outputs, strict=True):
        reached = {id(noise)}
        for equation in jaxpr.jaxpr.eqns:
            if any(id(v) in reached for v in equation.invars):
                reached.update(id(v) for v in equation.outvars)
        if id(node) not in reached:
            raise ValueError(
                f"`cell` returned a node ({node.aval}) without the noise added to it. "
                "Nodes are the pre-activations after noise: a = W x + noise; nodes = a."
            )
