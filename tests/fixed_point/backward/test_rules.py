"""What each rule promises beyond the common table: closed forms and hard Jacobians."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import (
    GMRES,
    RBP,
    Adaptive,
    Anderson,
    BiCGSTAB,
    CGNormal,
    FixedPointIteration,
    Neumann,
    Solution,
)
from tests.support.counters import count_products
from tests.support.families import FAMILIES, momentum
from tests.support.problems import EXPANSIVE, PROBLEMS, assert_close, fixed_point, rows

SHORT = ("symmetric [0, 0.9]", "0.95 × orthogonal", "Ginibre, ρ = 1.5")


def dense(jac, g):
    return np.linalg.solve(np.eye(len(g)) - jac.T, g)


def adjoint(rule, jac, g):
    """The rule's solution for a dense Jacobian."""
    run = jax.jit(lambda jac, g: rule(lambda v: jac.T @ v, g))
    return run(jnp.asarray(jac), jnp.asarray(g))


@pytest.fixture(scope="module")
def random():
    return np.random.default_rng(0)


@pytest.mark.parametrize("family", rows(FAMILIES.keys(), SHORT))
def test_default_is_right_on_every_family(family):
    """The default reaches its tolerance on all nine Jacobian families, n = 50."""
    jac = FAMILIES[family](np.random.default_rng(1), 50)
    g = np.random.default_rng(2).normal(size=50)
    solution = adjoint(Adaptive(tol=1e-10), jac, g)
    z = dense(jac, g)
    kappa = np.linalg.cond(np.eye(50) - jac)
    assert solution.converged and solution.residual <= 1e-10
    # ‖z - ẑ‖ ≤ ‖A⁻¹‖ tol ‖g‖ ≤ κ tol ‖z‖.
    assert_close(solution.value, jnp.asarray(z), 1e-10 * kappa)


@pytest.mark.parametrize("rule", [CGNormal(tol=1e-10), GMRES(tol=1e-10, restart=50)])
def test_rules_without_a_condition_on_the_spectrum(rule):
    """CG on the normal equations, and GMRES unrestarted, solve ρ(J) = 1.5 too."""
    jac = FAMILIES["Ginibre, ρ = 1.5"](np.random.default_rng(1), 50)
    g = np.random.default_rng(2).normal(size=50)
    solution = adjoint(rule, jac, g)
    assert solution.converged
    assert_close(solution.value, jnp.asarray(dense(jac, g)), 1e-6)


def test_default_costs_what_neumann_does_where_that_is_fast(random):
    """On a random J with ρ(J) = 0.5 the default takes Neumann's steps and no other."""
    jac = FAMILIES["Ginibre, ρ = 0.5"](np.random.default_rng(3), 200)
    g = random.normal(size=200)
    neumann = adjoint(Neumann(tol=1e-10), jac, g)
    default = adjoint(Adaptive(tol=1e-10), jac, g)
    # K powers are K + 1 terms, of which the default counts each.
    assert int(default.num_steps) == int(neumann.num_steps) + 1
    assert_close(default.value, neumann.value, 1e-12)


@pytest.mark.parametrize("gain", rows([0.5, 0.8, 0.9], [0.8]))
def test_default_stays_with_neumann_on_a_circle(gain, random):
    """Eigenvalues on a circle: no Krylov method gains anything, so none is tried."""
    jac = gain * np.linalg.qr(np.random.default_rng(3).normal(size=(200, 200)))[0]
    g = random.normal(size=200)
    neumann = adjoint(Neumann(tol=1e-4), jac, g)
    default = adjoint(Adaptive(tol=1e-4), jac, g)
    # K powers are K + 1 terms, of which the default counts each.
    assert default.converged and default.num_steps == neumann.num_steps + 1


def test_default_may_use_its_whole_budget_for_the_series(random):
    """A budget that is enough for Neumann is enough for the default."""
    jac = 0.8 * np.linalg.qr(np.random.default_rng(3).normal(size=(50, 50)))[0]
    g = random.normal(size=50)
    terms = int(adjoint(Neumann(tol=1e-4), jac, g).num_steps) + 1
    assert adjoint(Adaptive(tol=1e-4, max_steps=terms), jac, g).converged
    assert not adjoint(Adaptive(tol=1e-4, max_steps=terms - 4), jac, g).converged


