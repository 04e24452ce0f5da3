"""The linear systems of lineax's test suite, as adjoints: (I - Jᵀ) z = g.

Well-posed ones of many structures, singular, ill-conditioned and transposed ones, and
those on which Lanczos breaks down, by the default and by every rule. The
oracle is NumPy's.
"""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import Status

N = 6
RANDOM = np.random.default_rng(0)
EPS = float(np.finfo(np.float64).eps)


def general() -> np.ndarray:
    return RANDOM.normal(size=(N, N)) + 3 * np.eye(N)


def orthogonal() -> np.ndarray:
    return np.linalg.qr(RANDOM.normal(size=(N, N)))[0]


def spectrum(values) -> np.ndarray:
    q = orthogonal()
    return (q * np.asarray(values)) @ q.T


# The operators A = I - J, by lineax's tags. All have condition numbers below 1e3.
WELL_POSED = {
    "general": general(),
    "general, negative determinant": general() @ np.diag([-1, 1, 1, 1, 1, 1]),
    "orthogonal": orthogonal(),
    "symmetric": spectrum([-2, -1, -0.5, 0.5, 1, 2]),
    "positive definite": spectrum([0.1, 0.5, 1, 2, 3, 5]),
    "negative definite": -spectrum([0.1, 0.5, 1, 2, 3, 5]),
    "diagonal": np.diag([0.5, -1, 2, -3, 1.5, 0.2]),
    "tridiagonal": np.diag(np.full(N, 4.0))
    + np.diag(RANDOM.normal(size=N - 1), 1)
    + np.diag(RANDOM.normal(size=N - 1), -1),
    "lower triangular": np.tril(general()),
    "upper triangular": np.triu(general()),
    "unit lower triangular": np.eye(N) + np.tril(RANDOM.normal(size=(N, N)), -1) / 2,
    "identity": np.eye(N),
    "scaled identity": 1e-2 * np.eye(N),
    "rank one more": np.eye(N) + np.outer(RANDOM.normal(size=N), RANDOM.normal(size=N)),
    "skew": general() - general().T + 0.5 * np.eye(N),
    "permutation": np.eye(N)[[1, 2, 3, 4, 5, 0]],
}
RULES = {
    "default": rbpjax.Adaptive(tol=1e-10),
    "direct": rbpjax.Direct(tol=1e-10),
    "cg_normal": rbpjax.CGNormal(tol=1e-10),
    "gmres": rbpjax.GMRES(tol=1e-10, restart=N),
}


def adjoint(rule):
    """(A, g) -> the solution of (I - Jᵀ) z = g for J = I - A."""
    return lambda a, g: rule(lambda v: v - a.T @ v, g)


@cache
def solved(name: str):
    """All well-posed systems by one rule, in one program."""
    a = jnp.asarray(np.stack(list(WELL_POSED.values())))
    g = jnp.asarray(np.random.default_rng(1).normal(size=(len(a), N)))
    return g, jax.jit(jax.vmap(adjoint(RULES[name])))(a, g)


@pytest.mark.parametrize("operator", WELL_POSED)
@pytest.mark.parametrize("rule", RULES)
def test_well_posed_operators(rule, operator):
    """Aᵀz = g to the tolerance times the condition number."""
    g, found = solved(rule)
    i = list(WELL_POSED).index(operator)
    a = WELL_POSED[operator]
    condition = np.linalg.cond(a)
    assert condition < 1e3
    want = np.linalg.solve(a.T, np.asarray(g[i]))
    error = np.linalg.norm(found.value[i] - want) / np.linalg.norm(want)
    assert found.converged[i], Status(int(found.status[i])).words
    assert error <= 1e-10 * condition


@pytest.mark.parametrize("sign", [1, -1])
def test_conjugate_gradients_take_definite_operators(sign):
    """CG, for A positive definite; of -A it must say that it failed, or be right."""
    a = sign * WELL_POSED["positive definite"]
    g = jnp.arange(1.0, N + 1)
    found = jax.jit(adjoint(rbpjax.CG(tol=1e-10)))(jnp.asarray(a), g)
    want = np.linalg.solve(a.T, g)
    error = np.linalg.norm(found.value - want) / np.linalg.norm(want)
    if sign == 1:
        assert found.converged
    assert not found.converged or error <= 1e-10 * np.linalg.cond(a)


