"""Implicit differentiation of what other solvers found, and of roots."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import reuse, sharding, tree
from rbpjax._core.step import ClosedStep, close, select_state, with_aux
from rbpjax._core.strategy import filled, split, strategy
from rbpjax.fixed_point.backward.adaptive import Adaptive
from rbpjax.fixed_point.contract import apply_solver, check_solution, check_solver
from rbpjax.fixed_point.iterate import relative_change, status_of
from rbpjax.fixed_point.newton import Newton
from rbpjax.fixed_point.report import AdjointReport
from rbpjax.fixed_point.solve import rbp_solve
from rbpjax.fixed_point.speech import OnFailure, check_choice, heard, speaking
from rbpjax.types import (
    BackwardRule,
    ForwardSolver,
    PyTree,
    Solution,
    Solve,
    Status,
    StepFn,
)

Finder = Callable[[PyTree, PyTree, PyTree], PyTree]
"""A solver of one's own: (params, inputs, h0) -> h*, or a Solution."""

ROUNDS = 10
"""How often a root's equation is brought to scale anew, at most."""


def rbp_fixed_point(
    f: StepFn,
    *,
    backward: BackwardRule = Adaptive(),
    has_aux: bool = False,
    on_failure: OnFailure = "ignore",
) -> Callable[[Finder], Solve]:
    """Gives the answer of any solver the gradient of the fixed point h* = f(θ, x, h*).

    ``rbp_fixed_point(f)(solver)`` is called, and differentiated, as what ``rbp_solve``
    returns; only that ``solver(params, inputs, h0)`` finds h*. It is never
    differentiated nor called with what is being differentiated, so that outside ``jit``
    it may be NumPy or SciPy code, or read h* from a file; under ``jit`` such code goes
    into ``jax.pure_callback``. The gradient is exact, truncated or unbiased as the rule
    is, and one of nothing in particular where h* is no fixed point: that is measured,
    by one evaluation of f, and said in ``Solution.converged``.

    Cost and memory: those of the solver, and of ``rbp_solve`` backward. AD modes:
    reverse, to every order.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      backward: any ``BackwardRule``.
      has_aux: whether f returns a pair ``(h, aux)``, as with ``rbp_solve``.
      on_failure: ``"ignore"``, ``"warn"``, ``"nan"`` or ``"raise"``, as there.

    Returns:
      ``wrap(solver) -> solve`` with ``solve(params, inputs, h0, probe=None) ->
      Solution``. The solver returns h*, a pytree of floating-point arrays, or a
      ``Solution``, whose steps are kept, as is its status where it is not converged.
      ``h0`` is handed to it as it is: any pytree, or None.

    Raises:
      ValueError: as ``rbp_solve``, with h* in the place of h0.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from rbpjax import rbp_fixed_point
      >>> f = lambda a, x, h: a * jnp.cos(h) + x
      >>> def solver(a, x, h):  # NumPy, in float64
      ...     for _ in range(100):
      ...         h = np.asarray(a) * np.cos(h) + np.asarray(x)
      ...     return h
      >>> solve = rbp_fixed_point(f)(solver)
      >>> grad = jax.grad(lambda a: solve(a, 1.0, 0.0).value)(0.5)
      >>> round(float(grad), 4)  # cos h* / (1 + a sin h*)
      0.2557

    References:
      Liao et al. 2018, equations 4 to 9. Others' words for it: ``custom_fixed_point``
      in jaxopt, ``implicit_jvp`` in optimistix.
    """
    check_choice(on_failure)
    backward = speaking(backward, on_failure)
    solve_from = rbp_solve(
        select_state(f) if has_aux else f, forward=AsItIs(), backward=backward
    )

    def wrap(solver: Finder) -> Solve:
        _check_finder("rbp_fixed_point", solver)

        def solve(
            params: PyTree,
            inputs: PyTree,
            h0: PyTree = None,
            probe: AdjointReport | None = None,
        ) -> Solution:
            """Finds h* by the solver; its gradient is that of the fixed point."""
            found = lax.stop_gradient(solver(*_constant((params, inputs, h0))))
            given = found if isinstance(found, Solution) else None
            h = found if given is None else given.value
            solution = solve_from(params, inputs, h, probe)
            solution = heard(_with_given(solution, given), on_failure, "forward")
            return with_aux(f, params, inputs, solution) if has_aux else solution

        return solve

    return wrap


