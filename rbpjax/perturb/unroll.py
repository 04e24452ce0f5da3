"""Runs of a cell over a sequence: clean, with given noise, and along a direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbpjax.perturb.cell import Cell, nodes_like
from rbpjax.perturb.samples import scaled
from rbpjax.types import PyTree

StepLoss = Callable[[PyTree, PyTree], jax.Array]
"""``loss(out, target)`` of one step: a scalar, or ``[examples]``."""


class Trajectory(NamedTuple):
    """A run of a cell, by ``unroll``; all leaves have a leading time axis, ``[T, …]``.

    Attributes:
      states: the state after each step.
      outputs: what the cell gave out.
      nodes: its pre-activations.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> cell = lambda w, inputs, h, noise: (w * h + inputs + noise,) * 3
      >>> run = perturb.unroll(cell, jnp.array(0.5), jnp.ones(3), jnp.array(0.0))
      >>> run.states.shape, run.nodes.shape
      ((3,), (3,))
    """

    states: PyTree
    outputs: PyTree
    nodes: PyTree


def unroll(
    cell: Cell,
    params: PyTree,
    inputs: PyTree,
    h0: PyTree,
    noise: PyTree | None = None,
) -> Trajectory:
    """Runs a cell over a sequence.

    Exact and differentiable in all modes: ``jax.grad`` through it is BPTT, with respect
    to ``noise`` it gives the error of every node. Cost: T steps; memory: the
    trajectory, T × (state, output and nodes).

    Args:
      cell: ``cell(params, inputs, h, noise) -> (h, out, nodes)``.
      params: its parameters.
      inputs: leaves ``[T, …]``.
      h0: first state.
      noise: added to the nodes, leaves ``[T, …]``; None for none.

    Returns:
      A ``Trajectory``.

    Raises:
      ValueError: the cell does not keep to its contract, or ``inputs`` has no steps.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> def cell(w, inputs, h, noise):
      ...     a = w * h + inputs + noise
      ...     return a, a, a
      >>> run = perturb.unroll(cell, jnp.array(0.5), jnp.ones(3), jnp.array(0.0))
      >>> run.outputs.tolist()
      [1.0, 1.5, 1.75]

    References:
      García Fernández, Keemink, van Gerven, "Gradient-Free Training of Recurrent
      Neural Networks using Random Perturbations", https://arxiv.org/abs/2405.08967.
    """
    inputs, h0 = jax.tree.map(jnp.asarray, (inputs, h0))
    check_length(inputs, ())
    if noise is None:
        noise = no_noise(cell, params, inputs, h0)

    def body(h: PyTree, data: tuple[PyTree, PyTree]) -> tuple[PyTree, Trajectory]:
        h, out, nodes = cell(params, data[0], h, data[1])
        return h, Trajectory(h, out, nodes)

    return jax.lax.scan(body, h0, (inputs, noise))[1]


class Run(NamedTuple):
    """What is the same in all passes: a cell, its loss, and a sequence."""

    cell: Cell
    loss: StepLoss
    inputs: PyTree
    h0: PyTree
    targets: PyTree
    zeros: PyTree  # no noise, for all steps

    def losses(
        self,
        params: PyTree,
        amount: jax.typing.ArrayLike,
        direction: PyTree,
        clean: PyTree = (),
    ) -> tuple[jax.Array, PyTree]:
        """Losses with ``amount`` of a direction, and how far nodes are from clean.

        ``clean`` are the nodes to compare with; () compares none.
        """
        first = jax.tree.map(lambda z: z[0], self.zeros)

        # Scaled inside the loop: outside, a float copy of all noise would be made, and
        # its way through memory costs as much as a forward pass.
        def body(h: PyTree, data: PyTree) -> tuple[PyTree, tuple[jax.Array, PyTree]]:
            x, target, v, still = data
            h, out, nodes = self.cell(params, x, h, scaled(amount, v, first))
            nodes = nodes if jax.tree.leaves(still) else ()
            moved = jax.tree.map(jnp.subtract, nodes, still)
            return h, (self.loss(out, target), moved)

        data = (self.inputs, self.targets, direction, clean)
        return jax.lax.scan(body, self.h0, data)[1]


def check_length(inputs: PyTree, targets: PyTree) -> None:
    """Raises ValueError unless all leaves have one time axis of at least one step."""
    if not jax.tree.leaves(inputs):
        raise ValueError(
            "`inputs` has no leaves: its leading axis is what counts steps."
        )
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves((inputs, targets))]
    lengths = {shape[:1] for shape in shapes}
    if len(lengths) != 1 or lengths <= {(), (0,)}:
        raise ValueError(
            "`inputs` and `targets` must be sequences, with one leading time axis for "
            "all of their leaves and at least one step; got leaves of shapes "
            f"{shapes}."
        )


def no_noise(cell: Cell, params: PyTree, inputs: PyTree, h0: PyTree) -> PyTree:
    """No noise, for all steps."""
    leaves = jax.tree.leaves(inputs)
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), inputs)
    nodes = nodes_like(cell, params, x, h0)
    return jax.tree.map(lambda n: jnp.zeros((len(leaves[0]), *n.shape), n.dtype), nodes)
