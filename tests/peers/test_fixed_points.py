"""The fixed points and roots of peers' own test suites, with this library's defaults.

The problems are those of jaxopt (fixed_point_iteration, anderson, broyden,
implicit_diff) and optimistix (fixed_point, root_find), posed anew: a scalar state, one
parameter a, and an answer by bisection. All of a table run in one compiled batch.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import rbpjax
from rbpjax import AdjointReport, Solution, Status

# The default tolerances of float64 are ε^¾ = 2e-12; |1 / (1 - f')| is below 50 in all
# tables, and the second derivatives of f are of order one.
RTOL = 1e-9
STEP = 0.1  # of all time steps
MLP = np.random.default_rng(1).normal(size=(3, 4)) / 4


class Map(NamedTuple):
    """A map f(a, h), its a, a start, and an interval with one fixed point in it."""

    f: Callable
    a: float
    h0: float
    low: float
    high: float


def network(a, h):
    """A small network of one input: a contraction."""
    w = jnp.asarray(MLP, h.dtype)
    return jnp.dot(w[0], jnp.tanh(w[1] * h + a * w[2]))


def decay(h):
    return -3.0 * h


def pull(h):
    return -jnp.sin(h) - h**3 / 10


def implicit_euler(rate, a, h):
    return a + STEP * rate(h)


def midpoint(rate, a, h):
    return a + STEP * rate((a + h) / 2)


def trapezium(rate, a, h):
    return a + STEP * (rate(a) + rate(h)) / 2


FIXED_POINTS = {
    "jaxopt: cosine": Map(lambda a, h: a * jnp.cos(h), 1.0, 1.0, 0.0, 1.0),
    "jaxopt: cosine, shifted": Map(
        lambda a, h: jnp.cos(h) + a + jnp.pi / 2, 0.5, 1.0, 0.0, 4.0
    ),
    "jaxopt: affine contraction": Map(lambda a, h: a * h + 7.0, 0.5, 0.0, 0.0, 20.0),
    "jaxopt: affine, repelling": Map(lambda a, h: a * h + 7.0, -2.5, 0.0, 0.0, 20.0),
    "jaxopt: geometric decay": Map(lambda a, h: a * h, 0.5, 1.0, -1.0, 1.0),
    "optimistix: exp(-h)": Map(lambda a, h: jnp.exp(-a * h), 1.0, 1.0, 0.0, 1.0),
    "optimistix: a network": Map(network, 0.7, 0.0, -3.0, 3.0),
    "optimistix: implicit Euler, linear": Map(
        partial(implicit_euler, decay), 1.0, 1.0, 0.0, 2.0
    ),
    "optimistix: implicit Euler, nonlinear": Map(
        partial(implicit_euler, pull), 1.0, 1.0, 0.0, 2.0
    ),
    "optimistix: midpoint, linear": Map(partial(midpoint, decay), 1.0, 1.0, 0.0, 2.0),
    "optimistix: midpoint, at rest": Map(partial(midpoint, decay), 0.0, 1.0, -1.0, 1.0),
    "optimistix: midpoint, nonlinear": Map(partial(midpoint, pull), 1.0, 1.0, 0.0, 2.0),
    "optimistix: trapezium, nonlinear": Map(
        partial(trapezium, pull), 1.0, 1.0, 0.0, 2.0
    ),
}


def root(function: Callable) -> Callable:
    """The README's recipe for a root: h - F(h)."""
    return lambda a, h: h - function(a, h)