def test_default_leaves_neumann_early_where_terms_align(random):
    """A few large eigenvalues: far fewer products than the series has terms."""
    eigenvalues = np.concatenate([[0.99, -0.98], np.linspace(-0.3, 0.3, 198)])
    q = np.linalg.qr(np.random.default_rng(3).normal(size=(200, 200)))[0]
    jac = (q * eigenvalues) @ np.linalg.inv(q)
    g = random.normal(size=200)
    default = adjoint(Adaptive(tol=1e-8), jac, g)
    assert default.converged and default.num_steps < 30  # the series: about 1,800


def test_default_waits_for_terms_that_grow_first():
    """Momentum: BiCGSTAB stagnates, the series grows 18-fold, then converges.

    CG on the normal equations, which squares a condition number of thousands, would
    take thousands of steps.
    """
    jac, g = momentum(1000, 1)
    assert not adjoint(BiCGSTAB(tol=1e-6), jac, g).converged
    neumann = adjoint(Neumann(tol=1e-6), jac, g)
    default = adjoint(Adaptive(tol=1e-6), jac, g)
    assert neumann.converged and default.converged
    # A first attempt of 8 terms, 30 steps of BiCGSTAB without gain, and the series.
    assert default.num_steps <= neumann.num_steps + 8 + 30 + 5

    jac, g = jnp.asarray(jac), jnp.asarray(g)
    made, steps = count_products(Adaptive(tol=1e-6), lambda h: jac @ h, g, g)
    # One a term, two for each of BiCGSTAB's steps, and one each time it is measured.
    assert 0 <= made - steps <= 30 + 5 + 2


def test_default_reports_a_singular_system():
    """With I - J singular the default says not converged, and stays finite."""
    jac = jnp.diag(jnp.array([1.0, 0.5, -2.0]))
    solution = adjoint(Adaptive(), jac, jnp.ones(3))
    assert not solution.converged and jnp.isfinite(solution.value).all()
    assert solution.residual > 0.5  # g's part along the kernel is 1/√3 of it


@pytest.mark.parametrize("name", ["adaptive", "bicgstab", "gmres", "cg", "neumann"])
def test_a_nan_in_the_jacobian_is_reported(name):
    """NaN products end the loops at once and are never called converged."""
    rules = {
        "adaptive": Adaptive(),
        "bicgstab": BiCGSTAB(),
        "gmres": GMRES(),
        "cg": CGNormal(),
        "neumann": Neumann(tol=1e-6),
    }
    jac = jnp.array([[0.1, jnp.nan], [0.0, 0.2]])
    solution = adjoint(rules[name], jac, jnp.ones(2))
    assert not solution.converged
    assert solution.num_steps <= 40


@pytest.mark.parametrize(("steps", "tau"), [(0, 1.0), (3, 0.7), (10, 0.3)])
def test_damped_neumann_is_the_phantom_gradient(steps, tau):
    """Neumann(K, damping = 1 - τ) = τ Σ_{k ≤ K} Bᵏ g with B = τJᵀ + (1 - τ)I."""
    jac = np.asarray(EXPANSIVE.params)
    g = np.array([1.0, -2.0, 0.5])
    b = tau * jac.T + (1 - tau) * np.eye(3)
    want = tau * sum(np.linalg.matrix_power(b, k) @ g for k in range(steps + 1))
    got = adjoint(Neumann(steps=steps, damping=1 - tau), jac, g).value
    chex.assert_trees_all_close(got, want, rtol=1e-13)


def test_damping_converges_where_the_series_does_not():
    """Richardson needs Re ν < 1, not |ν| < 1: right at ρ(J) = 1.5."""
    jac = np.asarray(EXPANSIVE.params)  # eigenvalues about ±1.5i and -1.2
    g = np.array([1.0, -2.0, 0.5])
    assert not adjoint(Neumann(tol=1e-12), jac, g).converged
    solution = adjoint(Neumann(tol=1e-12, damping=0.7), jac, g)
    assert solution.converged
    assert_close(solution.value, jnp.asarray(dense(jac, g)), 1e-11)