def rbp_root(
    F: Callable[[PyTree, PyTree, PyTree], PyTree],
    *,
    forward: ForwardSolver = Newton(),
    solver: Finder | None = None,
    backward: BackwardRule = Adaptive(),
    has_aux: bool = False,
    on_failure: OnFailure = "ignore",
) -> Solve:
    """Transforms a function into a differentiable solver of its root.

    ``solve(params, inputs, h0)`` returns h* with F(params, inputs, h*) = 0. Its
    gradient is that of the root: with the cotangent g, the backward rule solves

        (∂F/∂h)ᵀ z = g,

    and params and inputs receive -(∂F/∂θ)ᵀz and -(∂F/∂x)ᵀz. Exact up to the two
    tolerances wherever ∂F/∂h is invertible, whatever its sign, size and units.

    What is solved is the fixed point of h - sF(h), where the numbers s, one a leaf, are
    F's scale along one random direction: so that a residual means the same, relative to
    h, in whatever units F is written, and h - sF does not round F away. s is found at
    h0 and again where a solve has ended, until the two agree.

    A loss's minimum is the root of its gradient, however it was trained:
    ``rbp_root(jax.grad(loss, argnums=2), solver=train)``, with any optimizer.

    Cost: forward what the solver takes, and a product with ∂F/∂h for each scale;
    ``num_steps`` and ``num_products`` are the solver's. Backward as ``rbp_solve``. AD
    modes: reverse, to every order.

    Args:
      F: ``F(params, inputs, h)``, a pytree like ``h`` in structure, shapes and dtypes.
      forward: any ``ForwardSolver`` that finds h with h = step(h); iterations of the
        step alone rarely converge here.
      solver: finds h* in the place of ``forward``, as that of ``rbp_fixed_point``: any
        ``solver(params, inputs, h0) -> h*``, never differentiated.
      backward: any ``BackwardRule``.
      has_aux: whether F returns a pair ``(residual, aux)``, as with ``rbp_solve``.
      on_failure: ``"ignore"``, ``"warn"``, ``"nan"`` or ``"raise"``, as there.

    Returns:
      ``solve(params, inputs, h0, probe=None) -> Solution``, as of ``rbp_solve``.

    Raises:
      ValueError: as ``rbp_solve``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import rbp_root
      >>> solve = rbp_root(lambda a, x, h: h**2 - a)
      >>> value, grad = jax.value_and_grad(lambda a: solve(a, None, 1.0).value)(2.0)
      >>> round(float(value), 4), round(float(grad), 4)  # √a and 1 / (2√a)
      (1.4142, 0.3536)

    References:
      The implicit function theorem; ``jax.lax.custom_root``, jaxopt's ``custom_root``.
    """
    for name, value in (("F", F), ("forward", forward), ("backward", backward)):
        if not callable(value):
            raise ValueError(f"rbp_root: `{name}` must be callable; got {value!r}.")
    check_solver(forward)
    if solver is not None:
        _check_finder("rbp_root", solver)
    check_choice(on_failure)
    backward = speaking(backward, on_failure)
    numbers, forward = split(forward)
    residual_of = select_state(F) if has_aux else F

    def solve(
        params: PyTree,
        inputs: PyTree,
        h0: PyTree,
        probe: AdjointReport | None = None,
    ) -> Solution:
        """Solves F(params, inputs, h*) = 0 from h0."""
        given = None
        if solver is not None:
            h0 = lax.stop_gradient(solver(*_constant((params, inputs, h0))))
            given, h0 = (h0, h0.value) if isinstance(h0, Solution) else (None, h0)
        closed, args, h = close(residual_of, params, inputs, lax.stop_gradient(h0))
        fixed = lax.stop_gradient(args)
        found = None
        if solver is None:
            of_solver = lax.stop_gradient(numbers)
            found = reuse.run(_root, (closed, forward), of_solver, fixed, h)
            h = found.value
        scale = reuse.run(_scale_at, (closed,), fixed, h)

        def f(params: PyTree, inputs: PyTree, h: PyTree) -> PyTree:
            # Of F = 0 times s the root does not depend on s.
            return _step(lax.stop_gradient(scale), h, residual_of(params, inputs, h))

        solve_from = rbp_solve(f, forward=AsItIs(), backward=backward)
        solution = solve_from(params, inputs, h, probe)
        solution = _with_given(solution, given)
        if found is not None:  # whose verdict is of more than one residual
            solution = found._replace(value=solution.value)
        solution = heard(solution, on_failure, "forward")
        return with_aux(F, params, inputs, solution) if has_aux else solution

    return solve


