"""Any flax nnx cell as an implicit layer."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx

from rbpjax.fixed_point.backward.adaptive import Adaptive
from rbpjax.fixed_point.forward.hybrid import Hybrid
from rbpjax.fixed_point.report import AdjointReport
from rbpjax.fixed_point.solve import rbp_solve
from rbpjax.types import BackwardRule, ForwardSolver, PyTree, Solution


class FixedPoint(nnx.Module):
    """The layer h* = cell(inputs, h*), with the gradient of the fixed point.

    Exact up to the tolerances of solver and rule, or reported as not converged: forward
    in the `Solution`, backward through ``probe`` (see `rbpjax.AdjointReport`). Memory
    and cost are those of `rbpjax.rbp_solve`; AD modes: reverse, to every order.

    The cell is run many times for one answer, so that it must not change its own state:
    dropout, batch statistics and other counters belong outside, applied once to inputs
    or to h*. ``nnx.grad``, ``nnx.Optimizer`` and orbax see the cell's parameters as
    those of any layer.

    Args:
      cell: an nnx module, called as ``cell(inputs, h) -> h``.
      forward: any `ForwardSolver`.
      backward: any `BackwardRule`.

    Raises:
      ValueError: by a call, while tracing, if the cell changes its own state or the
        structure, shapes or dtypes of h.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from rbpjax.nn import FixedPoint
      >>> class Cell(nnx.Module):
      ...     def __init__(self, units, rngs):
      ...         init = nnx.initializers.normal(0.05)
      ...         self.linear = nnx.Linear(units, units, kernel_init=init, rngs=rngs)
      ...     def __call__(self, x, h):
      ...         return jnp.tanh(self.linear(h) + x)
      >>> layer = FixedPoint(Cell(8, nnx.Rngs(0)))
      >>> x = jnp.ones((2, 8), jnp.float32)
      >>> solution = layer(x, jnp.zeros_like(x))
      >>> bool(solution.converged)
      True
      >>> loss = lambda layer: layer(x, jnp.zeros_like(x)).value.sum()
      >>> nnx.grad(loss)(layer)["cell"]["linear"]["kernel"].shape
      (8, 8)

    References:
      Bai, Kolter, Koltun, "Deep Equilibrium Models", NeurIPS 2019,
      https://arxiv.org/abs/1909.01377; the gradient: Liao et al. 2018.
    """

    def __init__(
        self,
        cell: nnx.Module,
        *,
        forward: ForwardSolver = Hybrid(),
        backward: BackwardRule = Adaptive(),
    ) -> None:
        if not callable(cell):
            raise ValueError(
                "FixedPoint: `cell` must be a module called as cell(inputs, h) -> h; "
                f"got {type(cell).__name__}."
            )
        self.cell = cell
        self.forward = _held(forward)
        self.backward = _held(backward)

    def __call__(
        self, inputs: PyTree, h0: PyTree, probe: AdjointReport | None = None
    ) -> Solution:
        """Solves h* = cell(inputs, h*) from ``h0``.

        Args:
          inputs: passed on to the cell; any pytree.
          h0: where the solver starts; any pytree of floating-point arrays.
          probe: `rbpjax.AdjointReport.zeros()`; its gradient is the report of the
            backward pass.

        Returns:
          A `rbpjax.Solution`; ``value`` is like ``h0``.
        """
        graph, state = nnx.split(self.cell)
        solve = rbp_solve(_step(graph), forward=self.forward, backward=self.backward)
        return solve(state, inputs, h0, probe)


def _held(strategy: PyTree) -> PyTree:
    """The strategy as an attribute: data if tolerances or budgets are arrays."""
    arrays = [x for x in jax.tree.leaves(strategy) if isinstance(x, jax.Array)]
    return nnx.data(strategy) if arrays else strategy


def _step(graph: nnx.GraphDef) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    """The cell as a step function of its state."""

    def step(state: PyTree, inputs: PyTree, h: PyTree) -> PyTree:
        cell = nnx.merge(graph, state)
        before = jax.tree.leaves(nnx.state(cell))
        image = cell(inputs, h)
        after = jax.tree.leaves(nnx.state(cell))
        same = len(before) == len(after)
        if not (same and all(a is b for a, b in zip(before, after, strict=True))):
            raise ValueError(
                f"FixedPoint: `cell` ({type(cell).__name__}) changes its own state "
                "when called, as dropout and batch normalization do; a solver calls it "
                "many times. Apply such layers once, to the inputs or to h*."
            )
        return image

    return step