ROOTS = {
    "jaxopt: 1 - h sin h": Map(
        root(lambda a, h: a - h * jnp.sin(h)), 1.0, 1.2, 0.5, 1.8
    ),
    "jaxopt: cos h + 1": Map(root(lambda a, h: jnp.cos(h) + a), 0.5, 2.0, 1.0, 3.0),
    "optimistix: h² = a": Map(root(lambda a, h: h**2 - a), 2.0, 1.0, 0.1, 3.0),
    "optimistix: h³ - h - a": Map(root(lambda a, h: h**3 - h - a), 2.0, 1.0, 1.0, 3.0),
    "optimistix: tanh(h - a), far": Map(
        root(lambda a, h: jnp.tanh(h - a)), 1.0, 3.0, 0.0, 5.0
    ),
    "optimistix: arctan(h - a), far": Map(
        root(lambda a, h: jnp.arctan(h - a)), 5.0, 15.0, 4.0, 7.0
    ),
    "optimistix: sin(h)": Map(root(lambda a, h: jnp.sin(a * h)), 1.0, 0.4, -1.0, 1.0),
    "optimistix: exp(h) - a": Map(
        root(lambda a, h: jnp.exp(h) - a), 3.0, 0.0, 0.0, 2.0
    ),
    "scipy: Lambert's W": Map(
        root(lambda a, h: h * jnp.exp(h) - a), 5.0, 1.0, 0.0, 3.0
    ),
}
MAPS = FIXED_POINTS | ROOTS


@cache
def solved() -> dict[str, tuple]:
    """Name -> solution, gradient of h* for a, report; one program for all maps."""
    maps = list(MAPS.values())
    branches = [m.f for m in maps]
    f = lambda a, index, h: lax.switch(index, branches, a, h)
    solve = rbpjax.rbp_solve(f)

    def one(a, index, h0):
        def loss(a, probe):
            solution = solve(a, index, h0, probe=probe)
            return solution.value, solution

        gradient = jax.grad(loss, (0, 1), has_aux=True)
        (da, report), solution = gradient(a, AdjointReport.zeros())
        return solution, da, report

    arrays = jnp.array([m.a for m in maps]), jnp.arange(len(maps))
    found = jax.jit(jax.vmap(one))(*arrays, jnp.array([m.h0 for m in maps]))
    each = lambda i: jax.tree.map(lambda leaf: leaf[i], found)
    return {name: each(i) for i, name in enumerate(MAPS)}


def bisected(m: Map) -> float:
    """The fixed point in the interval, to the last bits."""
    low, high = m.low, m.high
    sign = lambda h: np.sign(float(m.f(m.a, jnp.float64(h))) - h)
    first = sign(low)
    assert first * sign(high) < 0, "the interval must hold a fixed point"
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sign(middle) == first else (low, middle)
    return (low + high) / 2


@pytest.mark.parametrize("name", MAPS)
def test_scalar_maps(name):
    """Value and derivative ∂f/∂a / (1 - ∂f/∂h), and both solves say converged.

    But where the derivative is zero: no relative error of it can be stated there.
    """
    m = MAPS[name]
    solution, da, report = solved()[name]
    with jax.disable_jit():
        want = bisected(m)
        slope_a, slope_h = jax.grad(m.f, (0, 1))(jnp.float64(m.a), jnp.float64(want))
    assert Status(int(solution.status)) == Status.CONVERGED
    assert solution.converged
    # Where the answer is zero, it is meant to be near on the scale of the start.
    scale = max(abs(want), abs(m.h0) if abs(want) < 1e-12 else 0.0)
    assert abs(solution.value - want) <= RTOL * scale
    exact = slope_a / (1 - slope_h)
    assert report.converged == 1 or abs(exact) < 1e-12
    assert abs(da - exact) <= RTOL * max(abs(exact), scale)


def sine_of_turn(theta, _, h):
    """jaxopt's test of implicit differentiation: a pytree, coupled by a rotation."""
    c, s = 0.9 * jnp.cos(theta), 0.9 * jnp.sin(theta)
    return {"x": c * h["x"] - s * h["y"] + 1.0, "y": s * h["x"] + c * h["y"]}