SINGULAR = spectrum([0, 0, 1, -1, 2, 0.5])


@cache
def singular(name: str):
    """A singular symmetric system, once with g in its range and once with g outside."""
    values, vectors = np.linalg.eigh(SINGULAR)
    null = vectors[:, np.abs(values) < 1e-12]
    x = np.random.default_rng(2).normal(size=N)
    inside = SINGULAR @ x
    outside = inside + null[:, 0]
    g = jnp.asarray(np.stack([inside, outside]))
    solve = jax.jit(jax.vmap(adjoint(RULES[name]), (None, 0)))
    return g, null, solve(jnp.asarray(SINGULAR), g)


@pytest.mark.parametrize("rule", [n for n in RULES if n != "direct"])
def test_a_singular_system_with_solutions(rule):
    """Converged means a solution: Aᵀz = g in norm, and z of no absurd size."""
    g, _, found = singular(rule)
    residual = np.linalg.norm(SINGULAR.T @ found.value[0] - g[0])
    assert found.converged[0], Status(int(found.status[0])).words
    assert residual <= 1e-9 * np.linalg.norm(g[0])


def test_the_least_solution_of_a_singular_system():
    """CG on the normal equations gives that of the pseudo-inverse (lineax: SVD, QR)."""
    g, _, found = singular("cg_normal")
    want = np.linalg.pinv(SINGULAR) @ g[0]
    np.testing.assert_allclose(found.value[0], want, atol=1e-8 * np.linalg.norm(want))


@pytest.mark.parametrize("rule", RULES)
def test_a_singular_system_without_solution(rule):
    """Never converged, whatever the value; lineax raises, compiled code cannot."""
    _, null, found = singular(rule)
    assert abs(null[:, 0] @ SINGULAR).max() < 1e-12
    assert not found.converged[1]


@pytest.mark.parametrize("rule", RULES)
def test_ill_conditioned_operators(rule):
    """Condition numbers up to 1e13: the error within what was said, or no claim.

    A residual of τ leaves an error of τ κ at most; below that no claim can be true.
    """
    powers = np.arange(1, 14, 2)
    a = np.stack([spectrum(np.geomspace(10.0**-p, 1, N)) for p in powers])
    g = np.random.default_rng(3).normal(size=(len(a), N))
    found = jax.jit(jax.vmap(adjoint(RULES[rule])))(jnp.asarray(a), jnp.asarray(g))
    for i, power in enumerate(powers):
        residual = np.linalg.norm(a[i].T @ found.value[i] - g[i])
        size = np.linalg.norm(g[i])
        rounding = 10 * EPS * np.linalg.norm(found.value[i])
        if found.converged[i]:
            assert residual <= 1e-10 * size + rounding, power
        if power <= 3:
            assert found.converged[i], power


def test_transposed_operators():
    """⟨g, (I - J)⁻¹ b⟩ = ⟨(I - Jᵀ)⁻¹ g, b⟩ for a J that is far from normal.

    The left by ``rbp_jvp``, the right by ``rbp_vjp``, both against NumPy.
    """
    jac = np.eye(N) - WELL_POSED["upper triangular"]
    f = lambda w, x, h: w @ h + x
    w, g, b = jnp.asarray(jac), jnp.arange(1.0, N + 1), jnp.cos(jnp.arange(1.0, N + 1))
    h = jnp.linalg.solve(jnp.eye(N) - w, b)
    rule = rbpjax.Adaptive(tol=1e-12)
    forward = jax.jit(
        lambda d: (
            rbpjax.rbp_jvp(f, w, b, h, (jnp.zeros_like(w), d), backward=rule).value
        )
    )(b)
    (_, backward), _ = jax.jit(lambda g: rbpjax.rbp_vjp(f, w, b, h, g, backward=rule))(
        g
    )
    np.testing.assert_allclose(forward, np.linalg.solve(np.eye(N) - jac, b), rtol=1e-9)
    want = np.linalg.solve(np.eye(N) - jac.T, g)
    np.testing.assert_allclose(backward, want, rtol=1e-9)
    np.testing.assert_allclose(g @ forward, backward @ b, rtol=1e-9)


