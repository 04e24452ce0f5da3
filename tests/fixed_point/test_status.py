"""``Status``: why a solver stopped, with a problem for each reason."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    Newton,
    Solution,
    Status,
)
from rbpjax.fixed_point.backward.rule import apply_rule
from tests.support.problems import RULES, rows

DONE, BUDGET, STUCK, NAN, ROUNDING, TRUNCATED, SINGULAR = Status


def test_every_status_has_words():
    """One line each, and no two the same; converged is 0 and nothing else is."""
    words = [status.words for status in Status]
    assert len(set(words)) == len(Status) and not any("\n" in w for w in words)
    assert [status for status in Status if not status] == [Status.CONVERGED]
    assert [s.name for s in Status] == [
        "CONVERGED",
        "OUT_OF_BUDGET",
        "STAGNATED",
        "NOT_FINITE",
        "ROUNDING",
        "TRUNCATED",
        "SINGULAR",
    ]


half = lambda h: 0.5 * h + 1.0
border = lambda h: 0.999 * h + 1.0
away = lambda h: 3.0 * h + 1.0  # h* = -1/2, from which it runs away
nowhere = lambda h: h + 1.0 + 0.1 * jnp.sin(h)  # no fixed point
broken = lambda h: jnp.nan * h
near = jnp.full(2, -0.5 + 1e-10)
FORWARD = [
    (FixedPointIteration(), half, DONE),
    (FixedPointIteration(steps=3), half, BUDGET),
    (FixedPointIteration(steps=60), half, DONE),
    (FixedPointIteration(max_steps=20), border, BUDGET),
    (FixedPointIteration(tol=1e-14), away, STUCK),
    (FixedPointIteration(), broken, NAN),
    (Anderson(), half, DONE),
    (Anderson(max_steps=1), nowhere, BUDGET),
    (Anderson(), broken, NAN),
    (rbpjax.Broyden(), half, DONE),
    (rbpjax.Broyden(max_steps=1), nowhere, BUDGET),
    (rbpjax.Broyden(), broken, NAN),
    (RRE(), half, DONE),
    (RRE(max_steps=1), nowhere, BUDGET),
    (RRE(), broken, NAN),
    (Newton(), half, DONE),
    (Newton(max_steps=1), lambda h: 3.0 * jnp.cos(h), BUDGET),
    (Newton(), nowhere, STUCK),
    (Newton(), broken, NAN),
]


@pytest.mark.parametrize(("solver", "step", "status"), FORWARD)
def test_forward(solver, step, status):
    """Each reason that a solver may have. Rounding is the adjoint's alone."""
    h0 = near if step is away else jnp.ones(2)
    solution = jax.jit(lambda h0: solver(step, h0))(h0)
    assert Status(int(solution.status)) is status
    assert bool(solution.converged) is (status is DONE)


def rotated(*eigenvalues):
    """A J with these eigenvalues, neither diagonal nor symmetric."""
    s = np.array([[1.0, 0.3, -0.2], [0.0, 1.0, 0.5], [0.1, 0.0, 1.0]])
    return jnp.asarray(s @ np.diag(eigenvalues) @ np.linalg.inv(s))


EASY = rotated(0.5, -0.3, 0.1)
WILD = rotated(-3.0, 2.0, 0.5)
# The last numbers below 1: I - J is 1e-16 there, and z as large as its inverse.
EDGE = jnp.array([[1 - 2.0**-53]])
ILL = EASY.at[0, 0].set(jnp.nan)
BACKWARD = [
    (Neumann(), EASY, DONE),
    (Neumann(max_steps=3), EASY, BUDGET),
    (Neumann(steps=3), EASY, TRUNCATED),
    (Neumann(steps=60), EASY, DONE),
    (Neumann(), WILD, STUCK),
    (Neumann(), ILL, NAN),
    (RBP(), EASY, DONE),
    (RBP(FixedPointIteration(max_steps=3)), EASY, BUDGET),
    (RBP(), ILL, NAN),
    (CGNormal(), WILD, DONE),
    (CGNormal(max_steps=1), WILD, BUDGET),
    (CGNormal(), jnp.eye(3), STUCK),
    (CGNormal(), rotated(1.0, 0.5, -3.0), STUCK),
    (CGNormal(), ILL, STUCK),  # the last finite residual was that of no step
    (CGNormal(), EDGE, ROUNDING),
    (BiCGSTAB(), WILD, DONE),
    (BiCGSTAB(max_steps=1), WILD, BUDGET),
    (BiCGSTAB(), jnp.eye(3), STUCK),
    (BiCGSTAB(), EDGE, ROUNDING),
    (GMRES(), WILD, DONE),
    (GMRES(max_steps=1), WILD, BUDGET),
    (GMRES(), jnp.eye(3), STUCK),
    (GMRES(), EDGE, ROUNDING),
    (Adaptive(), WILD, DONE),
    (Adaptive(max_steps=1), WILD, BUDGET),
    (Adaptive(), jnp.eye(3), SINGULAR),
    (Adaptive(), rotated(1.0, 0.5, -0.3), SINGULAR),
    (Adaptive(), rotated(1.0, 0.5, -3.0), STUCK),
    (Adaptive(), ILL, NAN),
    (Direct(), WILD, DONE),
    (Direct(tol=0.0), WILD, ROUNDING),
    (Direct(), EDGE, ROUNDING),
    (Direct(), ILL, NAN),
]


