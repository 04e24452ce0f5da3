"""Small maps with known Jacobians, the table of rules, and the dense oracle.

Each problem has what a symmetric contraction would hide: a non-symmetric Jacobian, or
complex eigenvalues, or a structured state, and a reference gradient that is not tiny.
A new backward rule is one row in RULES and is then tested by every file here.
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.flatten_util import ravel_pytree

import rbpjax
from rbpjax import (
    GMRES,
    RBP,
    RRE,
    Adaptive,
    AdjointReport,
    Anderson,
    BiCGSTAB,
    CGNormal,
    Direct,
    FixedPointIteration,
    Neumann,
    Phantom,
    Solution,
)

# The forward tolerance of all tests: about 50 roundings of float64.
FORWARD = FixedPointIteration(max_steps=5000, tol=1e-14)

# Converged against dense: both tolerances (1e-12, 1e-14) times a condition number of
# I - J, below 100 for all problems of this file, leave less than 1e-9.
CONVERGED_RTOL = 1e-8

# Identities between two ways of computing one number in float64.
IDENTITY_RTOL = 1e-10


class Problem(NamedTuple):
    f: Callable
    params: Any
    inputs: Any
    h0: Any


def _linear() -> Problem:
    """h = W h + x, a rotation of modulus 0.7 and a non-normal part: ρ(J) = 0.7."""
    w = jnp.array([[0.42, -0.56, 1.0], [0.56, 0.42, 0.5], [0.0, 0.0, -0.3]])
    x = jnp.array([1.0, -0.5, 0.3])
    return Problem(lambda w, x, h: w @ h + x, w, x, jnp.zeros(3))


def _tanh_rnn() -> Problem:
    """A batch of three, ‖W‖ about 0.9 and J's eigenvalues complex."""
    k1, k2 = jax.random.split(jax.random.key(1))
    w = jax.random.normal(k1, (6, 6)) / 6**0.5 * 0.6
    x = jax.random.normal(k2, (3, 6))
    f = lambda p, x, h: jnp.tanh(h @ p["w"].T + p["gain"] * x)
    return Problem(f, {"w": w, "gain": jnp.array(0.8)}, x, jnp.zeros((3, 6)))


def _pytree() -> Problem:
    """A state of two coupled leaves of different shapes, none a function of itself."""
    k1, k2, k3 = jax.random.split(jax.random.key(2), 3)
    params = (jax.random.normal(k1, (4, 6)) * 0.4, jax.random.normal(k2, (6, 4)) * 0.4)

    def f(params, x, h):
        a, b = params
        v = h["v"].reshape(6)
        return {
            "u": jnp.tanh(a @ v + x),
            "v": jax.nn.sigmoid(b @ h["u"] - v[::-1]).reshape(2, 3),
        }

    h0 = {"u": jnp.zeros(4), "v": jnp.zeros((2, 3))}
    return Problem(f, params, jax.random.normal(k3, (4,)), h0)


