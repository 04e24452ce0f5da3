"""Whoever solves the collection: this library's solvers and its peers' behind one call.

A solver is a function ``(problem, arrays) -> Found``, the arrays in its precision. All
have their own defaults, but the tolerance ε^¾ and a budget of 1,000 steps, which are
this library's; what these mean is up to each. banax needs Python 3.12 or newer.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import rbpjax
from benchmarks.comparison.collection.judge import loss
from benchmarks.comparison.collection.problem import Problem

BUDGET = 1000


class Found(NamedTuple):
    """What a solver said.

    Attributes:
      value: the state.
      converged: whether it claims success.
      status: why it stopped, in a word or two.
      work: evaluations of f and products with J, as the solver counts them.
      gradient: of ``judge.loss`` for params, or None where it was not asked for.
      report: what the report of the adjoint solve says: whether it converged.
    """

    value: Any
    converged: bool
    status: str
    work: int
    gradient: Any = None
    report: bool = False


Solver = Callable[[Problem, tuple], Found]


def default_forward() -> rbpjax.ForwardSolver:
    """The forward solver that ``rbp_solve`` takes if it is given none."""
    return inspect.signature(rbpjax.rbp_solve).parameters["forward"].default


def program(forward: rbpjax.ForwardSolver, f: Callable) -> Callable:
    """``(params, inputs, h0) -> (solution, gradient, report converged)``, in one."""
    solve = rbpjax.rbp_solve(f, forward=forward)

    def run(params: Any, inputs: Any, h0: Any) -> tuple:
        def of(params: Any, probe: Any) -> tuple:
            solution = solve(params, inputs, h0, probe=probe)
            return loss(solution.value), solution

        zeros = rbpjax.AdjointReport.zeros()
        found = jax.value_and_grad(of, (0, 1), has_aux=True)(params, zeros)
        (_, solution), (gradient, report) = found
        return solution, gradient, report.converged

    return run


def told(solution: rbpjax.Solution, gradient: Any, report: Any) -> Found:
    """What this library said, of one problem."""
    return Found(
        solution.value,
        bool(solution.converged),
        rbpjax.Status(int(solution.status)).name.lower().replace("_", " "),
        int(solution.num_products),
        gradient,
        bool(report == 1),
    )


def ours(
    make: Callable[[], rbpjax.ForwardSolver], problem: Problem, arrays: tuple
) -> Found:
    """The value and the gradient by the default rule."""
    return told(*jax.device_get(jax.jit(program(make(), problem.f))(*arrays)))


def tolerance(h0: Any) -> float:
    """Three quarters of the digits."""
    return float(jnp.finfo(jax.tree.leaves(h0)[0].dtype).eps) ** 0.75


def jaxopt(name: str, problem: Problem, arrays: tuple) -> Found:
    import jaxopt

    params, inputs, h0 = arrays
    made = getattr(jaxopt, name)(
        lambda h, params, inputs: problem.f(params, inputs, h),
        maxiter=BUDGET,
        tol=tolerance(h0),
    )
    value, state = jax.jit(made.run)(jax.tree.map(jnp.asarray, h0), params, inputs)
    done = float(state.error) <= made.tol
    return Found(value, done, "" if done else "not converged", int(state.iter_num))


def optimistix(name: str, problem: Problem, arrays: tuple) -> Found:
    import optimistix as optx

    # lineax raises from compiled code, whatever `throw` says; it is recorded as a stop.
    logging.getLogger("jax").setLevel(logging.CRITICAL)
    params, inputs, h0 = arrays
    solver = getattr(optx, name)(rtol=tolerance(h0), atol=tolerance(h0))

    @jax.jit
    def run(params: Any, inputs: Any, h0: Any) -> tuple:
        solution = optx.fixed_point(
            lambda h, args: problem.f(*args, h),
            solver,
            h0,
            args=(params, inputs),
            max_steps=BUDGET,
            throw=False,
        )
        # Not all of it: Dogleg's state holds what is no array.
        done = solution.result == optx.RESULTS.successful
        return solution.value, done, solution.stats["num_steps"]

    value, done, steps = run(params, inputs, jax.tree.map(jnp.asarray, h0))
    done, steps = bool(done), int(steps)
    n = sum(a.size for a in jax.tree.leaves(h0))
    work = steps * (1 if name == "FixedPointIteration" else n + 1)  # a dense Jacobian
    return Found(value, done, "" if done else "not converged", work)


def banax(name: str, problem: Problem, arrays: tuple) -> Found:
    from banax import adjoint, solver

    params, inputs, h0 = arrays
    made = getattr(solver, name)(rtol=tolerance(h0), max_steps=BUDGET)
    run = adjoint.Implicit(made, made)

    @jax.jit
    def solve(params: Any, inputs: Any, h0: Any) -> tuple:
        solution = run(lambda h: problem.f(params, inputs, h), h0)
        return solution.value, solution.result, solution.stats.steps

    value, result, steps = solve(params, inputs, jax.tree.map(jnp.asarray, h0))
    done = int(result) == 0
    return Found(value, done, "" if done else "not converged", int(steps))


def scipy(method: str, problem: Problem, arrays: tuple) -> Found:
    """On the flat real vector, with dense Jacobians from JAX for MINPACK's hybr."""
    import scipy.optimize

    params, inputs, h0 = arrays
    flat0, unravel = ravel_pytree(jax.tree.map(jnp.asarray, h0))
    state = unravel
    if jnp.iscomplexobj(flat0):
        state = lambda v: unravel(jax.lax.complex(*jnp.split(v, 2)))
    start = _real(h0)
    residual = lambda v: _real(problem.f(params, inputs, state(v))) - v
    called = jax.jit(residual)
    jac = jax.jit(jax.jacfwd(residual))
    narrow = lambda v: jnp.asarray(v, start.dtype)
    wide = lambda a: np.asarray(a, np.float64)
    more: dict[str, Any]
    if method == "hybr":
        more = {"jac": lambda v: wide(jac(narrow(v))), "options": {"maxfev": BUDGET}}
    else:  # its tolerance is one of the residual's largest entry
        more = {"options": {"maxiter": BUDGET // 10, "fatol": tolerance(h0)}}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = scipy.optimize.root(
            lambda v: wide(called(narrow(v))), wide(start), method=method, **more
        )
    work = int(found.get("nfev", 0)) + start.size * int(found.get("njev", 0))
    value = jax.device_get(state(narrow(found.x)))
    done = bool(found.success)
    return Found(value, done, "" if done else "not converged", work)


def _real(h: Any) -> jax.Array:
    """A flat vector, the complex one as real parts and then imaginary parts."""
    flat = ravel_pytree(h)[0]
    if jnp.iscomplexobj(flat):
        return jnp.concatenate([flat.real, flat.imag])
    return flat


OURS: dict[str, Callable[[], rbpjax.ForwardSolver]] = {
    "default": default_forward,
    "iteration": rbpjax.FixedPointIteration,
    "anderson": rbpjax.Anderson,
    "newton": rbpjax.Newton,
}
SOLVERS: dict[str, Solver] = {
    **{name: partial(ours, make) for name, make in OURS.items()},
    "jaxopt-iteration": partial(jaxopt, "FixedPointIteration"),
    "jaxopt-anderson": partial(jaxopt, "AndersonAcceleration"),
    "optimistix-newton": partial(optimistix, "Newton"),
    "optimistix-dogleg": partial(optimistix, "Dogleg"),
    "banax-picard": partial(banax, "Picard"),
    "banax-anderson": partial(banax, "Anderson"),
    "banax-broyden": partial(banax, "Broyden"),
    "scipy-hybr": partial(scipy, "hybr"),
    "scipy-krylov": partial(scipy, "krylov"),
}