def test_jaxopt_rotation_of_a_pytree():
    """A contraction by a rotation (anderson_test): complex eigenvalues, two leaves.

    Against (1 - 0.9 e^{iθ})⁻¹ and its derivative, in closed form.
    """
    solve = rbpjax.rbp_solve(sine_of_turn)
    h0 = {"x": jnp.zeros(()), "y": jnp.zeros(())}

    def loss(theta):
        solution = solve(theta, None, h0)
        return solution.value["x"] + 2 * solution.value["y"], solution

    theta = jnp.float64(1.1)
    (_, solution), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(theta)
    turn = 0.9 * np.exp(1.1j)
    want = 1 / (1 - turn)
    assert solution.converged
    got = solution.value
    chex.assert_trees_all_close(got, {"x": want.real, "y": want.imag}, rtol=RTOL)
    change = 1j * turn * want**2
    chex.assert_trees_all_close(slope, change.real + 2 * change.imag, rtol=RTOL)


@pytest.mark.parametrize("start", [1.0, 0.1])
def test_jaxopt_sine_ends_near_its_fixed_point(start):
    """sin(h) = h at zero alone, where I - J is singular (anderson_test).

    The residual is small as asserted there; whatever is said to be converged is within
    the root of the tolerance, ε^⅜: h - sin(h) is h³ / 6.
    """
    solution = jax.jit(rbpjax.rbp_solve(lambda a, _, h: jnp.sin(a * h)))(
        jnp.float64(1), None, jnp.float64(start)
    )
    assert abs(jnp.sin(solution.value) - solution.value) < 1e-6
    assert abs(solution.value) < 0.02  # (6e-6)^⅓


def test_jaxopt_flat_landscape_has_a_derivative():
    """Roots at zero for every parameter (broyden_test): the value does not jump.

    F = h³ + θ h has the root 0 for all θ > 0, so that value and derivative are zero.
    """
    solve = rbpjax.rbp_solve(lambda t, _, h: h - (h**3 + t * h))
    value = jax.jit(lambda t: solve(t, None, jnp.array([0.4, -0.3])).value)
    here, there = value(jnp.float64(0.7)), value(jnp.float64(0.7 + 1e-5))
    assert jnp.abs(here).max() < 1e-10 and jnp.abs(there).max() < 1e-10
    slope = jax.jacrev(value)(jnp.float64(0.7))
    assert jnp.abs(slope).max() < 1e-9


@cache
def without_a_root() -> Solution:
    """Maps without any fixed point, each from two starts, in one program."""
    branches = [
        lambda h: h - (h**2 + 1),  # optimistix: bad_root
        lambda h: h + 1,
        lambda h: h + jnp.exp(-h),
        lambda h: jnp.sqrt(1 + h**2),
        lambda h: jax.nn.softplus(h),
        lambda h: h - (2 + jnp.sin(h)),
    ]
    solve = rbpjax.rbp_solve(lambda a, i, h: a * lax.switch(i, branches, h))
    each = lambda i, h0: solve(jnp.float64(1), i, h0)
    count = len(branches)
    starts = jnp.concatenate([jnp.zeros(count), jnp.full(count, 30.0)])
    return jax.jit(jax.vmap(each))(jnp.tile(jnp.arange(count), 2), starts)


@pytest.mark.parametrize("case", range(12))
def test_optimistix_what_has_no_root_is_not_converged(case):
    """No claim of success, and a status that says why."""
    solution = without_a_root()
    assert not solution.converged[case]
    assert Status(int(solution.status[case])) != Status.CONVERGED


def test_optimistix_the_best_is_kept_when_the_budget_is_over():
    """Of an iteration that is cut short: the residual is that of the value returned."""
    step = lambda h: 0.9 * h + 1
    solution = rbpjax.FixedPointIteration(max_steps=5)(step, jnp.zeros(2))
    assert not solution.converged
    residual = jnp.abs(step(solution.value) - solution.value).max()
    assert residual <= 0.9**5 + 1e-12  # that of five steps from zero