@pytest.mark.parametrize("check_every", [None, 1, 3, 50])
def test_checking_less_often_takes_at_most_that_many_steps_more(check_every):
    """check_every = k: the same answer, up to k - 1 steps later."""
    problem = PROBLEMS["linear"]
    jac = np.asarray(problem.params)
    g = np.array([1.0, -2.0, 0.5])
    every = adjoint(Neumann(tol=1e-9, check_every=1), jac, g)
    some = adjoint(Neumann(tol=1e-9, check_every=check_every), jac, g)
    assert some.converged
    assert 0 <= int(some.num_steps) - int(every.num_steps) < (check_every or 1)
    assert_close(some.value, jnp.asarray(dense(jac, g)), 1e-8)


ANDERSON_FORWARD = {
    "expansive": (EXPANSIVE, Anderson(tol=1e-12)),
    "tanh_rnn": (PROBLEMS["tanh_rnn"], Anderson(tol=1e-12)),
    "pytree": (PROBLEMS["pytree"], Anderson(tol=1e-12, memory=2, damping=0.2)),
    "hopfield": (PROBLEMS["hopfield"], Anderson(tol=1e-12, memory=8)),
}


@pytest.mark.parametrize("name", ANDERSON_FORWARD)
def test_anderson_finds_the_fixed_point_that_newton_finds(name):
    """Anderson as forward solver, ρ(J) > 1 included; its residual is that of f."""
    problem, solver = ANDERSON_FORWARD[name]
    solve = jax.jit(rbpjax.rbp_solve(problem.f, forward=solver))
    solution = solve(problem.params, problem.inputs, problem.h0)
    assert solution.converged and solution.residual <= 1e-12
    assert_close(solution.value, fixed_point(problem), 1e-10)


def test_anderson_is_faster_than_iteration_near_the_border():
    """At ρ(J) = 0.99 it takes less than a third of the plain iteration's steps."""
    jac = FAMILIES["Ginibre, ρ = 0.99"](np.random.default_rng(1), 100)
    g = np.random.default_rng(2).normal(size=100)
    plain = adjoint(RBP(FixedPointIteration(tol=1e-9, max_steps=5000)), jac, g)
    fast = adjoint(RBP(Anderson(tol=1e-9)), jac, g)
    assert plain.converged and fast.converged
    assert 3 * int(fast.num_steps) < int(plain.num_steps)


def test_anderson_with_a_singular_gram_matrix():
    """Parallel and vanishing differences: a one-dimensional path with memory 5.

    The iterates of h ← 0.9 h + x from h0 = 0 lie on one line, so that all differences
    are parallel and the Gram matrix has rank one from the second step on.
    """
    x = jnp.array([1.0, -2.0, 3.0, 0.5])
    solution = Anderson(memory=5, tol=1e-13)(lambda h: 0.9 * h + x, jnp.zeros(4))
    assert solution.converged and solution.num_steps <= 4  # a line takes one secant
    assert_close(solution.value, 10 * x, 1e-12)
    # Already at the fixed point: no difference at all.
    solution = Anderson()(lambda h: 0.5 * h + x, 2 * x)
    assert solution.converged and solution.num_steps == 0


def test_anderson_returns_its_best_iterate():
    """Where it fails, the value returned is the best one seen, with its residual."""
    step = lambda h: h + 1.0 + 0.1 * jnp.sin(h)  # no fixed point
    solution = Anderson(max_steps=20)(step, jnp.zeros(3))
    assert not solution.converged and jnp.isfinite(solution.value).all()
    change = jnp.linalg.norm(step(solution.value) - solution.value)
    size = max(map(jnp.linalg.norm, (solution.value, step(solution.value))))
    assert jnp.abs(solution.residual - change / size) < 1e-12


def test_gmres_ends_with_the_number_of_distinct_eigenvalues():
    """Three distinct eigenvalues of a diagonal A: three Arnoldi steps, exactly."""
    jac = np.diag([0.5, 0.5, -3.0, -3.0, 0.9, 0.9])
    g = np.arange(1.0, 7.0)
    solution = adjoint(GMRES(tol=1e-12), jac, g)
    assert solution.num_steps == 3 and solution.converged
    assert_close(solution.value, jnp.asarray(dense(jac, g)), 1e-12)


