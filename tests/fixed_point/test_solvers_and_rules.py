"""RRE, Newton and Direct: where they lead, in how many steps, and what they refuse."""

import itertools

import chex
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
    BiCGSTAB,
    Broyden,
    CGNormal,
    Direct,
    FixedPointIteration,
    Newton,
)
from tests.support.counters import count_products
from tests.support.families import FAMILIES
from tests.support.problems import EXPANSIVE, PROBLEMS, assert_close, fixed_point, rows

SOLVERS = {
    "rre": RRE(tol=1e-12),
    "rre_one": RRE(memory=1, tol=1e-12),
    "broyden": Broyden(tol=1e-12),
    "broyden_two": Broyden(memory=2, tol=1e-12),
    "newton": Newton(tol=1e-12),
    "newton_bicgstab": Newton(BiCGSTAB(tol=1e-2), tol=1e-12),
    "newton_cg": Newton(CGNormal(tol=1e-4), tol=1e-12, warmup=3),
    "newton_direct": Newton(Direct(), tol=1e-12),
}


CASES = [(s, name) for s in SOLVERS for name in [*PROBLEMS, "expansive"]]
SHORT = ("expansive",)
CASES.remove(("rre_one", "expansive"))  # the next test
CASES.remove(("broyden_two", "expansive"))  # three numbers take more


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        pytest.param(*case, marks=() if case[1] in SHORT else pytest.mark.full)
        for case in CASES
    ],
)
def test_the_fixed_point_is_found(solver, name):
    """By each solver on each problem, ρ(J) > 1 included."""
    problem, solver = {**PROBLEMS, "expansive": EXPANSIVE}[name], SOLVERS[solver]
    solve = jax.jit(rbpjax.rbp_solve(problem.f, forward=solver))
    solution = solve(problem.params, problem.inputs, problem.h0)
    assert solution.converged and solution.residual <= 1e-12
    assert_close(solution.value, fixed_point(problem), 1e-10)


def test_one_difference_is_too_few_for_a_pair_of_eigenvalues():
    """RRE(1) on complex eigenvalues outside the unit circle fails, and says so."""
    solve = rbpjax.rbp_solve(EXPANSIVE.f, forward=RRE(memory=1, tol=1e-12))
    solution = solve(EXPANSIVE.params, EXPANSIVE.inputs, EXPANSIVE.h0)
    assert not solution.converged and solution.residual > 1e-3


def affine(n=6, seed=0, scale=1.4):
    """A non-symmetric J with ρ(J) > 1, and x."""
    random = np.random.default_rng(seed)
    jac = scale * random.normal(size=(n, n)) / n**0.5
    return jnp.asarray(jac), jnp.asarray(random.normal(size=n))


def test_a_cycle_as_long_as_the_dimension_solves_an_affine_map():
    """RRE(n): n + 1 steps and a leap, which is exact; less memory is not enough."""
    jac, x = affine()
    step = lambda h: jac @ h + x
    want = jnp.linalg.solve(jnp.eye(6) - jac, x)
    for solver, steps in (
        (RRE(memory=6, tol=1e-9), 7),
        (Newton(Direct(), tol=1e-9), 1),
    ):
        solution = solver(step, jnp.zeros(6))
        assert solution.num_steps == steps and solution.converged
        assert_close(solution.value, want, 1e-9)
    assert RRE(memory=4, tol=1e-9)(step, jnp.zeros(6)).num_steps > 7


def test_a_cycle_is_restarted_gmres():
    """RBP(RRE(m)) leaves, after each cycle and a step, what GMRES(m) leaves.

    The combination of m + 1 terms with the least residual is the iterate z of m steps
    of GMRES, and RRE returns g + Jᵀz: of residual Jᵀr, for the r that GMRES leaves.
    """
    jac, g = affine(12, 1, 0.9)
    vjp = lambda v: jac.T @ v
    # From z₀ = 0 both span the same spaces; RBP starts from g, one term later.
    start = RRE(memory=3, max_steps=4, tol=1e-14, ridge=0.0)(
        lambda z: g + vjp(z), jnp.zeros(12)
    )
    z = GMRES(max_steps=3, tol=1e-14, restart=3)(vjp, g).value
    assert start.num_steps == 4
    chex.assert_trees_all_close(start.value, g + vjp(z), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex128])
def test_direct_is_the_dense_solve(dtype):
    """All nine families; complex states as the pairs of reals that they are."""
    for name in FAMILIES:
        jac = FAMILIES[name](np.random.default_rng(1), 30)
        g = np.random.default_rng(2).normal(size=(30, 2)) @ [1, 1j]
        if dtype == jnp.float32:
            jac, g = jac.astype(np.float32), g.real.astype(np.float32)
        vjp = lambda v, jac=jac: jnp.asarray(jac.T, dtype) @ v
        solution = Direct()(vjp, jnp.asarray(g, dtype))
        wide = np.eye(30) - jac.astype(np.float64).T
        want = np.linalg.solve(wide, g)
        eps = float(jnp.finfo(dtype).eps)
        # Backward stability: ε κ times a modest factor of the size.
        bound = 100 * eps * np.linalg.cond(wide)
        error = np.linalg.norm(np.asarray(solution.value) - want) / np.linalg.norm(want)
        assert solution.converged and error < bound, name
        assert solution.num_steps == (60 if dtype == jnp.complex128 else 30)


