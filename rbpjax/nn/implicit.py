"""Any flax nnx cell as an implicit layer."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx
from jax import lax

from rbpjax import regularizers
from rbpjax.diagnostics import spectrum
from rbpjax.fixed_point.backward.adaptive import Adaptive
from rbpjax.fixed_point.forward.hybrid import Hybrid
from rbpjax.fixed_point.report import AdjointReport
from rbpjax.fixed_point.solve import rbp_solve
from rbpjax.types import BackwardRule, ForwardSolver, PyTree, Solution

MOVING = (nnx.RngState, nnx.BatchStat)
"""What a call of a cell may change: it is held during a solve, and changed once."""


class FixedPoint(nnx.Module):
    """The layer h* = cell(inputs, h*), with the gradient of the fixed point.

    Exact up to the tolerances of solver and rule, or reported as not converged: forward
    in the `Solution`, backward through ``probe`` (see `rbpjax.AdjointReport`). Memory
    and cost are those of `rbpjax.rbp_solve`; AD modes: reverse, to every order.

    The cell is run many times for one answer, so that it must be one function during a
    solve. Dropout in it draws one mask a solve, the same in all steps and in the
    backward pass (variational dropout). Batch normalization in it uses its running
    statistics during the solve. Keys and statistics move on once a call: by one more
    evaluation at h*, and only where the cell has such variables.

    The state is passed and returned, and never kept: for a warm start give the last
    ``Solution.value`` as ``h0``. ``nnx.grad``, ``nnx.Optimizer`` and orbax see the
    cell's parameters as those of any layer.

    Args:
      cell: an nnx module, called as ``cell(inputs, h) -> h``.
      forward: any `ForwardSolver`.
      backward: any `BackwardRule`.
      has_aux: whether the cell returns a pair ``(h, aux)``; ``Solution.aux`` is that at
        h*, differentiable.

    Raises:
      ValueError: by a call, while tracing, if the cell changes the structure, shapes or
        dtypes of h, or a variable of its own that is neither a key nor a statistic.

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
      >>> int(layer(x, solution.value).num_steps) <= 1  # a warm start
      True
      >>> loss = lambda layer: layer(x, jnp.zeros_like(x)).value.sum()
      >>> nnx.grad(loss)(layer)["cell"]["linear"]["kernel"].shape
      (8, 8)

    References:
      Bai, Kolter, Koltun, "Deep Equilibrium Models", NeurIPS 2019,
      https://arxiv.org/abs/1909.01377; the gradient: Liao et al. 2018. One mask for all
      steps: Gal and Ghahramani, NeurIPS 2016, https://arxiv.org/abs/1512.05287.
    """

    def __init__(
        self,
        cell: nnx.Module,
        *,
        forward: ForwardSolver = Hybrid(),
        backward: BackwardRule = Adaptive(),
        has_aux: bool = False,
    ) -> None:
        if not callable(cell):
            raise ValueError(
                "FixedPoint: `cell` must be a module called as cell(inputs, h) -> h; "
                f"got {type(cell).__name__}."
            )
        self.cell = cell
        self.forward = _held(forward)
        self.backward = _held(backward)
        self.has_aux = has_aux

    def __call__(
        self, inputs: PyTree, h0: PyTree, probe: AdjointReport | None = None
    ) -> Solution:
        """Solves h* = cell(inputs, h*) from ``h0``.

        Args:
          inputs: passed on to the cell; any pytree.
          h0: where the solver starts; any pytree of floating-point arrays, such as the
            value of an earlier solution.
          probe: `rbpjax.AdjointReport.zeros()`; its gradient is the report of the
            backward pass.

        Returns:
          A `rbpjax.Solution`; ``value`` is like ``h0``.
        """
        graph, state = nnx.split(self.cell)
        solve = rbp_solve(
            _step(graph),
            forward=self.forward,
            backward=self.backward,
            has_aux=self.has_aux,
        )
        solution = solve(state, inputs, h0, probe)
        if jax.tree.leaves(nnx.state(self.cell, MOVING)):
            self.cell(*lax.stop_gradient((inputs, solution.value)))
        return solution

    def jacobian_penalty(
        self, key: jax.Array, inputs: PyTree, h: PyTree, *, num_probes: int = 1
    ) -> jax.Array:
        """`rbpjax.regularizers.jacobian_penalty` of the cell at h, to add to a loss.

        No gradient goes through h. With dropout in the cell, the mask is the next one.

        Args:
          key: PRNG key of the probes, a new one each training step.
          inputs: those of the call.
          h: the state, usually ``Solution.value``.
          num_probes: number of probes, at least 1.

        Returns:
          A scalar, the estimate of ‖J‖_F² / n.
        """
        step, state = self._function()
        return regularizers.jacobian_penalty(
            key, step, state, inputs, lax.stop_gradient(h), num_probes=num_probes
        )

    def spectral_radius(
        self, key: jax.Array, inputs: PyTree, h: PyTree, *, num_steps: int = 200
    ) -> jax.Array:
        """`rbpjax.diagnostics.spectral_radius` of the cell at h: what to watch.

        Args:
          key: PRNG key of the direction.
          inputs: those of the call.
          h: the state, usually ``Solution.value``.
          num_steps: products with J, at least 4.

        Returns:
          A scalar, the estimate of ρ(J).
        """
        step, state = self._function()
        return spectrum.spectral_radius(
            key, step, state, inputs, h, num_steps=num_steps
        )

    def _function(self) -> tuple[Callable[[PyTree, PyTree, PyTree], PyTree], PyTree]:
        """The cell without its aux as a step function, and its state."""
        graph, state = nnx.split(self.cell)
        step = _step(graph)
        return (lambda *args: step(*args)[0]) if self.has_aux else step, state


def _held(strategy: PyTree) -> PyTree:
    """The strategy as an attribute: data if tolerances or budgets are arrays."""
    arrays = [x for x in jax.tree.leaves(strategy) if isinstance(x, jax.Array)]
    return nnx.data(strategy) if arrays else strategy


def _step(graph: nnx.GraphDef) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    """The cell as a step function of its state, from which each call begins anew."""

    def step(state: PyTree, inputs: PyTree, h: PyTree) -> PyTree:
        cell = nnx.merge(graph, state)
        cell.set_attributes(use_running_average=True, raise_if_not_found=False)
        before = jax.tree.leaves(nnx.state(cell, nnx.Not(MOVING)))
        image = cell(inputs, h)
        after = jax.tree.leaves(nnx.state(cell, nnx.Not(MOVING)))
        same = len(before) == len(after)
        if not (same and all(a is b for a, b in zip(before, after, strict=True))):
            raise ValueError(
                f"FixedPoint: `cell` ({type(cell).__name__}) changes its own state "
                "when called; a solver calls it many times. Only keys (nnx.RngState) "
                "and statistics (nnx.BatchStat) may move, once a solve; keep what else "
                "changes outside of the cell."
            )
        return image

    return step