@pytest.mark.parametrize(("rule", "jac", "status"), BACKWARD)
def test_backward(rule, jac, status):
    """Each reason that a rule may have."""
    solution = adjoint(rule)(jac)
    assert Status(int(solution.status)) is status
    assert bool(solution.converged) is (status is DONE)


def adjoint(rule):
    """jac -> the rule's solution, compiled."""
    g = jnp.array([1.0, -2.0, 0.5])
    return jax.jit(lambda jac: apply_rule(rule, lambda v: jac.T @ v, g[: len(jac)]))


@pytest.mark.parametrize("name", rows(RULES.keys()))
def test_zero_is_converged_and_nothing_else(name):
    """For each rule, on easy, hard, singular and broken systems, under vmap too."""
    run = adjoint(RULES[name])
    edge = rotated(1 - 2.0**-50, 0.5, -0.5)
    jacs = jnp.stack([EASY, WILD, edge, jnp.eye(3), 0 * EASY, ILL])
    alone = [run(jac) for jac in jacs]
    together = jax.jit(jax.vmap(run))(jacs)
    for i, solution in enumerate(alone):
        assert bool(solution.converged) == (int(solution.status) == 0)
        assert int(together.status[i]) == int(solution.status), i
        assert bool(together.converged[i]) == bool(solution.converged), i
    assert bool(alone[0].converged) and not bool(alone[-1].converged)


# --- solvers of a user's own ---------------------------------------------------------


def scaled(a, x, h):
    return a * h + x


A, X, H = jnp.full(2, 0.5), jnp.ones(2), jnp.zeros(2)


def fields(solution):
    return [np.asarray(leaf).item() for leaf in solution[1:6]]


def test_what_a_solver_leaves_out_is_filled_in():
    """No steps, as many products as steps, residual unknown, a status from the rest."""
    cases = {
        (0, 0, 0, True): Solution(value=H, converged=True),
        (0, 0, 1, False): Solution(value=H, converged=False),
        (7, 7, 1, False): Solution(value=H, num_steps=7, converged=False),
        (7, 9, 2, False): Solution(H, num_steps=7, num_products=9, status=STUCK),
        (0, 0, 0, True, 0): Solution(value=H, status=DONE),
        (2, 2, 3, False): Solution(H, 2, status=jnp.int32(3), converged=False),
    }
    for want, given in cases.items():
        solve = rbpjax.rbp_solve(scaled, forward=lambda step, h0, s=given: s)
        found = jax.jit(solve)(A, X, H)
        steps, products, residual, status, converged = fields(found)
        assert (steps, products, status, converged) == want[:4]
        assert np.isnan(residual)
        for leaf, dtype in zip(found[1:6], "iifi?", strict=True):
            assert leaf.shape == () and leaf.dtype.kind in (dtype, "b"), leaf


def test_a_solver_must_say_whether_it_converged():
    """It is the one thing that cannot be filled in."""
    message = "must say whether it converged: Solution.value=…, converged=…"
    with pytest.raises(ValueError, match=f"forward solver.*{message}"):
        rbpjax.rbp_solve(scaled, forward=lambda step, h0: Solution(value=h0))(A, X, H)
    solve = rbpjax.rbp_solve(scaled, backward=lambda vjp, g: Solution(value=g))
    with pytest.raises(ValueError, match=f"backward rule.*{message}"):
        jax.grad(lambda a: jnp.sum(solve(a, X, H).value))(A)


def test_reports_carry_what_a_rule_says():
    """Status and products of the adjoint solve, as floats, added up over solves."""

    def rule(vjp, g):
        z = g + vjp(g)
        return Solution(value=z, num_steps=1, num_products=3, status=STUCK)

    solve = rbpjax.rbp_solve(scaled, backward=rule)
    loss = lambda probe: jnp.sum(solve(A, X, H, probe).value)
    report = jax.grad(loss)(AdjointReport.zeros())
    assert (report.num_steps, report.num_products) == (1.0, 3.0)
    assert (report.status, report.converged) == (2.0, 0.0)
    twice = jax.grad(lambda probe: loss(probe) + loss(probe))(AdjointReport.zeros())
    assert (twice.status, twice.num_products, twice.converged) == (4.0, 6.0, 0.0)


# --- starts --------------------------------------------------------------------------


@pytest.mark.full
def test_a_third_parameter_never_receives_the_start():
    """Whatever it is called: only a keyword ``start`` does."""
    seen = []

    def truncated(vjp, g, terms=2):
        seen.append(terms)
        return Solution(value=g, converged=False)

    def partial_sum(vjp, g, /, *more, start=None):
        seen.append((more, start is not None))
        return Solution(value=g, converged=False)

    def by_name(vjp, g, start=None):
        seen.append(start is not None)
        return Solution(value=g, converged=False)

    warm = AdjointReport.zeros(adjoint=jnp.ones(2))

    def gradient(rule, probe):
        solve = rbpjax.rbp_solve(scaled, backward=rule)
        return jax.grad(lambda a: jnp.sum(solve(a, X, H, probe).value))(A)

    with pytest.raises(ValueError, match=r"takes no start.*vjp, cotangent, start=z"):
        gradient(truncated, warm)
    with pytest.raises(ValueError, match="takes no start"):
        rbpjax.rbp_vjp(scaled, A, X, H, X, backward=truncated, start=X)
    gradient(truncated, AdjointReport.zeros())
    gradient(partial(truncated, terms=5), None)
    for probe in (None, warm):
        gradient(partial_sum, probe)
        gradient(by_name, probe)
    assert seen == [2, 5, ((), False), False, ((), True), True]
