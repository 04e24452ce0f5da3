"""Words that all packages share: the step function, results, and protocols.

Legend used in all docstrings:

* ``f(params, inputs, h) -> h``: the step function, pure, on any pytrees.
* ``h``: the state; ``h_star`` (h*): a fixed point h* = f(θ, x, h*).
* J = ∂f/∂h at h*; ``vjp(v)`` = Jᵀv, ``jvp(v)`` = Jv.
* ``g``: the cotangent ∂L/∂h*; ``z``: the adjoint, (I - Jᵀ) z = g.
* ρ(J): spectral radius, the largest modulus of J's eigenvalues.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
from jax import export

if TYPE_CHECKING:
    from rbpjax.fixed_point.report import AdjointReport

PyTree = Any
"""Any nest of tuples, lists, dicts, … with arrays as leaves."""

StepFn = Callable[[PyTree, PyTree, PyTree], PyTree]
"""``f(params, inputs, h) -> h``: a state like ``h`` in structure, shapes and dtypes."""

LinearMap = Callable[[PyTree], PyTree]
"""A linear map from states to states, such as v ↦ Jᵀv."""


class Status(enum.IntEnum):
    """Why a solver stopped; ``Solution.status`` holds the number.

    Only ``CONVERGED`` is 0, so that a sum of several is 0 if all converged.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import FixedPointIteration, Status
      >>> solution = FixedPointIteration(max_steps=5)(lambda h: -h, jnp.ones(2))
      >>> Status(int(solution.status)).words
      'out of budget: max_steps were taken before the tolerance was met'
    """

    CONVERGED = 0
    OUT_OF_BUDGET = 1
    STAGNATED = 2
    NOT_FINITE = 3
    ROUNDING = 4
    TRUNCATED = 5
    SINGULAR = 6

    @property
    def words(self) -> str:
        """The status as one line for a person."""
        return _WORDS[self]


_WORDS = {
    Status.CONVERGED: "converged: the tolerance was met",
    Status.OUT_OF_BUDGET: (
        "out of budget: max_steps were taken before the tolerance was met"
    ),
    Status.STAGNATED: "stagnated: further steps made it no better, or worse",
    Status.NOT_FINITE: "not finite: no finite residual was found",
    Status.ROUNDING: (
        "rounding: the value is as good as this arithmetic has it, but its residual is "
        "above the tolerance, or below what rounding hides; I - J is ill-conditioned, "
        "or f computes in lower precision than its state"
    ),
    Status.SINGULAR: (
        "singular: f conserves something (I - J has a left null vector), and the loss "
        "depends on how much of it h0 brings; the gradient is right for what does not "
        "change it. Pin the total inside f, and it is so for all"
    ),
    Status.TRUNCATED: (
        "truncated: as many steps as were asked for; the residual says what is left, "
        "and above 1 it is worse than no step at all"
    ),
}


class Solution(NamedTuple):
    """What a solver returns: the value, and how good it is.

    A solver or rule of your own may leave out what it does not know, but not whether it
    converged: ``Solution(value=h, converged=done)``.

    Attributes:
      value: the state; same pytree as the start. With ``aux`` the only differentiable
        field.
      num_steps: number of steps taken, an int32 scalar.
      num_products: evaluations of f (for a fixed point), products with J or Jᵀ (for an
        adjoint; Newton's solver has both), an int32 scalar. Those that measure the
        residual are counted, though the compiler removes them where nobody reads it.
      residual: relative residual of ``value``, a float scalar. For a fixed point the
        largest over leaves of ‖f(h) - h‖ / max(‖h‖, ‖f(h)‖, ε · what ‖h‖ has been); for
        an adjoint ‖g + Jᵀz - z‖ / ‖g‖.
      status: why the solver stopped, a ``Status`` as an int32 scalar.
      converged: whether the solver reached its tolerance, a bool scalar. For a fixed
        point that is a residual of at most tol, and an estimated error of at most tol^⅔
        (3e-4 in float32, 1.5e-8 in float64 by default).
      aux: what f returned beside the state at ``value``, where it was asked for with
        ``has_aux=True``; differentiable, too. None elsewhere.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import Anderson
      >>> jnp.set_printoptions(precision=4, suppress=True)
      >>> solution = Anderson()(lambda h: 0.5 * jnp.cos(h), jnp.ones(2))
      >>> print(solution.converged, solution.value)
      True [0.4502 0.4502]
    """

    value: PyTree
    # Python numbers may be given, and None by whoever leaves a field out; what a solve
    # returns has arrays.
    num_steps: jax.Array = None  # pyrefly: ignore[bad-assignment]
    num_products: jax.Array = None  # pyrefly: ignore[bad-assignment]
    residual: jax.Array = None  # pyrefly: ignore[bad-assignment]
    status: jax.Array = None  # pyrefly: ignore[bad-assignment]
    converged: jax.Array = None  # pyrefly: ignore[bad-assignment]
    aux: PyTree = None


# A function that returns a solution can be exported and saved (``jax.export``).
export.register_namedtuple_serialization(Solution, serialized_name="rbpjax.Solution")


class Solve(Protocol):
    """What ``rbp_solve`` and ``bptt`` return: a differentiable solver."""

    def __call__(
        self,
        params: PyTree,
        inputs: PyTree,
        h0: PyTree,
        probe: AdjointReport | None = None,
    ) -> Solution:
        """Solves h* = f(params, inputs, h*) from ``h0``; see the function's maker."""
        ...


class ForwardSolver(Protocol):
    """Finds h with h = step(h). Any callable with this signature is a solver.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import Solution, rbp_solve
      >>> def hundred_steps(step, h0):
      ...     h = jax.lax.fori_loop(0, 100, lambda _, h: step(h), h0)
      ...     return Solution(h, num_steps=100, converged=True)
      >>> solve = rbp_solve(lambda a, x, h: a * h + x, forward=hundred_steps)
      >>> grad = jax.grad(lambda a: solve(a, 1.0, jnp.zeros(())).value)(0.5)
      >>> round(float(grad), 3)
      4.0
    """

    def __call__(self, step: Callable[[PyTree], PyTree], h0: PyTree, /) -> Solution:
        """Returns the fixed point found from ``h0``."""
        ...


class BackwardRule(Protocol):
    """Solves (I - Jᵀ) z = g, given v ↦ Jᵀv and g. Any such callable is a rule.

    J itself, where a rule needs it, is ``jax.linear_transpose(vjp, cotangent)``. A rule
    that can go on from an earlier adjoint takes it as the keyword ``start``, which is
    given only where there is one; a rule without it works as well, without warm starts.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import Solution, rbp_solve
      >>> def two_terms(vjp, cotangent):
      ...     z = jax.tree.map(jnp.add, cotangent, vjp(cotangent))
      ...     return Solution(z, num_steps=1, converged=False)
      >>> solve = rbp_solve(lambda a, x, h: a * h + x, backward=two_terms)
      >>> grad = jax.grad(lambda a: solve(a, 1.0, jnp.zeros(())).value)(0.5)
      >>> round(float(grad), 3)  # h* (1 + a), where h* / (1 - a) is right
      3.0
    """

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, /, *, start: PyTree | None = None
    ) -> Solution:
        """Returns the adjoint z."""
        ...