def test_complex_operators():
    """The bilinear transpose, not the adjoint: Aᵀz = g without a conjugate."""
    a = general() + 1j * RANDOM.normal(size=(N, N))
    g = RANDOM.normal(size=N) + 1j * RANDOM.normal(size=N)
    found = jax.jit(adjoint(RULES["default"]))(jnp.asarray(a), jnp.asarray(g))
    assert found.converged
    want = np.linalg.solve(a.T, g)
    error = np.linalg.norm(found.value - want) / np.linalg.norm(want)
    assert error <= 1e-10 * np.linalg.cond(a)


def test_operators_on_a_pytree_of_two_precisions():
    """Leaves in float32 and float64 (lineax: mixed dtypes): float32's accuracy."""
    a = WELL_POSED["general"]
    split = lambda v: {"a": v[:2].astype(jnp.float32), "b": v[2:]}

    def vjp(v):
        flat = jnp.concatenate([v["a"].astype(jnp.float64), v["b"]])
        return split(flat - jnp.asarray(a).T @ flat)

    g = jnp.arange(1.0, N + 1)
    found = jax.jit(lambda g: rbpjax.Adaptive()(vjp, g))(split(g))
    got = jnp.concatenate([found.value["a"].astype(jnp.float64), found.value["b"]])
    assert found.value["a"].dtype == jnp.float32 and found.value["b"].dtype == g.dtype
    want = np.linalg.solve(a.T, g)
    # ε^¾ of float32 is 6e-6.
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert found.converged and error <= 6e-6 * np.linalg.cond(a)


@cache
def edges(name: str):
    """A NaN in A, an infinity in g, g = 0, and a breakdown of Lanczos, in one batch."""
    skew = np.kron(np.eye(N // 2), [[0.0, 1.0], [-1.0, 0.0]])
    poisoned = WELL_POSED["general"].copy()
    poisoned[1, 2] = np.nan
    a = jnp.asarray(np.stack([poisoned, WELL_POSED["general"], general(), skew]))
    g = np.ones((4, N))
    g[1, 0], g[2] = np.inf, 0.0
    return a, jnp.asarray(g), jax.jit(jax.vmap(adjoint(RULES[name])))(a, jnp.asarray(g))


@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_is_never_converged(rule):
    """lineax: nonfinite input."""
    _, _, found = edges(rule)
    assert not found.converged[0] and not found.converged[1]


@pytest.mark.parametrize("rule", RULES)
def test_a_zero_right_hand_side_has_the_zero_solution(rule):
    _, _, found = edges(rule)
    assert found.converged[2] and (found.value[2] == 0).all()


@pytest.mark.parametrize("rule", ["default", "direct", "cg_normal", "gmres"])
def test_a_breakdown_is_survived(rule):
    """A skew A has gᵀAg = 0, on which BiCGSTAB breaks down at once; κ(A) = 1."""
    a, g, found = edges(rule)
    assert found.converged[3]
    np.testing.assert_allclose(a[3].T @ found.value[3], g[3], rtol=1e-9)


@pytest.mark.parametrize("rule", ["default", "cg_normal", "gmres"])
def test_a_budget_that_is_too_small_is_said(rule):
    """Ten times fewer products than needed: not converged, and the residual is true."""
    small = dataclasses.replace(RULES[rule], max_steps=2)
    a = jnp.asarray(spectrum(np.geomspace(1e-3, 1, N)))
    g = jnp.arange(1.0, N + 1)
    found = jax.jit(adjoint(small))(a, g)
    assert not found.converged
    residual = jnp.linalg.norm(g - a.T @ found.value) / jnp.linalg.norm(g)
    np.testing.assert_allclose(found.residual, residual, rtol=1e-6)


def test_a_large_dense_operator():
    """200 unknowns, a condition of about 100, without a Jacobian being formed."""
    random = np.random.default_rng(4)
    a = np.eye(200) + 0.5 * random.normal(size=(200, 200)) / 200**0.5
    g = random.normal(size=200)
    found = jax.jit(adjoint(RULES["default"]))(jnp.asarray(a), jnp.asarray(g))
    want = np.linalg.solve(a.T, g)
    error = np.linalg.norm(found.value - want) / np.linalg.norm(want)
    assert found.converged and error <= 1e-10 * np.linalg.cond(a)
