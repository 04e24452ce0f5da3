"""``diagnose``: its numbers against dense ones, its recommendation, its table."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax.diagnostics.diagnose import CANDIDATES
from tests.support.problems import (
    EXPANSIVE,
    PROBLEMS,
    assert_close,
    dense_gradient,
    dense_jacobian,
    fixed_point,
    loss_of,
    readout,
    rows,
)

KEY = jax.random.key(11)
# Few problems: each costs the compilation of every rule.
ALL = {k: PROBLEMS[k] for k in ("hopfield", "pytree")} | {"expansive": EXPANSIVE}
problems = pytest.mark.parametrize("name", rows(ALL.keys(), ("hopfield", "expansive")))


def linear(w, x, h):
    return w @ h + x


@partial(jax.jit, static_argnames=("tol", "num_steps"))
def at_state(w, h, tol=None, num_steps=200):
    """The diagnosis of the linear map with x = 1; compiled once a size."""
    x = jnp.ones_like(h)
    return rbpjax.diagnose(KEY, linear, w, x, h, tol=tol, num_steps=num_steps)


def linear_diagnosis(w, **options):
    h = jnp.linalg.solve(jnp.eye(len(w), dtype=w.dtype) - w, jnp.ones(len(w), w.dtype))
    return at_state(w, h, **options)


def ginibre(n, radius, key=KEY):
    return radius * jax.random.normal(key, (n, n)) / n**0.5


def diagnose_step(f, params, inputs, h, key):
    return rbpjax.diagnose(key, f, params, inputs, h)


_COMPILED = {name: jax.jit(partial(diagnose_step, p.f)) for name, p in ALL.items()}
_FOUND = {}


def found(name):
    """The diagnosis of a problem at its fixed point, made once."""
    if name not in _FOUND:
        p = ALL[name]
        _FOUND[name] = _COMPILED[name](p.params, p.inputs, fixed_point(p), KEY)
    return _FOUND[name]


@problems
def test_numbers_are_those_of_the_dense_jacobian(name):
    """ρ, ‖J‖, σ_max/σ_min and 1/σ_min of I - J, and residual, against dense algebra."""
    d, problem = found(name), ALL[name]
    jac = np.asarray(dense_jacobian(problem, fixed_point(problem)))
    eye = np.eye(len(jac))
    eig = np.linalg.eigvals(jac)
    # 1/num_steps, or a few percent where a batch has nearly equal radii.
    np.testing.assert_allclose(d.spectral_radius, abs(eig).max(), rtol=0.02)
    half = abs((1 + eig) / 2).max()
    np.testing.assert_allclose(d.damped_radius, half, rtol=0.02)
    # Lanczos has as many steps as it needs for at most 18 units: exact to rounding.
    sigma = np.linalg.svd(eye - jac, compute_uv=False)
    np.testing.assert_allclose(d.jacobian_norm, np.linalg.norm(jac, 2), rtol=1e-9)
    np.testing.assert_allclose(d.condition, sigma[0] / sigma[-1], rtol=1e-9)
    np.testing.assert_allclose(d.inverse_norm, 1 / sigma[-1], rtol=1e-9)
    assert d.residual < 1e-14


@problems
def test_neumann_steps_are_predicted(name):
    """The prediction is the count that Neumann takes for some random cotangent."""
    d, problem = found(name), ALL[name]
    jac = np.asarray(dense_jacobian(problem, fixed_point(problem)))
    if name == "expansive":
        assert d.neumann_steps == np.inf
        return
    # With several leaves each of them has to be right beside its own size. In its
    # units, of at most 2 an entry, the cotangent is at most 2 √n long: that is all.
    leaves = len(jax.tree.leaves(fixed_point(problem)))
    strict = 1 if leaves == 1 else 4 * len(jac) ** 0.5
    counts = {1: [], strict: []}
    for g in np.random.default_rng(0).normal(size=(200, len(jac))):
        for share, taken in counts.items():
            r, terms = g / np.linalg.norm(g), 0
            while np.linalg.norm(r) > d.tol / 2 / share:
                r, terms = jac.T @ r, terms + 1
            taken.append(terms - 1)
    fewest, most = min(counts[1]), max(counts[strict])
    assert most - fewest < 15  # the claim is not vacuous
    assert fewest <= float(d.neumann_steps) <= most
    # The trial had the very same cotangent: K steps, the term after them, its report.
    # Two products find the units; they are lost where no two terms of the series help.
    lost = int(d.products[0]) - (int(d.neumann_steps) + 2)
    assert lost in ((0,) if leaves == 1 else (0, 2))


@pytest.mark.full
def test_neumann_steps_are_extrapolated():
    """Beyond num_steps the prediction goes on at the rate ρ(J): within 5 % at 0.99."""
    w = 0.99 * jnp.linalg.qr(jax.random.normal(KEY, (20, 20)))[0]
    d = linear_diagnosis(w, num_steps=50, tol=1e-8)
    want = np.log(0.5e-8) / np.log(0.99) - 1  # 1901
    np.testing.assert_allclose(d.neumann_steps, want, rtol=0.05)


@problems
def test_assumptions_and_trials_agree_with_the_eigenvalues(name):
    """Each assumption is found to hold exactly where it does; trials worked there."""
    d, problem = found(name), ALL[name]
    jac = dense_jacobian(problem, fixed_point(problem))
    eig = jnp.linalg.eigvals(jac)
    want = {
        "ρ(J) < 1": jnp.abs(eig).max() < 1,
        "ρ((I + J) / 2) < 1": jnp.abs(1 + eig).max() < 2,
        "I - J invertible": True,
    }
    for i, candidate in enumerate(CANDIDATES):
        if candidate.needs in want:
            assert d.holds[i] == want[candidate.needs], candidate.needs
            assert d.converged[i] == want[candidate.needs], candidate.needs
        if d.converged[i]:
            assert d.residuals[i] <= 3 * d.tol  # RBP's tolerance is relative to z


@problems
def test_recommended_rule_gives_the_dense_gradient(name):
    """The recommended object, put into rbp_solve, gives the gradient to its tol."""
    problem = ALL[name]
    rule = found(name).rule
    h = fixed_point(problem)
    forward = lambda step, h0: rbpjax.Solution(value=h, converged=True)
    solve = rbpjax.rbp_solve(problem.f, forward=forward, backward=rule)
    got = jax.jit(jax.grad(loss_of(solve, problem)))(problem.params, problem.inputs)
    # tol 2e-12 times a condition number below 100.
    assert_close(got, dense_gradient(problem)[0], 1e-9)


def test_recommendation_is_the_first_of_the_cheap_ones():
    """Neumann under strong contraction, another beyond ρ = 1; the choice by hand."""
    strong = linear_diagnosis(ginibre(40, 0.2))
    assert isinstance(strong.rule, rbpjax.Neumann)
    wild = linear_diagnosis(ginibre(40, 1.5))
    assert not isinstance(wild.rule, rbpjax.Neumann) and not wild.holds[0]
    for d in (strong, wild):
        cost = np.where(d.holds & d.converged, d.products, np.inf)
        assert np.isfinite(cost.min())
        assert int(d.recommended) == np.flatnonzero(cost <= 1.5 * cost.min())[0]


@pytest.mark.parametrize("coupling", [0.0, 0.7])
def test_singular_adjoint_gets_no_recommendation(coupling):
    """An eigenvalue 1 of J: no rule is recommended, and the table says why."""
    w = jnp.array([[1.0, coupling, 0.0], [0.0, 0.5, 0.3], [0.0, -0.3, 0.2]])
    d = at_state(w, jnp.ones(3))
    assert d.condition > 1e15 and not d.holds[-1]
    assert d.recommended == -1 and d.rule is None
    assert "recommended: none" in str(d) and "NO fixed point" in str(d)


def test_zero_jacobian():
    """J = 0: radius 0, condition 1, no steps; the one-step gradient is exact."""
    d = at_state(jnp.zeros((3, 3)), jnp.ones(3))
    assert d.spectral_radius == 0 and d.jacobian_norm == 0 and d.loop_cut_error == 0
    np.testing.assert_allclose([d.condition, d.inverse_norm], 1.0, rtol=1e-12)
    assert d.neumann_steps == 0 and d.recommended == 0
    assert all(np.isfinite(leaf).all() for leaf in d)


@pytest.mark.full
def test_condition_is_a_lower_bound_that_rises():
    """With few steps the condition is underestimated, never overestimated."""
    w = ginibre(40, 0.95)
    sigma = np.linalg.svd(np.eye(40) - np.asarray(w), compute_uv=False)
    found = [float(linear_diagnosis(w, num_steps=k).condition) for k in (12, 200)]
    assert found == sorted(found) and found[0] < 0.8 * sigma[0] / sigma[-1]
    np.testing.assert_allclose(found[-1], sigma[0] / sigma[-1], rtol=1e-6)


def test_transient_growth_is_in_the_prediction():
    """Non-normal J with ρ = 0.5, ‖J‖ = 10: more steps than the radius says."""
    w = jnp.array([[0.5, 10.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.1]])
    d = linear_diagnosis(w)
    by_radius = np.log(0.5 * float(d.tol)) / np.log(0.5) - 1
    assert by_radius + 5 < float(d.neumann_steps) == int(d.products[0]) - 2
    assert d.jacobian_norm > 10 and d.spectral_radius < 0.6


def test_unconverged_state_is_said_to_be_none():
    """h off the fixed point by 10 %: the residual says it, in numbers and words."""
    problem = PROBLEMS["hopfield"]
    h = 1.1 * fixed_point(problem)
    d = _COMPILED["hopfield"](problem.params, problem.inputs, h, KEY)
    image = problem.f(problem.params, problem.inputs, h)
    size = max(jnp.linalg.norm(h), jnp.linalg.norm(image))
    chex.assert_trees_all_close(
        d.residual, jnp.linalg.norm(image - h) / size, rtol=1e-12
    )
    assert "NO fixed point" in str(d)
    assert "h is a fixed point" in str(found("hopfield"))


def test_nan_is_reported_not_hidden():
    """A NaN in the parameters: NaN in the numbers, no rule, no crash."""
    d = at_state(jnp.eye(3).at[0, 0].set(jnp.nan), jnp.ones(3))
    assert np.isnan(d.spectral_radius) and np.isnan(d.residual)
    assert d.recommended == -1 and "nan" in str(d)


# --- the table -----------------------------------------------------------------------


def test_prints_as_a_short_table():
    """Every number, every rule, the recommendation; at most 24 lines of 88 columns."""
    d = found("expansive")
    text = str(d)
    assert text == repr(d) and len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) <= 88
    assert f"{float(d.spectral_radius):.3g}" in text and "Neumann diverges" in text
    for candidate in CANDIDATES:
        assert candidate.name in text and candidate.needs in text
    assert text.endswith(f"recommended: {d.rule!r}")


@pytest.mark.full
def test_traced_diagnosis_prints_without_a_crash():
    """Inside jit it prints as a tuple, and `rule` is a ValueError with the remedy."""
    seen = []

    @jax.jit
    def inside(w):
        d = rbpjax.diagnose(KEY, linear, w, jnp.ones(3), jnp.ones(3))
        seen.append(repr(d))
        with pytest.raises(ValueError, match=r"one concrete diagnosis.*`recommended`"):
            _ = d.rule
        return d.recommended

    inside(0.5 * jnp.eye(3))
    assert seen[0].startswith("Diagnosis(")


# --- transforms ----------------------------------------------------------------------


def test_vmap_diagnoses_each_example():
    """Under vmap each matrix has its own numbers, equal to those found alone."""
    ws = jnp.stack([ginibre(3, r) / 1.5 for r in (0.3, 0.8, 3.0)])
    x, h = jnp.ones(3), jnp.ones(3)
    diagnose = jax.vmap(partial(diagnose_step, linear), (0, None, None, None))
    together = jax.jit(diagnose)(ws, x, h, KEY)
    assert together.recommended.shape == (3,) and together.holds.shape[0] == 3
    for i, w in enumerate(ws):
        alone = at_state(w, h)
        one = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        assert one.recommended == alone.recommended
        chex.assert_trees_all_close(one[:8], alone[:8], rtol=1e-9)
    assert "67%: Neumann converges" in str(together)
    with pytest.raises(ValueError, match="of a batch take one example"):
        _ = together.rule


@pytest.mark.full
def test_eager_equals_jit():
    """Without jit the same numbers."""
    problem = PROBLEMS["pytree"]
    eager = rbpjax.diagnose(
        KEY, problem.f, problem.params, problem.inputs, fixed_point(problem)
    )
    chex.assert_trees_all_close(eager[:8], found("pytree")[:8], rtol=1e-9)


@pytest.mark.full
def test_float32_state():
    """A float32 state has a float32 diagnosis and tolerance, near that of float64."""
    w = ginibre(40, 0.8)
    d32, d64 = linear_diagnosis(w.astype(jnp.float32)), linear_diagnosis(w)
    assert d32.spectral_radius.dtype == d32.tol.dtype == jnp.float32
    np.testing.assert_allclose(d32.tol, np.finfo(np.float32).eps ** 0.75, rtol=1e-2)
    np.testing.assert_allclose(d32.jacobian_norm, d64.jacobian_norm, rtol=1e-4)
    np.testing.assert_allclose(d32.condition, d64.condition, rtol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 3}, "`num_steps`.*at least 4.*3"),
        ({"tol": 0.0}, r"`tol` must be a Python number in \(0, 1\).*0.0"),
        ({"tol": jnp.ones(())}, r"`tol` must be a Python number in \(0, 1\)"),
    ],
)
def test_bad_options(options, message):
    """Options out of range are a ValueError that names them."""
    with pytest.raises(ValueError, match=message):
        rbpjax.diagnose(KEY, linear, jnp.eye(2), jnp.ones(2), jnp.ones(2), **options)


# --- loop cut and bounds -------------------------------------------------------------


@pytest.mark.parametrize("name", rows(PROBLEMS.keys(), ("hopfield",)))
def test_loop_cut_error_is_the_frobenius_norm(name):
    """The mean square over random g is ‖J‖_F²/n, within 5 standard errors."""
    problem = PROBLEMS[name]
    h = fixed_point(problem)
    jac = dense_jacobian(problem, h)
    error = jax.jit(
        lambda key: rbpjax.diagnostics.loop_cut_error(
            key, problem.f, problem.params, problem.inputs, h, num_probes=1
        )
    )
    squares = np.square([error(key) for key in jax.random.split(KEY, 400)])
    want = float(jnp.sum(jac**2)) / len(jac)
    standard_error = squares.std(ddof=1) / 20
    assert standard_error < 0.05 * want
    assert abs(squares.mean() - want) < 5 * standard_error


def test_loop_cut_error_is_the_one_step_residual():
    """For J = a × rotation every g has ‖Jᵀg‖ = a; Neumann(0) reports the same."""
    w = 0.7 * jnp.array([[0.0, -1.0], [1.0, 0.0]])
    args = (linear, w, jnp.ones(2), jnp.ones(2))
    for probes in (1, 5):
        error = rbpjax.diagnostics.loop_cut_error(KEY, *args, num_probes=probes)
        np.testing.assert_allclose(error, 0.7, rtol=1e-12)
    g = jnp.array([0.3, -2.0])
    _, one_step = rbpjax.rbp_vjp(*args, g, backward=rbpjax.Neumann(steps=0))
    np.testing.assert_allclose(one_step.residual, 0.7, rtol=1e-12)
    with pytest.raises(ValueError, match="`num_probes` must be at least 1; got 0"):
        rbpjax.diagnostics.loop_cut_error(KEY, *args, num_probes=0)


@pytest.mark.parametrize("radius", [0.1, 0.4])
def test_neumann_error_bound_holds_and_is_tight(radius):
    """The bound holds for every K and g; a symmetric J meets it in the limit."""
    jac = np.asarray(ginibre(20, radius))
    norm = np.linalg.norm(jac, 2)
    inverse = np.linalg.inv(np.eye(20) - jac.T)
    for steps in (0, 1, 4, 12):
        # ‖(I - Jᵀ)⁻¹ (Jᵀ)^{K+1}‖ is the largest relative error over all g.
        worst = np.linalg.norm(inverse @ np.linalg.matrix_power(jac.T, steps + 1), 2)
        bound = float(rbpjax.diagnostics.neumann_error_bound(steps, norm))
        assert worst <= bound
        symmetric = jac + jac.T
        symmetric *= norm / np.linalg.eigvalsh(symmetric).max()
        if np.linalg.norm(symmetric, 2) <= norm * (1 + 1e-12):
            tight = np.linalg.inv(np.eye(20) - symmetric)
            tight = tight @ np.linalg.matrix_power(symmetric, steps + 1)
            np.testing.assert_allclose(np.linalg.norm(tight, 2), bound, rtol=1e-9)
    assert np.isinf(rbpjax.diagnostics.neumann_error_bound(10, 1.0))
    assert np.isinf(rbpjax.diagnostics.neumann_error_bound(10, jnp.nan))


def test_neumann_error_bound_is_met_by_the_scaled_identity():
    """J = μI: the error of z_K is the bound itself."""
    for mu, steps in ((0.5, 3), (0.9, 10)):
        z = 1 / (1 - mu)
        z_k = sum(mu**k for k in range(steps + 1))
        bound = rbpjax.diagnostics.neumann_error_bound(steps, mu)
        np.testing.assert_allclose(bound, z - z_k, rtol=1e-12)


@pytest.mark.parametrize("name", ["tanh_rnn", "hopfield"])
@pytest.mark.parametrize("steps", [0, 2, 8])
def test_gradient_error_bound_covers_the_true_error(name, steps):
    """From the report of a truncated rule alone: for z, and for params with ‖∂f/∂θ‖."""
    problem = PROBLEMS[name]
    h = fixed_point(problem)
    jac = dense_jacobian(problem, h)
    norm = jnp.linalg.norm(jac, 2)
    assert norm < 1
    flat, unravel = jax.flatten_util.ravel_pytree(jax.grad(readout)(h))
    z = jnp.linalg.solve(jnp.eye(flat.size) - jac.T, flat)
    (got, _), solution = rbpjax.rbp_vjp(
        problem.f,
        problem.params,
        problem.inputs,
        h,
        unravel(flat),
        backward=rbpjax.Neumann(steps=steps),
    )
    size = jnp.linalg.norm(flat)
    ravel = lambda t: jax.flatten_util.ravel_pytree(t)[0]
    error = jnp.linalg.norm(ravel(solution.value) - z) / size
    bound = rbpjax.diagnostics.gradient_error_bound(solution.residual, norm)
    assert 0.05 * bound < error <= bound

    theta, unravel_theta = (
        ravel(problem.params),
        jax.flatten_util.ravel_pytree(problem.params)[1],
    )
    drive = jax.jacobian(
        lambda t: ravel(problem.f(unravel_theta(t), problem.inputs, h))
    )(theta)
    error = jnp.linalg.norm(ravel(got) - drive.T @ z) / size
    drive_norm = jnp.linalg.norm(drive, 2)
    bound = rbpjax.diagnostics.gradient_error_bound(solution.residual, norm, drive_norm)
    assert 0.005 * bound < error <= bound
    assert np.isinf(rbpjax.diagnostics.gradient_error_bound(solution.residual, 1.2))


# --- singular but meant --------------------------------------------------------------


def chain(pinned, p, x, h):
    """A step of a Markov chain, with its total pinned to 1 or left as it is."""
    h = h @ p
    return h + (1 - jnp.sum(h)) / h.size if pinned else h


@pytest.mark.parametrize("pinned", [False, True])
def test_a_conserved_total_is_named_and_pinning_it_is_the_cure(pinned):
    """At the exact fixed point: no "NO", no rule; with the total pinned, all well."""
    n = 5
    p = np.random.default_rng(0).dirichlet(np.ones(n), size=n)
    equations = np.eye(n) - p.T
    equations[0] = 1
    h = jnp.asarray(np.linalg.solve(equations, np.eye(n)[0]))
    diagnose = jax.jit(partial(diagnose_step, partial(chain, pinned)))
    d = diagnose(jnp.asarray(p), None, h, KEY)
    text = str(d)
    assert "h is a fixed point" in text and "NO fixed point" not in text
    assert ("f conserves something" in text) is not pinned
    assert (d.rule is None) is not pinned
    if not pinned:
        # Stochastic: ρ = 1 with the ones as left null vector; growth finds both.
        np.testing.assert_allclose(d.spectral_radius, 1, rtol=1e-6)
        assert d.null_residual < 1e-9 and "Pin the" in text


def test_an_exact_fixed_point_of_a_singular_step_is_one():
    """Residual 0 beside an infinite inverse, h = f(h) everywhere."""
    d = at_state(jnp.diag(jnp.array([1.0, 0.0])), jnp.array([0.0, 1.0]))
    still = d._replace(residual=jnp.zeros_like(d.residual))
    assert "NO fixed point" not in str(still)


def test_a_failed_trial_is_not_called_convergence():
    """ρ(J) below 1 with a transient beyond the rule's patience: both are said."""
    w = 0.9 * jnp.eye(12) + 3.0 * jnp.eye(12, k=1)
    d = at_state(w, jnp.ones(12))
    failed = d._replace(converged=d.converged.at[0].set(False))
    failed = failed._replace(spectral_radius=jnp.full_like(d.spectral_radius, 0.9))
    assert "Neumann converges" not in str(failed)
    assert "Neumann's trial failed" in str(failed)