def from_args(
    f: Callable[..., PyTree], make: Callable[[StepFn], Solve] = rbp_solve
) -> Callable[..., Solution]:
    """A solver for a step function of any signature: ``f(h, *args, **kwargs)``.

    ``from_args(f)(h0, *args, **kwargs)`` is ``rbp_solve`` of f with ``args`` for params
    and ``kwargs`` for inputs: all of them receive gradients. Cost, errors and AD modes
    are those of what ``make`` makes.

    Args:
      f: ``f(h, *args, **kwargs) -> h``, or what ``make`` takes in a step's place.
      make: ``rbp_solve``, ``rbp_root``, or one of them with options, such as
        ``functools.partial(bptt, num_steps=20)``.

    Returns:
      ``solve(h0, *args, probe=None, **kwargs) -> Solution``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import from_args, rbp_root
      >>> solve = from_args(lambda h, a, x, shift=0.0: a * h + x + shift)
      >>> float(solve(0.0, 0.5, 1.0, shift=1.0).value.round(3))
      4.0
      >>> root = from_args(lambda h, a: h**2 - a, rbp_root)
      >>> round(float(jax.grad(lambda a: root(1.0, a).value)(4.0)), 3)
      0.25

    References:
      The calls of jaxopt (``run(init, *args, **kwargs)``) are the source.
    """
    solve = make(lambda args, kwargs, h: f(h, *args, **kwargs))

    def free(
        h0: PyTree, *args: PyTree, probe: AdjointReport | None = None, **kwargs: PyTree
    ) -> Solution:
        """Solves from h0 with these arguments of f."""
        return solve(args, kwargs, h0, probe)

    return free


def _check_finder(owner: str, solver: object) -> None:
    """Raises ValueError unless a solver of one's own can be called."""
    if not callable(solver):
        raise ValueError(
            f"{owner}: the solver must be callable, as solver(params, inputs, h0) -> "
            f"h*; got {solver!r}."
        )


def _constant(x: PyTree) -> PyTree:
    """``x`` without derivatives; NumPy arrays and what is no array as they are."""
    fix = lambda u: lax.stop_gradient(u) if isinstance(u, jax.core.Tracer) else u
    return jax.tree.map(fix, x)


@strategy
class AsItIs:
    """A forward solver that takes the start for the answer, and measures it."""

    def __call__(self, step: Callable[[PyTree], PyTree], h0: PyTree) -> Solution:
        """The start, with its residual."""
        residual = relative_change(step(h0), h0)
        status = status_of(residual, tree.default_tol(h0), exhausted=True)
        converged = status == Status.CONVERGED
        return Solution(h0, jnp.int32(0), jnp.int32(1), residual, status, converged)