def _hopfield() -> Problem:
    """Clamped visible units and logistic gains: J = M W D is not symmetric."""
    w = jax.random.normal(jax.random.key(3), (9, 9)) * 1.5
    free = jnp.arange(9) >= 3

    def f(w, x, h):
        w = (w + w.T) * (1 - jnp.eye(9))
        return jnp.where(free, jax.nn.sigmoid(0.5 * h) @ w, x)

    x = jnp.array([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    return Problem(f, w * 0.5, x, x)


def _expansive() -> Problem:
    """ρ(J) = 1.5 > 1 with I - J well conditioned: no iteration of f reaches h*."""
    w = jnp.array([[0.0, -1.5, 0.2], [1.5, 0.0, 0.1], [0.0, 0.0, -1.2]])
    x = jnp.array([0.5, 1.0, -1.0])
    return Problem(lambda w, x, h: w @ h + x, w, x, jnp.zeros(3))


PROBLEMS = {
    "linear": _linear(),
    "tanh_rnn": _tanh_rnn(),
    "pytree": _pytree(),
    "hopfield": _hopfield(),
}
EXPANSIVE = _expansive()


def scipy_gmres(vjp, cotangent) -> Solution:
    """A user's own rule: any callable in the slot."""
    matvec = lambda z: jax.tree.map(jnp.subtract, z, vjp(z))
    z, _ = jax.scipy.sparse.linalg.gmres(matvec, cotangent, tol=1e-13, restart=30)
    residual = optax_norm(jax.tree.map(jnp.subtract, matvec(z), cotangent))
    return Solution(
        value=z, num_steps=1, residual=residual, converged=residual <= 1e-10
    )


def optax_norm(tree) -> jax.Array:
    return jnp.linalg.norm(ravel_pytree(tree)[0])


RULES = {
    "neumann": Neumann(tol=1e-12),
    "neumann_steps": Neumann(steps=400),
    "phantom": Phantom(steps=400, damping=0.2),
    "rbp": RBP(FixedPointIteration(tol=1e-13)),
    "rbp_uniform": RBP(FixedPointIteration(tol=1e-13), seed=7),
    "anderson": RBP(Anderson(tol=1e-13)),
    "rre": RBP(RRE(tol=1e-13)),
    "cg_normal": CGNormal(tol=1e-12),
    "bicgstab": BiCGSTAB(tol=1e-12),
    "gmres": GMRES(tol=1e-12, restart=12),
    "adaptive": Adaptive(tol=1e-12),
    "direct": Direct(),
    "callable": scipy_gmres,
}
# Those that stand for the others where a check is not run in its long form: a series, a
# method that takes J beside Jᵀ, and the default, which has the other loops inside.
REPRESENTATIVE = ("neumann", "cg_normal", "adaptive")
# Rules that take ρ(J) > 1.
ROBUST = (
    "anderson",
    "rre",
    "cg_normal",
    "bicgstab",
    "gmres",
    "adaptive",
    "direct",
    "callable",
)
# Rules whose number of steps does not depend on the problem.
FIXED_COUNT = ("neumann_steps", "phantom", "direct", "callable")


def rows(table: Any, default: Any = REPRESENTATIVE) -> list:
    """Parameters for each name or value of a table; all but ``default`` marked full."""
    pairs = table.items() if isinstance(table, dict) else ((n, n) for n in table)
    mark = lambda name: () if name in default else pytest.mark.full
    return [pytest.param(v, id=str(n), marks=mark(n)) for n, v in pairs]


def replace(rule: Callable, **fields: Any) -> Callable:
    """The rule, and the solver in it, with those of ``fields`` that it has and uses.

    What is ``None`` in it stays ``None``; a bare callable stays as it is.
    """
    if not dataclasses.is_dataclass(rule):
        return rule
    used = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    new = {k: v for k, v in fields.items() if used.get(k) is not None}
    if "solver" in used:
        new["solver"] = replace(used["solver"], **fields)
    return dataclasses.replace(rule, **new)


def readout(h) -> jax.Array:
    """A loss with a cotangent of distinct, non-vanishing entries."""
    flat = ravel_pytree(h)[0]
    return jnp.sum(jnp.arange(1.0, flat.size + 1).astype(flat.dtype) * jnp.sin(flat))


def loss_of(solve: Callable, problem: Problem) -> Callable:
    """(params, inputs) -> loss at the state that ``solve`` finds."""
    return lambda params, inputs: readout(solve(params, inputs, problem.h0).value)


_FIXED_POINTS: dict[Callable, Any] = {}  # by the step: each problem has its own


def fixed_point(problem: Problem) -> Any:
    """h* by Newton's method with dense Jacobians: right for any ρ(J)."""
    if problem.f not in _FIXED_POINTS:
        h, unravel = ravel_pytree(problem.h0)
        step = partial(problem.f, problem.params, problem.inputs)
        f = lambda h: ravel_pytree(step(unravel(h)))[0]
        newton = lambda h: (
            h - jnp.linalg.solve(jnp.eye(h.size) - jax.jacobian(f)(h), h - f(h))
        )
        h = jax.jit(lambda h: jax.lax.fori_loop(0, 50, lambda _, h: newton(h), h))(h)
        _FIXED_POINTS[problem.f] = unravel(h)
    return _FIXED_POINTS[problem.f]


def dense_jacobian(problem: Problem, h: Any) -> jax.Array:
    flat, unravel = ravel_pytree(h)
    step = partial(problem.f, problem.params, problem.inputs)
    return jax.jacobian(lambda v: ravel_pytree(step(unravel(v)))[0])(flat)


def dense_gradient(problem: Problem, h: Any = None) -> Any:
    """The gradient of ``readout`` with (I - Jᵀ) z = g solved by LU."""
    h = fixed_point(problem) if h is None else h
    flat, unravel = ravel_pytree(h)
    jac = dense_jacobian(problem, h)
    g = ravel_pytree(jax.grad(readout)(h))[0]
    z = jnp.linalg.solve(jnp.eye(flat.size) - jac.T, g)
    step = lambda params, inputs: problem.f(params, inputs, h)
    return jax.vjp(step, problem.params, problem.inputs)[1](unravel(z))


def assert_close(got, want, rtol: float) -> None:
    """Both pytrees agree to ``rtol`` relative to the whole of ``want``, not tiny."""
    got_flat, want_flat = ravel_pytree(got)[0], ravel_pytree(want)[0]
    size = jnp.linalg.norm(want_flat)
    assert size > 1e-3, f"the reference is too small to test anything: {size}"
    error = jnp.linalg.norm(got_flat - want_flat) / size
    assert error <= rtol, f"relative error {error:.3g} > {rtol:.3g}"


# The example of the tables of transformations: a tanh network of three units, ρ(J) up
# to 0.7, and a batch of four inputs, from nearly linear to saturated.
W = jnp.array([[0.3, -0.8, 0.1], [0.6, 0.2, -0.3], [0.0, 0.4, -0.2]])
XS = jnp.array([[0.1, -0.2, 0.3], [1.0, 2.0, -0.5], [-3.0, 0.5, 4.0], [0.0, 0.0, 0.7]])
ZEROS = AdjointReport.zeros


def tanh_step(w, x, h):
    return jnp.tanh(w @ h + x)


def solver_of(f, name):
    return rbpjax.rbp_solve(f, forward=FORWARD, backward=RULES[name])


def loss_and_report(name):
    """(w, x, probe) -> loss of one example, whose gradient for probe is the report."""
    solve = solver_of(tanh_step, name)
    return lambda w, x, probe: readout(solve(w, x, jnp.zeros(3), probe).value)


@cache
def alone(name):
    """(w, x, probe) -> gradient and report of one example: what others compare with."""
    return jax.jit(jax.grad(loss_and_report(name), (0, 1, 2)))


def reports_alone(name):
    """The reports of the examples one by one, stacked."""
    reports = [alone(name)(W, x, ZEROS())[2] for x in XS]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports)


@partial(jax.jit, static_argnames="f")
def dense(x, w=W, f=tanh_step):
    """The dense gradient for (w, x) of one example."""
    # 400 steps at a rate of at most 0.8 leave nothing but rounding.
    run = lambda h: jax.lax.fori_loop(0, 400, lambda _, h: f(w, x, h), h)
    return dense_gradient(Problem(f, w, x, jnp.zeros(3)), run(jnp.zeros(3)))


def total_dense():
    """The dense gradients of the sum over examples."""
    w_bar, x_bar = jax.vmap(dense)(XS)
    return w_bar.sum(0), x_bar


def assert_same_reports(got, want):
    """Step counts and verdicts agree exactly, residuals up to their own rounding."""
    chex.assert_trees_all_equal(got.num_steps, want.num_steps)
    chex.assert_trees_all_equal(got.converged, want.converged)
    chex.assert_trees_all_close(got.residual, want.residual, rtol=0, atol=1e-13)
    chex.assert_trees_all_close(got.cotangent_norm, want.cotangent_norm, rtol=1e-12)