def test_direct_on_a_complex_map_that_is_not_holomorphic():
    """v ↦ a v + b v̄ has no complex matrix; its real one is inverted."""
    a, b = 0.3 + 0.4j, 0.5 - 0.2j
    vjp = lambda v: {"z": a * v["z"] + b * jnp.conj(v["z"]), "t": 0.5 * v["t"]}
    g = {"z": jnp.array([1.0 + 2.0j, -1.0j]), "t": jnp.array([3.0])}
    z = Direct()(vjp, g).value
    defect = jax.tree.map(lambda z, g, j: z - j - g, z, g, vjp(z))
    assert max(float(jnp.abs(d).max()) for d in jax.tree.leaves(defect)) < 1e-14


def test_direct_forms_no_matrix_that_is_too_large():
    """The error names the size, the field, its value and what else there is."""
    with pytest.raises(ValueError, match=r"30 numbers, and max_size=29 .*Adaptive"):
        Direct(max_size=29)(lambda v: 0.5 * v, jnp.ones((5, 6)))
    assert Direct(max_size=30)(lambda v: 0.5 * v, jnp.ones((5, 6))).converged


def test_direct_reports_a_singular_system():
    """I - J of rank n - 1: not converged."""
    jac = jnp.diag(jnp.array([1.0, 0.5, -2.0]))
    assert not Direct()(lambda v: jac.T @ v, jnp.ones(3)).converged
    # Nearly singular: a residual of some ε κ meets a loose tolerance, not a tight one.
    jac = jnp.array([[1.0, 1.0], [1e-9, 0.3]]) - jnp.eye(2) * 1e-9
    reached = [
        bool(Direct(tol=tol)(lambda v: jac.T @ v, jnp.array([1.0, 2.0])).converged)
        for tol in (1e-3, 0.0)
    ]
    assert reached == [True, False]


def test_newton_converges_quadratically_with_a_direct_rule():
    """Residuals of h = 3 cos h are each below a constant times the last one squared."""
    step = lambda h: 3.0 * jnp.cos(h)
    at = lambda k: float(
        Newton(Direct(), max_steps=k, tol=0.0)(step, jnp.ones(1)).residual
    )
    residuals = [at(k) for k in range(1, 6)]
    assert residuals[-1] < 1e-12
    for now, then in itertools.pairwise(residuals):
        # ½|f''| / |1 - f'|² is at most ½·3/3.6², and |h| about 1.17: below 1.
        assert then <= now**2 + 1e-15


def test_newton_shortens_a_step_that_leads_astray():
    """From 3, Newton on arctan h = 0 overshoots ever further; halved steps arrive."""
    step = lambda h: h - jnp.arctan(h)  # h* = 0, I - J = 1 / (1 + h²)
    solution = Newton(Direct(), tol=1e-6)(lambda h: step(h - 5) + 5, jnp.full(1, 8.0))
    assert solution.converged
    chex.assert_trees_all_close(solution.value, jnp.full(1, 5.0), rtol=1e-5)


def test_newton_returns_the_best_iterate_where_there_is_no_fixed_point():
    """It gives up, says so, and the residual is that of the value."""
    step = lambda h: h + 1.0 + 0.1 * jnp.sin(h)
    solution = Newton()(step, jnp.zeros(3))
    assert not solution.converged and jnp.isfinite(solution.value).all()
    change = jnp.linalg.norm(step(solution.value) - solution.value)
    size = max(map(jnp.linalg.norm, (solution.value, step(solution.value))))
    assert jnp.abs(solution.residual - change / size) < 1e-12


def test_newton_takes_its_warm_up_and_counts_it():
    """Plain steps first; at the fixed point already, no step of Newton's own."""
    step = lambda h: 0.5 * h + 1.0
    solution = Newton(Direct(), warmup=4)(step, jnp.full(2, 2.0))
    assert solution.num_steps == 4 and solution.converged
    assert Newton(Direct(), warmup=4)(step, jnp.zeros(2)).num_steps == 5


def test_newton_refuses_what_is_no_rule():
    """A name instead of an instance is met with an example."""
    with pytest.raises(
        ValueError, match=r"`backward` must be a backward rule.*got 'bicgstab'"
    ):
        Newton("bicgstab")


def test_rre_takes_about_as_many_steps_as_anderson():
    """On symmetric J with ρ = 0.99, a fifth of the plain iteration's."""
    jac = FAMILIES["symmetric [-0.99, 0.99]"](np.random.default_rng(1), 100)
    g = jnp.asarray(np.random.default_rng(2).normal(size=100))
    run = lambda solver: RBP(solver)(lambda v: jnp.asarray(jac.T) @ v, g)
    plain = run(FixedPointIteration(max_steps=5000, tol=1e-9))
    fast = run(RRE(memory=10, max_steps=5000, tol=1e-9))
    assert plain.converged and fast.converged
    assert 5 * int(fast.num_steps) < int(plain.num_steps)


