"""Diagnostics against dense eigenvalues, singular values and residuals."""

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import rbpjax
from rbpjax.diagnostics.spectrum import matrix_radius
from tests.support.problems import (
    EXPANSIVE,
    PROBLEMS,
    assert_close,
    dense_jacobian,
    fixed_point,
    readout,
    rows,
)

KEY = jax.random.key(4)
SIMILAR = jax.random.normal(jax.random.key(5), (6, 6)) + 2 * jnp.eye(6)


def non_normal(*blocks):
    """A matrix with the eigenvalues of the blocks and none of their symmetry."""
    return SIMILAR @ jax.scipy.linalg.block_diag(*blocks) @ jnp.linalg.inv(SIMILAR)


def rotation(modulus, angle):
    c, s = jnp.cos(angle), jnp.sin(angle)
    return modulus * jnp.array([[c, -s], [s, c]])


SMALL = jnp.diag(jnp.array([0.3, -0.2, 0.1, 0.05]))
SPECTRA = {
    "complex_pair": (non_normal(rotation(0.9, 1.0), SMALL), 0.9),
    "slow_rotation": (non_normal(rotation(1.2, 0.2), SMALL), 1.2),
    "plus_minus_pair": (non_normal(jnp.diag(jnp.array([0.8, -0.8])), SMALL), 0.8),
    "negative": (non_normal(jnp.diag(jnp.array([-0.95, 0.5])), SMALL), 0.95),
    "defective": (non_normal(jnp.array([[0.7, 1.0], [0.0, 0.7]]), SMALL), 0.7),
    "expansive": (non_normal(rotation(3.0, 2.0), SMALL), 3.0),
}


def linear(w, x, h):
    return w @ h + x


@pytest.mark.parametrize(("w", "want"), SPECTRA.values(), ids=SPECTRA)
def test_spectral_radius_is_that_of_the_eigenvalues(w, want):
    """Complex, ± and defective dominant eigenvalues of non-normal J, to 1/num_steps."""
    assert jnp.abs(w @ w.T - w.T @ w).max() > 0.01  # not normal
    chex.assert_trees_all_close(
        jnp.abs(jnp.linalg.eigvals(w)).max(), jnp.array(want), rtol=1e-6
    )
    num_steps = 400
    estimate = jax.jit(
        lambda key: rbpjax.diagnostics.spectral_radius(
            key, linear, w, jnp.ones(6), jnp.zeros(6), num_steps=num_steps
        )
    )
    for key in jax.random.split(KEY, 3):
        # A Jordan block grows like kρᵏ, whose slope is off by 1/k for k near 300.
        assert jnp.abs(estimate(key) / want - 1) < 2 / num_steps


def test_ritz_values_see_what_growth_has_not_reached():
    """A dense spectrum up to 0.98: growth is too small, Ritz values nearly right."""
    q = jnp.linalg.qr(jax.random.normal(KEY, (200, 200)))[0]
    w = q @ jnp.diag(jnp.linspace(0.0, 0.98, 200)) @ q.T
    radius = lambda basis: rbpjax.diagnostics.spectral_radius(
        KEY, linear, w, jnp.ones(200), jnp.zeros(200), num_steps=60, basis=basis
    )
    alone, both = radius(0), radius(60)
    assert alone < 0.98 * (1 - 4e-3) and both < 0.98 * (1 + 1e-9)
    assert jnp.abs(both / 0.98 - 1) < 2e-4


@pytest.mark.full
def test_ritz_values_of_a_shift_are_not_believed():
    """J far from normal: ρ = 0.3, ‖J‖ near 1.3, Ritz values in between."""
    w = 0.3 * jnp.eye(40) + jnp.eye(40, k=1)
    radius = lambda basis: rbpjax.diagnostics.spectral_radius(
        KEY, linear, w, jnp.ones(40), jnp.zeros(40), num_steps=2000, basis=basis
    )
    assert radius(20) < 0.3 * 1.05
    assert radius(20) >= radius(0)


@pytest.mark.parametrize("size", [1e-100, 1.0, 1e100])
def test_the_radius_of_a_small_matrix(size):
    """Complex, defective, nilpotent and zero; any magnitude."""
    cases = [w for w, _ in SPECTRA.values()]
    for w in [*cases, jnp.zeros((3, 3)), jnp.eye(3, k=1)]:
        want = jnp.abs(jnp.linalg.eigvals(w)).max()
        # A defective eigenvalue is known to √ε times the condition of SIMILAR.
        chex.assert_trees_all_close(matrix_radius(size * w) / size, want, rtol=2e-6)


@pytest.mark.parametrize("problem", rows(PROBLEMS, ("pytree",)))
def test_diagnostics_of_pytree_and_batched_states(problem):
    """ρ(J) and ‖J‖ of every problem are those of its dense Jacobian."""
    h = fixed_point(problem)
    jac = dense_jacobian(problem, h)
    args = (KEY, problem.f, problem.params, problem.inputs, h)
    radius = jax.jit(
        lambda: rbpjax.diagnostics.spectral_radius(*args, num_steps=1000)
    )()
    # Batched examples may have radii within a few percent of the largest.
    want = jnp.abs(jnp.linalg.eigvals(jac)).max()
    assert jnp.abs(radius / want - 1) < 0.01
    norm = jax.jit(lambda: rbpjax.diagnostics.jacobian_norm(*args, num_steps=40))()
    assert_close(norm, jnp.linalg.svd(jac, compute_uv=False)[0], 1e-9)