def _with_given(solution: Solution, given: Solution | None) -> Solution:
    """The measured solution with the steps, and the failure, that a solver told."""
    if given is None:
        return solution
    given = check_solution(
        given._replace(value=solution.value), solution.value, "the solver"
    )
    either = lambda ours, theirs: jnp.where(given.converged, ours, theirs)
    return solution._replace(
        num_steps=given.num_steps,
        num_products=given.num_products,
        status=either(solution.status, given.status),
        converged=solution.converged & given.converged,
    )


def _step(scale: PyTree, h: PyTree, residual: PyTree) -> PyTree:
    """The step whose fixed point is the root: h - sF(h)."""
    leaf = lambda s, u, r: u - s.astype(u.dtype) * r
    return jax.tree.map(leaf, scale, h, residual)


class _Round(NamedTuple):
    """The solution so far, the scale it was found with, that at it, and the rounds."""

    solution: Solution
    used: PyTree
    scale: PyTree
    number: jax.Array


def _root(
    closed: ClosedStep,
    solver: ForwardSolver,
    numbers: list,
    args: PyTree,
    h0: PyTree,
) -> Solution:
    """The root found from h0, in F's scale there: solved anew where it was another."""
    residual, solver = partial(closed, args), filled(solver, numbers)

    def solved(h: PyTree, scale: PyTree) -> Solution:
        return apply_solver(solver, lambda u: _step(scale, u, residual(u)), h)

    def unfinished(now: _Round) -> jax.Array:
        pairs = zip(jax.tree.leaves(now.used), jax.tree.leaves(now.scale), strict=True)
        differ = lambda a, b: 2 * jnp.abs(a - b) > jnp.maximum(jnp.abs(a), jnp.abs(b))
        other = jnp.any(jnp.stack([differ(a, b) for a, b in pairs]))
        again = now.solution.converged & other & (now.number < ROUNDS)
        return (now.number == 0) | again

    def once(now: _Round) -> _Round:
        before, scale = now.solution, now.scale
        new = solved(before.value, scale)
        new = new._replace(
            aux=None,
            num_steps=before.num_steps + new.num_steps,
            num_products=before.num_products + new.num_products,
        )
        return _Round(new, scale, _scale(residual, new.value), now.number + 1)

    # The loop is entered without a solution, so that the solver is compiled once.
    scale = _scale(residual, h0)
    types = jax.eval_shape(solved, h0, scale)._replace(aux=None)
    nothing = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), types)
    nothing, number = sharding.vary_like((nothing, jnp.int32(0)), h0)
    start = _Round(nothing._replace(value=h0), scale, scale, number)
    return lax.while_loop(unfinished, once, start).solution


def _scale_at(closed: ClosedStep, args: PyTree, h: PyTree) -> PyTree:
    """F's scale at h."""
    return _scale(partial(closed, args), h)


def _scale(residual: Callable[[PyTree], PyTree], h: PyTree) -> PyTree:
    """One number s a leaf, so that sF changes with h about as h does.

    By the product of ∂F/∂h with one random direction that changes each leaf by its own
    size. s has the sign of that product along the direction: most often J of h - sF is
    then smaller. 1 where the product says nothing.
    """
    size = lambda u: jnp.where((n := tree.to_unit(u)[1]) == 0, 1, n)
    draws = tree.random_unit(jax.random.key(0), h)
    direction = jax.tree.map(lambda v, u: tree.scale(size(u), v), draws, h)
    _, image = jax.jvp(residual, (h,), (direction,))

    def leaf(v: jax.Array, w: jax.Array) -> jax.Array:
        (v, a), (w, b) = tree.to_unit(v), tree.to_unit(w)
        s = jnp.where(tree.vdot(v, w) < 0, -1, 1) * a / jnp.where(b == 0, 1, b)
        return jnp.where((b > 0) & jnp.isfinite(s), s, 1.0)

    return jax.tree.map(leaf, direction, image)
