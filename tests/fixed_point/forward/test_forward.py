"""Forward solvers: what they return is what they say it is."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import FixedPointIteration, Solution
from rbpjax.fixed_point.iterate import next_look, relative_change
from tests.support.problems import (
    CONVERGED_RTOL,
    PROBLEMS,
    assert_close,
    dense_gradient,
    fixed_point,
    loss_of,
)


def relative_residual(step, h):
    """The definition, in float64: the largest ‖f(h) - h‖ / max(‖h‖, ‖f(h)‖)."""

    def leaf(h, image):
        h, image = jnp.ravel(h).astype(float), jnp.ravel(image).astype(float)
        norm = jnp.linalg.norm
        return norm(image - h) / jnp.maximum(norm(h), norm(image))

    pairs = zip(jax.tree.leaves(h), jax.tree.leaves(step(h)), strict=True)
    return max(leaf(u, v) for u, v in pairs)


SOLVERS = {
    "tol": FixedPointIteration(tol=1e-8),
    "damped": FixedPointIteration(tol=1e-8, damping=0.4),
    "budget": FixedPointIteration(max_steps=3),
    "steps": FixedPointIteration(steps=5),
    "steps_damped": FixedPointIteration(steps=5, damping=0.4),
    "every_third": FixedPointIteration(tol=1e-8, damping=0.4, check_every=3),
}
solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@solvers
def test_residual_is_that_of_the_returned_value(problem, solver):
    """Residual and verdict belong to the value itself, converged or not."""
    step = partial(problem.f, problem.params, problem.inputs)
    h0 = jax.tree.map(lambda x: x + 0.3, problem.h0)
    solution = jax.jit(lambda h0: solver(step, h0))(h0)
    want = relative_residual(step, solution.value)
    chex.assert_trees_all_close(solution.residual, want, rtol=1e-6, atol=1e-15)
    tol = 1e-8 if solver.tol else 2e-12
    assert bool(solution.converged) == bool(want <= tol)
    assert solution.converged == (solver.tol is not None)


@solvers
def test_value_is_the_iterate_of_its_step_count(solver):
    """``num_steps`` applications of the damped step lead from h0 to the value."""
    problem = PROBLEMS["pytree"]
    step = partial(problem.f, problem.params, problem.inputs)
    solution = jax.jit(lambda h0: solver(step, h0))(problem.h0)

    def damped(_, h):
        mix = lambda new, old: (1 - solver.damping) * new + solver.damping * old
        return jax.tree.map(mix, step(h), h)

    run = jax.jit(lambda k: jax.lax.fori_loop(0, k, damped, problem.h0))
    assert solution.num_steps > 0
    chex.assert_trees_all_close(solution.value, run(solution.num_steps), rtol=1e-13)


def test_best_iterate_is_returned():
    """Where the iteration moves away, the value is the best iterate, not the last."""
    # Around (1, 0): one direction decays fast, the other grows from 1e-3.
    center, rates = jnp.array([1.0, 0.0]), jnp.array([0.1, 1.5])
    step = lambda h: center + rates * (h - center)
    h0 = jnp.array([2.0, 1e-3])
    residuals, h = [], h0
    for _ in range(15):
        residuals.append(float(relative_residual(step, h)))
        h = step(h)
    best = min(range(15), key=residuals.__getitem__)
    assert 0 < best < 10  # it falls, then rises
    solution = FixedPointIteration(max_steps=14, check_every=1)(step, h0)
    assert solution.num_steps == best
    chex.assert_trees_all_close(
        solution.value, jnp.array([1 + 0.1**best, 1e-3 * 1.5**best]), rtol=1e-12
    )
    assert not solution.converged


def test_damping_converges_where_plain_iteration_does_not():
    """h ↦ -1.5h + x diverges; with damping 0.5 its rate is 0.25. Both gradients 0.4."""
    f = lambda p, x, h: -1.5 * h + x
    x = jnp.array([1.0])
    plain = FixedPointIteration()(lambda h: f(None, x, h), jnp.zeros(1))
    assert not plain.converged and plain.residual > 0.5
    damped = FixedPointIteration(damping=0.5, tol=1e-13)
    solution = damped(lambda h: f(None, x, h), jnp.zeros(1))
    assert solution.converged
    chex.assert_trees_all_close(solution.value, x / 2.5, rtol=1e-12)
    assert solution.num_steps < 30  # 0.25^k = 1e-13 at k = 22
    solve = rbpjax.rbp_solve(f, forward=damped, backward=rbpjax.RBP(damped))
    grad = jax.grad(lambda x: solve(None, x, jnp.zeros(1)).value[0])(x)
    chex.assert_trees_all_close(grad, jnp.array([0.4]), rtol=1e-12)


def test_steps_are_exact_and_tol_is_an_accuracy():
    """``steps=k`` takes k steps even past convergence; ``tol`` stops at the first."""
    step = lambda h: 0.5 * h + 1.0  # h* = 2, error 2·0.5^k, residual about 0.5^{k+1}
    h0 = jnp.zeros(1)
    for k in (0, 1, 7):
        solution = FixedPointIteration(steps=k)(step, h0)
        chex.assert_trees_all_close(solution.value, 2 - 2 * 0.5 ** jnp.full(1, k))
        assert solution.num_steps == k
    solution = FixedPointIteration(tol=1e-3)(step, h0)
    # residual_k = 0.5^k / (2 - 2·0.5^{k+1}): 0.00098 at k = 9 is the first below 1e-3.
    assert solution.num_steps == 9 and solution.converged
    solution = FixedPointIteration(steps=200)(step, h0)
    assert solution.num_steps == 200 and solution.converged
    budget = FixedPointIteration(max_steps=9, tol=1e-3)(step, h0)
    assert budget.converged  # a budget of nine is enough for nine
    budget = FixedPointIteration(max_steps=8, tol=1e-3)(step, h0)
    assert budget.num_steps == 8 and not budget.converged


@pytest.mark.parametrize("every", [2, 7])
def test_looking_less_often_takes_at_most_that_many_steps_more(every):
    """check_every = k: the same point, up to k - 1 steps later."""
    problem = PROBLEMS["tanh_rnn"]
    step = partial(problem.f, problem.params, problem.inputs)
    each = FixedPointIteration(tol=1e-9, check_every=1)(step, problem.h0)
    some = FixedPointIteration(tol=1e-9, check_every=every)(step, problem.h0)
    assert some.converged and (some.num_steps + 1) % every == 0
    assert 0 <= int(some.num_steps) - int(each.num_steps) < every
    # Both within residual · ‖(I - J)⁻¹‖ of h*, which is below 10 here.
    chex.assert_trees_all_close(some.value, each.value, rtol=0, atol=4e-8)


def looks(residuals, tol, most=10**6):
    """After which steps ``next_look`` looks at a given sequence of residuals."""
    taken, since, before = [1], 1, jnp.inf
    while residuals(taken[-1]) > tol and taken[-1] < most:
        k = jnp.int32(taken[-1])
        residual = jnp.array(residuals(taken[-1]))
        ahead = int(next_look(None, k, since, residual, before, tol))
        taken, since, before = [*taken, taken[-1] + ahead], ahead, residual
    return taken


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.99, 0.999])
def test_few_looks_find_the_first_step_that_meets_the_tolerance(rate):
    """At a constant rate: doubling up to the tolerance, then quartering what is left.

    log₂N looks go up to N / 2 or more and log₄N + 1 down, with two more for rounding.
    """
    first = math.ceil(math.log(1e-9) / math.log(rate))
    taken = looks(lambda k: rate**k, 1e-9)
    assert taken[-1] == first
    assert len(taken) <= 1.5 * math.log2(first) + 3


def test_looks_are_never_late_by_more_than_the_steps_taken():
    """A rate that misleads, slow and then sudden: at most twice the steps."""
    for sudden in (3, 10, 100, 1000):
        residuals = lambda k, s=sudden: 0.9999**k if k < s else 1e-12
        assert sudden <= looks(residuals, 1e-9)[-1] < 2 * sudden


def test_every_step_is_looked_at_where_residuals_grow_or_are_no_numbers():
    """Nothing is to be foreseen there, and the loop has to end."""
    assert looks(lambda k: 1.1**k, 1e-9, 30) == list(range(1, 31))
    assert int(next_look(None, jnp.int32(8), 4, jnp.array(jnp.nan), 1.0, 1e-9)) == 1


@pytest.mark.parametrize("name", ["tanh_rnn", "hopfield"])
def test_the_default_looks_take_the_steps_of_looking_at_each(name):
    """The same value bit for bit where the rate only ever slows down."""
    problem = PROBLEMS[name]
    step = partial(problem.f, problem.params, problem.inputs)
    each = FixedPointIteration(tol=1e-9, check_every=1)(step, problem.h0)
    some = FixedPointIteration(tol=1e-9)(step, problem.h0)
    assert each.converged and each.num_steps > 10
    chex.assert_trees_all_equal(some, each)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-5, 1e5, 1e18, 1e35])
@pytest.mark.parametrize("n", [2, 100_000])
def test_relative_change_at_any_scale(size, n):
    """Of float32 states, against float64. The difference of close numbers is exact; a
    sum of n squares is wrong by about √n ε of it, and its root by half of that.
    """
    old = np.random.default_rng(0).normal(size=n)
    new = old * (1 + 1e-3 * np.random.default_rng(1).normal(size=n))
    old, new = ((size * u).astype(np.float32) for u in (old, new))
    wide = lambda u: u.astype(np.float64) / size  # whose squares float64 has
    norm = np.linalg.norm
    exact = norm(wide(new) - wide(old)) / max(norm(wide(new)), norm(wide(old)))
    assert jax.jit(relative_change)(new, old) == pytest.approx(
        exact, rel=(n**0.5 + 4) * 1.2e-7, abs=0
    )


@solvers
def test_nan_is_reported(solver):
    """NaN in start, params or values: not converged, a residual not below tol."""
    step = lambda a, h: a * h + 1.0
    one = jnp.ones(2)
    for a, h0 in ((jnp.nan * one, one), (0.5 * one, jnp.nan * one)):
        solution = solver(partial(step, a), h0)
        assert not solution.converged
        assert not solution.residual <= 1e-3
    burst = lambda h: jnp.where(h > 1.9, jnp.nan, 0.5 * h + 1.0)
    solution = FixedPointIteration()(burst, jnp.zeros(1))
    assert not solution.converged
    assert jnp.isfinite(solution.value).all()  # the best before it happened


def test_gradient_of_a_failed_solve_is_reported_not_raised():
    """NaN params give a NaN gradient and a report that says so, also under jit."""
    solve = rbpjax.rbp_solve(lambda a, x, h: jnp.tanh(a * h) + x)

    def loss(a, probe):
        return jnp.sum(solve(a, jnp.ones(2), jnp.zeros(2), probe).value)

    value, grad, report = jax.jit(rbpjax.value_and_grad_with_report(loss))(
        jnp.full(2, jnp.nan)
    )
    assert not jnp.isfinite(grad).any()
    assert report.converged == 0 and not report.residual <= 1e-3
    del value


def test_start_at_the_fixed_point_takes_no_step():
    """h0 = h* is returned as it is, in zero steps."""
    step = lambda h: 0.5 * h + 1.0
    solution = FixedPointIteration()(step, jnp.full(3, 2.0))
    assert solution.num_steps == 0 and solution.converged and solution.residual == 0
    chex.assert_trees_all_equal(solution.value, jnp.full(3, 2.0))
    zero = FixedPointIteration()(lambda h: 0.5 * h, jnp.zeros(3))
    assert zero.num_steps == 0 and zero.converged and zero.residual == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_default_tol_is_three_quarters_of_the_digits(dtype):
    """Without a tolerance, ε^¾ of the dtype is asked for, and reached."""
    solver = FixedPointIteration()
    step = lambda h: (0.5 * jnp.tanh(h) + 1).astype(dtype)
    solution = solver(step, jnp.zeros(5, dtype))
    eps = float(jnp.finfo(dtype).eps)
    assert solution.value.dtype == dtype
    assert solution.converged and solution.residual <= eps**0.75
    # A rate of about 0.15 takes this many steps for the digits, two more or less.
    want = jnp.log(eps**0.75) / jnp.log(0.15)
    assert abs(int(solution.num_steps) - float(want)) <= 2


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_states_of_any_magnitude_in_float32(size):
    """Squares of 1e±25 leave float32; steps, residual and verdict do not change."""
    x = jnp.array([1.0, -2.0, 0.5], jnp.float32) * jnp.float32(size)
    w = jnp.array([[0.3, -0.5, 0.0], [0.6, 0.2, 0.1], [0.0, 0.1, 0.4]], jnp.float32)
    solution = FixedPointIteration()(lambda h: w @ h + x, jnp.zeros_like(x))
    wide = x.astype(jnp.float64), w.astype(jnp.float64)
    want = jnp.linalg.solve(jnp.eye(3) - wide[1], wide[0] / size)
    assert solution.converged and 10 < solution.num_steps < 60
    # tol 6e-6 at ‖(I - W)⁻¹‖ < 3
    assert_close(solution.value.astype(jnp.float64) / size, want, 2e-5)


def newton(step, h0) -> Solution:
    """A user's own solver: Newton's method with a dense Jacobian."""
    flat, unravel = jax.flatten_util.ravel_pytree(h0)
    defect = lambda h: jax.flatten_util.ravel_pytree(step(unravel(h)))[0] - h

    def body(_, h):
        return h - jnp.linalg.solve(jax.jacobian(defect)(h), defect(h))

    h = jax.lax.fori_loop(0, 20, body, flat)
    residual = jnp.linalg.norm(defect(h)) / jnp.linalg.norm(h)
    return Solution(
        value=unravel(h), num_steps=20, residual=residual, converged=residual < 1e-12
    )


def test_any_callable_is_a_solver():
    """A user's Newton method finds h*, and the gradient does not care how."""
    problem = PROBLEMS["pytree"]
    solve = rbpjax.rbp_solve(
        problem.f, forward=newton, backward=rbpjax.CGNormal(tol=1e-12)
    )
    solution = jax.jit(solve)(problem.params, problem.inputs, problem.h0)
    assert solution.converged and solution.num_steps == 20
    chex.assert_trees_all_close(solution.value, fixed_point(problem), rtol=1e-11)
    got = jax.jit(jax.grad(loss_of(solve, problem), (0, 1)))(
        problem.params, problem.inputs
    )
    assert_close(got, dense_gradient(problem), CONVERGED_RTOL)