def test_nilpotent_jacobian_has_radius_zero():
    """J² = 0 with ‖J‖ = 3: radius 0, no NaN."""
    w = jnp.array([[0.0, 3.0], [0.0, 0.0]])
    args = (KEY, linear, w, jnp.ones(2), jnp.zeros(2))
    assert rbpjax.diagnostics.spectral_radius(*args) == 0
    chex.assert_trees_all_close(
        rbpjax.diagnostics.jacobian_norm(*args), jnp.array(3.0), rtol=1e-9
    )


def test_constant_map_has_norm_zero():
    """J = 0: both diagnostics are 0."""
    args = (KEY, lambda w, x, h: x + 0 * h, None, jnp.ones(3), jnp.ones(3))
    assert rbpjax.diagnostics.spectral_radius(*args) == 0
    assert rbpjax.diagnostics.jacobian_norm(*args) == 0


def test_jacobian_norm_rises_to_the_largest_singular_value():
    """Lanczos gives lower bounds that increase with the steps, exact at n of them."""
    w = non_normal(rotation(0.9, 1.0), SMALL)
    args = (KEY, linear, w, jnp.ones(6), jnp.zeros(6))
    bounds = [
        float(rbpjax.diagnostics.jacobian_norm(*args, num_steps=k))
        for k in (1, 2, 3, 6)
    ]
    want = float(jnp.linalg.norm(w, 2))
    assert bounds == sorted(bounds) and bounds[0] < 0.999 * want
    assert abs(bounds[-1] / want - 1) < 1e-9


def test_adjoint_residual_is_the_definition():
    """‖g + Jᵀz - z‖ / ‖g‖ for any z; 0 at the dense adjoint; the norm where g = 0."""
    problem = PROBLEMS["pytree"]
    h = fixed_point(problem)
    jac = dense_jacobian(problem, h)
    flat, unravel = jax.flatten_util.ravel_pytree(h)
    g = jax.flatten_util.ravel_pytree(jax.grad(readout)(h))[0]
    residual = jax.jit(
        lambda g, z: rbpjax.diagnostics.adjoint_residual(
            problem.f, problem.params, problem.inputs, h, unravel(g), unravel(z)
        )
    )
    for size in (1.0, 1e-200):  # squares vanish in float64
        z = jnp.cos(flat) * size
        defect = jnp.linalg.norm(g + jac.T @ (z / size) - z / size)
        want = defect / jnp.linalg.norm(g)
        chex.assert_trees_all_close(residual(g * size, z), want, rtol=1e-12)
    z = jnp.linalg.solve(jnp.eye(flat.size) - jac.T, g)
    assert residual(g, z) < 1e-13
    z = jnp.cos(flat)
    chex.assert_trees_all_close(
        residual(0 * g, z), jnp.linalg.norm(jac.T @ z - z), rtol=1e-12
    )


def test_diagnostics_work_on_an_expansive_map_under_vmap():
    """Under vmap over keys each estimate is its own, and near ρ(J) = 1.5."""
    keys = jax.random.split(KEY, 3)
    radius = lambda key: rbpjax.diagnostics.spectral_radius(
        key, EXPANSIVE.f, EXPANSIVE.params, EXPANSIVE.inputs, EXPANSIVE.h0
    )
    estimates = jax.jit(jax.vmap(radius))(keys)
    chex.assert_trees_all_close(estimates, jnp.full(3, 1.5), rtol=1e-2)
    chex.assert_trees_all_close(estimates[1], radius(keys[1]), rtol=1e-10)


def test_diagnostics_of_a_complex_state():
    """ρ(J) and ‖J‖ of a complex matrix are those of the real map of twice the size."""
    w = jax.lax.complex(0.5 * SIMILAR[:3, :3], 0.4 * SIMILAR[3:, :3])
    zero = jnp.zeros(3, complex)
    args = (KEY, linear, w, zero, zero)
    want = jnp.abs(jnp.linalg.eigvals(w)).max()
    radius = jax.jit(lambda: rbpjax.diagnostics.spectral_radius(*args, num_steps=400))()
    assert jnp.abs(radius / want - 1) < 1 / 400
    norm = jax.jit(lambda: rbpjax.diagnostics.jacobian_norm(*args))()
    chex.assert_trees_all_close(norm, jnp.linalg.norm(w, 2), rtol=1e-9)


def test_diagnostics_of_a_sharded_state():
    """On an explicit mesh the random start takes the sharding of the state."""
    problem = PROBLEMS["tanh_rnn"]
    mesh = jax.make_mesh((3,), ("d",))
    h = fixed_point(problem)
    want = rbpjax.diagnostics.jacobian_norm(
        KEY, problem.f, problem.params, problem.inputs, h
    )
    norm = jax.jit(
        lambda p, x, h: rbpjax.diagnostics.jacobian_norm(KEY, problem.f, p, x, h)
    )
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec("d"))
        x, h = jax.device_put((problem.inputs, h), rows)
        got = jax.device_get(norm(problem.params, x, h))
    chex.assert_trees_all_close(got, jax.device_get(want), rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (
            lambda *a: rbpjax.diagnostics.spectral_radius(KEY, *a, num_steps=3),
            "`num_steps`.*at least 4.*3",
        ),
        (
            lambda *a: rbpjax.diagnostics.jacobian_norm(KEY, *a, num_steps=0),
            "`num_steps`.*at least 1.*0",
        ),
    ],
)
def test_bad_step_counts(call, pattern):
    """Too few products are a ValueError that names the minimum."""
    with pytest.raises(ValueError, match=pattern):
        call(linear, jnp.eye(2), jnp.ones(2), jnp.ones(2))