def test_rre_with_a_singular_gram_matrix():
    """Iterates on a line, memory 5: all differences are parallel."""
    x = jnp.array([1.0, -2.0, 3.0, 0.5])
    solution = RRE(memory=5, tol=1e-12)(lambda h: 0.9 * h + x, jnp.zeros(4))
    assert solution.converged and solution.num_steps <= 7
    assert_close(solution.value, 10 * x, 1e-10)
    solution = RRE()(lambda h: 0.5 * h + x, 2 * x)
    assert solution.converged and solution.num_steps == 0


def test_rre_returns_its_best_iterate():
    """Where it fails, the value returned is the best one seen, with its residual."""
    step = lambda h: h + 1.0 + 0.1 * jnp.sin(h)  # no fixed point
    solution = RRE(max_steps=20)(step, jnp.zeros(3))
    assert not solution.converged and jnp.isfinite(solution.value).all()
    change = jnp.linalg.norm(step(solution.value) - solution.value)
    size = max(map(jnp.linalg.norm, (solution.value, step(solution.value))))
    assert jnp.abs(solution.residual - change / size) < 1e-12


SYMMETRIC = [name for name in FAMILIES if name.startswith("symmetric")]


@pytest.mark.parametrize("name", rows(SYMMETRIC, ["symmetric [-1.5, 0.9]"]))
def test_cg_takes_half_of_the_products(name):
    """On symmetric J, ρ(J) = 1.5 too, CG is exact and the cheapest of the rules."""
    jac = jnp.asarray(FAMILIES[name](np.random.default_rng(1), 60))
    g = jnp.asarray(np.random.default_rng(2).normal(size=60))
    products = {
        rule: count_products(rule, lambda h: jac @ h, g, g)[0]
        for rule in (CG(tol=1e-9), BiCGSTAB(tol=1e-9), CGNormal(tol=1e-9))
    }
    solution = CG(tol=1e-9)(lambda v: jac @ v, g)
    assert solution.converged
    # ‖A⁻¹‖ is at most 100 here (1 - 0.99), times the tolerance and ‖g‖ ≤ 2.5 ‖z‖.
    assert_close(solution.value, jnp.linalg.solve(jnp.eye(60) - jac, g), 2.5e-7)
    cg, *others = products.values()
    assert cg == int(solution.num_steps) + 1  # one pass, one true residual
    assert 1.4 * cg < min(others)


def test_cg_says_so_where_the_jacobian_is_not_symmetric():
    """A rotation, eigenvalues above 1, and zero curvature: not converged, finite."""
    turn = jnp.array([[0.0, 2.0], [-2.0, 0.0]])
    above = jnp.diag(jnp.array([3.0, 0.5]))
    # The first curvature that is not positive ends it; a rotation shows none.
    for jac, most in ((turn, 1000), (above, 1), (jnp.eye(2), 1)):
        solution = CG()(lambda v, jac=jac: jac.T @ v, jnp.array([1.0, 2.0]))
        assert not solution.converged and jnp.isfinite(solution.value).all()
        assert solution.residual > 1e-2 and solution.num_steps <= most


STOPPING = {
    "rre": (lambda tol, k: RBP(RRE(memory=3, max_steps=k, tol=tol)), 1),
    "cg": (lambda tol, k: CG(max_steps=k, tol=tol), 2),
    "newton": (lambda tol, k: RBP(Newton(BiCGSTAB(tol=0.1), max_steps=k, tol=tol)), 1),
}


@pytest.mark.parametrize("tol", rows([1e-3, 1e-9], [1e-3]))
@pytest.mark.parametrize("name", STOPPING)
def test_they_stop_at_the_tolerance_and_not_beyond(name, tol):
    """Converged at ``tol``; with a little less of a budget, not yet.

    A stopping test that asks for more than ``tol`` would have met ``tol`` before. CG
    aims at half of it, hence its two steps; the others look at each residual.
    """
    make, slack = STOPPING[name]
    jac = jnp.asarray(FAMILIES["symmetric [0, 0.9]"](np.random.default_rng(1), 60))
    g = jnp.asarray(np.random.default_rng(2).normal(size=60))
    run = lambda k: make(tol, k)(lambda v: jac @ v, g)
    whole = run(500)
    taken = int(whole.num_steps)
    assert whole.converged and taken > slack
    z = whole.value
    # RBP's tolerance is relative to ‖z‖ and g + Jᵀz, CG's to ‖g‖; ‖z‖ is larger here.
    assert jnp.linalg.norm(g + jac @ z - z) <= tol * jnp.linalg.norm(
        g if name == "cg" else g + jac @ z
    )
    assert not run(taken - slack).converged


def test_what_they_cost():
    """One product a step of RRE, and one for the residual of the last iterate."""
    jac, g = affine(12, 1, 0.9)
    made, taken = count_products(
        RBP(RRE(memory=3, max_steps=8)), lambda h: jac @ h, g, g
    )
    assert made == taken + 1
