"""Tolerances and budgets that are traced: of schedules, maps, and derivatives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import (
    CG,
    GMRES,
    RBP,
    RRE,
    Adaptive,
    Anderson,
    BiCGSTAB,
    Broyden,
    CGNormal,
    Direct,
    FixedPointIteration,
    Hybrid,
    Neumann,
    Newton,
    rbp_fixed_point,
    rbp_root,
    rbp_solve,
)
from rbpjax._core.strategy import filled, split

W = jnp.array([[0.3, -0.6], [0.5, 0.4]])
SYMMETRIC = jnp.array([[0.5, -0.3], [-0.3, 0.2]])
X, H = jnp.array([0.4, -0.2]), jnp.zeros(2)
SOLVERS = [
    FixedPointIteration(),
    Anderson(),
    Broyden(),
    RRE(),
    Newton(),
    Hybrid(),
]
RULES = [Neumann(), Adaptive(), BiCGSTAB(), CG(), CGNormal(), GMRES(), Direct()]
name = lambda strategy: type(strategy).__name__


def f(w, x, h):
    return jnp.tanh(w @ h + x)


def has(strategy, field):
    return field in {f.name for f in dataclasses.fields(strategy)}


def ran(slot, strategy, w):
    """Value, gradient and counts with this strategy."""
    solve = rbp_solve(f, **{slot: strategy})

    def loss(w):
        solution = solve(w, X, H)
        return jnp.sum(solution.value**2), solution.num_products

    report_of = rbpjax.value_and_grad_with_report(
        lambda w, probe: jnp.sum(solve(w, X, H, probe).value ** 2)
    )
    (value, products), grad = jax.value_and_grad(loss, has_aux=True)(w)
    return value, grad, products, report_of(w)[2].num_products


SHORT = ("CGNormal.tol",)
PAIRS = [
    pytest.param(
        strategy,
        field,
        id=(label := f"{name(strategy)}.{field}"),
        marks=[] if label in SHORT else pytest.mark.full,
    )
    for strategy in SOLVERS + RULES
    for field in ("tol", "max_steps", "steps")
    if has(strategy, field)
]


@pytest.mark.parametrize(("strategy", "field"), PAIRS)
def test_a_traced_option_does_what_the_number_does(strategy, field):
    """Same values, same counts; and one program for all numbers."""
    slot = "forward" if strategy in SOLVERS else "backward"
    w = SYMMETRIC if isinstance(strategy, CG) else W
    made = lambda number: dataclasses.replace(strategy, **{field: number})
    traced = jax.jit(lambda number: ran(slot, made(number), w))
    for number in (1e-3, 1e-7) if field == "tol" else (2, 9):
        got, want = traced(number), ran(slot, made(number), w)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-13)
    assert traced._cache_size() == 1


def test_options_differ_within_a_map():
    """Each example has its own; and the counts follow."""

    def count(tol):
        solve = rbp_solve(f, forward=FixedPointIteration(tol=tol))
        return solve(W, X, H).num_steps

    tols = jnp.array([1e-2, 1e-5, 1e-9])
    got = jax.vmap(count)(tols)
    assert got.tolist() == [int(count(float(tol))) for tol in tols]
    assert got[0] < got[1] < got[2]


@pytest.mark.full
@pytest.mark.parametrize(
    "rule", [lambda k: Neumann(steps=k), lambda k: RBP(FixedPointIteration(steps=k))]
)
def test_truncation_in_a_scan_of_a_map(rule):
    """The number of terms from a loop outside; nested strategies as well."""
    jac = jax.jacobian(lambda h: f(W, X, h))(rbp_solve(f)(W, X, H).value)
    g = jnp.array([0.3, 1.0])

    def adjoint(k):
        solve = rbp_solve(lambda x, _, h: f(W, x, h), backward=rule(k))
        pull = jax.vjp(lambda x: solve(x, None, H).value, X)[1]
        return pull(g)[0]

    numbers = jnp.array([[0, 3], [1, 6]])
    got = jax.lax.map(jax.vmap(adjoint), numbers)
    slope = 1 - rbp_solve(f)(W, X, H).value ** 2
    for i, j in np.ndindex(2, 2):
        z = sum(np.linalg.matrix_power(jac.T, k) @ g for k in range(numbers[i, j] + 1))
        np.testing.assert_allclose(got[i, j], slope * z, rtol=1e-10)


@pytest.mark.full
def test_no_gradient_reaches_the_option():
    """A fixed point does not depend on how it was found."""

    def loss(w, tol):
        solve = rbp_solve(
            f, forward=Hybrid(tol=tol), backward=Neumann(tol=tol), on_failure="nan"
        )
        return jnp.sum(solve(w, X, H).value ** 2)

    grads = jax.grad(loss, (0, 1))(W, jnp.array(1e-12))
    second = jax.jacrev(jax.grad(loss))(W, jnp.array(1e-12))
    exact = lambda w: jnp.sum(rbp_solve(f)(w, X, H).value ** 2)
    np.testing.assert_allclose(grads[0], jax.grad(exact)(W), rtol=1e-8)
    np.testing.assert_allclose(second, jax.jacrev(jax.grad(exact))(W), rtol=1e-6)
    assert grads[1] == 0


@pytest.mark.full
def test_roots_and_other_solvers_answers():
    """The option of a solver of roots, and of a rule for an answer from elsewhere."""
    F = lambda a, x, h: h**3 - a
    tols = jnp.array([1e-3, 1e-10])

    def root(tol):
        solve = rbp_root(F, forward=Newton(tol=tol), backward=Adaptive(tol=tol))
        return jax.value_and_grad(lambda a: solve(a, None, 1.0).value)(2.0)

    value, grad = jax.vmap(root)(tols)
    assert abs(value[1] - 2 ** (1 / 3)) < 1e-9
    np.testing.assert_allclose(grad[1], 2 ** (-2 / 3) / 3, rtol=1e-7)

    answer = rbp_solve(f)(W, X, H).value

    def terms(k):
        wrap = rbp_fixed_point(f, backward=Neumann(steps=k), on_failure="nan")
        solve = wrap(lambda w, x, h: answer)
        return jax.grad(lambda w: jnp.sum(solve(w, X).value))(W)

    got = jax.vmap(terms)(jnp.array([0, 100]))
    want = jax.grad(lambda w: jnp.sum(rbp_solve(f)(w, X, H).value))(W)
    np.testing.assert_allclose(got[1], want, rtol=1e-8)
    assert jnp.abs(got[0] - want).max() > 1e-2


def test_eager_calls_share_one_compilation():
    """A schedule outside ``jit`` compiles once."""
    from rbpjax._core import reuse

    reuse._compiled.cache_clear()
    for tol in (1e-2, 1e-3, 1e-4):
        solve = rbp_solve(f, forward=FixedPointIteration(tol=jnp.array(tol)))
        solve(W, X, H)
    assert reuse._compiled.cache_info().misses == 1


def test_split_and_filled_are_inverse():
    """All numbers out, in their order, and back; nothing else is touched."""
    made = Newton(RBP(Anderson(tol=jnp.array(0.1))), max_steps=jnp.int32(7), tol=1e-3)
    numbers, rest = split(made)
    assert len(numbers) == 2 and hash(rest) == hash(split(made)[1])
    again = filled(rest, numbers)
    assert again.backward.solver.tol == 0.1 and again.max_steps == 7
    assert (again.tol, again.warmup) == (1e-3, 0)
    same = Neumann(steps=3)
    assert split(same) == ([], same) and filled(same, []) is same
    assert split(f) == ([], f)