@pytest.mark.full
def test_gmres_residual_never_increases(random):
    """Over one Krylov space the residual falls with each further step."""
    jac = random.normal(size=(30, 30)) / 30**0.5
    g = random.normal(size=30)
    residuals = [
        float(adjoint(GMRES(max_steps=k, restart=30, tol=1e-14), jac, g).residual)
        for k in (1, 2, 5, 10, 20, 30)
    ]
    assert all(b < a for a, b in itertools.pairwise(residuals))
    assert residuals[0] < 1 and residuals[-1] < 1e-11


def test_bicgstab_survives_a_breakdown():
    """A skew J at first makes ⟨shadow, Ap⟩ small; J = 2I and J = I are extreme."""
    g = np.array([1.0, 0.0])
    for jac in (np.array([[1.0, 5.0], [-5.0, 1.0]]), 2 * np.eye(2)):
        solution = adjoint(BiCGSTAB(tol=1e-10), jac, g)
        exact = dense(jac, g)
        wrong = np.linalg.norm(solution.value - exact) > 1e-8 * np.linalg.norm(exact)
        assert bool(solution.converged) != bool(wrong)
    solution = adjoint(BiCGSTAB(tol=1e-10), np.eye(2), g)  # A = 0: nothing to be done
    assert not solution.converged and jnp.isfinite(solution.value).all()


def test_default_of_the_transform_is_adaptive():
    """Without ``backward`` the gradient is right also where ρ(J) > 1."""
    h = fixed_point(EXPANSIVE)
    forward = lambda step, h0: Solution(value=h, converged=True)
    solve = rbpjax.rbp_solve(EXPANSIVE.f, forward=forward)
    loss = lambda x: solve(EXPANSIVE.params, x, EXPANSIVE.h0).value @ jnp.arange(3.0)
    got = jax.grad(loss)(EXPANSIVE.inputs)
    want = dense(np.asarray(EXPANSIVE.params), np.arange(3.0))
    assert_close(got, jnp.asarray(want), 1e-9)


@pytest.mark.full
def test_vmapped_krylov_solves_are_those_of_each_example(random):
    """Under vmap each example has its own coefficients, count and verdict."""
    jacs = jnp.asarray(random.normal(size=(4, 12, 12)) / 12**0.5)
    jacs = jacs * jnp.array([0.1, 0.5, 0.9, 1.3])[:, None, None]
    g = jnp.asarray(random.normal(size=(4, 12)))
    for rule in (Adaptive(tol=1e-9), GMRES(tol=1e-9), RBP(Anderson(tol=1e-9))):
        run = lambda jac, g, rule=rule: rule(lambda v: jac.T @ v, g)
        batched = jax.jit(jax.vmap(run))(jacs, g)
        for i in range(4):
            one = jax.jit(run)(jacs[i], g[i])
            assert int(batched.num_steps[i]) == int(one.num_steps)
            assert bool(batched.converged[i]) == bool(one.converged)
            if one.converged:
                assert_close(batched.value[i], one.value, 1e-7)


def test_rbp_from_a_start_that_dwarfs_the_cotangent_is_not_converged():
    """Found by the fuzz: ‖z_{k+1} - z_k‖ ≤ tol ‖z‖ while z is all start, no answer.

    The start is 1e6 times the cotangent and decays by 0.995 a step: after one step the
    change is 0.005 of z, within tol = 0.01, and 5,000 times g. The solver itself asks
    for the error, too, and goes on; what is left stays above g.
    """
    jac = 0.995 * jnp.eye(4)
    rule = RBP(FixedPointIteration(tol=0.01), seed=0)
    solution = adjoint(rule, jac, jnp.full(4, 1e-6))
    g = jnp.full(4, 1e-6)
    left = jnp.linalg.norm(g + jac @ solution.value - solution.value)
    assert_close(solution.residual, left / jnp.linalg.norm(g), 1e-6)
    assert solution.residual > 1 and not solution.converged
    # From g itself the iteration is right, to tol ‖(I - J)⁻¹‖ = 2e-6, and says so.
    solver = FixedPointIteration(max_steps=5000, tol=1e-8)
    solution = adjoint(RBP(solver), jac, jnp.full(4, 1e-6))
    chex.assert_trees_all_close(solution.value, jnp.full(4, 2e-4), rtol=4e-6)
    assert solution.converged
