"""States of several leaves: units, weights and sizes change neither steps nor verdict.

The problem is four leaves of six entries, J of spectral radius up to 0.9 in variables
without units, D⁻¹JD in the state's own; float32, with a float64 oracle.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import (
    CG,
    GMRES,
    RBP,
    Adaptive,
    BiCGSTAB,
    CGNormal,
    Direct,
    Neumann,
    Status,
)
from tests.support.counters import counted_products
from tests.support.problems import rows

LEAVES, SIZE, CASES = 4, 6, 24
N = LEAVES * SIZE
EPS = float(np.finfo(np.float32).eps)
TOL = EPS**0.75
RULES = {
    "neumann": Neumann(max_steps=3000),
    "cg_normal": CGNormal(),
    "bicgstab": BiCGSTAB(),
    "gmres": GMRES(restart=24),
    "adaptive": Adaptive(),
}
each_rule = pytest.mark.parametrize(
    "name", rows(RULES.keys(), ("neumann", "adaptive", "gmres"))
)


def problems(coupled=True, units=0.0, weights=0.0, seed=0):
    """(jac, g, unit): Jacobians with units, cotangents, and the units of z."""
    random = np.random.default_rng(seed)
    jac = random.normal(size=(CASES, N, N))
    if not coupled:
        jac *= np.kron(np.eye(LEAVES), np.ones((SIZE, SIZE)))
    rho = np.abs(np.linalg.eigvals(jac)).max(1)
    jac *= (random.uniform(0.5, 0.9, CASES) / rho)[:, None, None]
    draw = lambda size: np.repeat(
        10 ** random.uniform(-size, size, (CASES, LEAVES)), SIZE, 1
    )
    # A state in units s has a cotangent, and an adjoint, in units of 1 / s.
    s, weight = draw(units), draw(weights)
    g = random.normal(size=(CASES, N)) * weight
    return jac * s[:, :, None] / s[:, None, :], g / s, 1 / s


def split(v):
    return tuple(jnp.split(v, LEAVES, axis=-1))


def product(jac, v):
    """Jᵀv for a state of leaves."""
    return split(jnp.concatenate(v) @ jac)


def solved(rule, jac, g):
    """The rule on a batch of states of several leaves; z as one vector."""

    def run(jac, g):
        found = rule(partial(product, jac), split(g))
        return found._replace(value=jnp.concatenate(found.value))

    jac, g = (jnp.asarray(x, jnp.float32) for x in (jac, g))
    return jax.jit(jax.vmap(run))(jac, g), np.asarray(jac, float), np.asarray(g, float)


@each_rule
@pytest.mark.parametrize(
    ("coupled", "units", "weights"),
    [
        (True, 0.0, 0.0),
        (True, 6.0, 0.0),
        (True, 6.0, 4.0),
        (False, 6.0, 4.0),
        (False, 0.0, 4.0),
    ],
)
def test_every_leaf_is_right(name, coupled, units, weights):
    """Converged, and in each leaf's own size z is off by ten times what is meant."""
    jac, g, unit = problems(coupled, units, weights)
    found, jac, g = solved(RULES[name], jac, g)
    free = jac * unit[:, :, None] / unit[:, None, :]
    inverse = np.linalg.inv(np.eye(N) - free.transpose(0, 2, 1))
    z = np.einsum("bij,bj->bi", inverse, g / unit)
    error = np.asarray(found.value, float) / unit - z
    norm = lambda x: np.linalg.norm(x.reshape(CASES, LEAVES, SIZE), axis=2)
    size = norm(z)
    if not coupled:  # a leaf's error is by its own block
        relative = norm(error) / size
    else:  # that of a small leaf is by the larger ones
        relative = norm(error) / size.max(1, keepdims=True)
    amplified = np.linalg.norm(inverse, 2, axis=(1, 2))
    right = relative.max(1) <= 10 * TOL * amplified
    converged = np.asarray(found.converged)
    assert right[converged].all(), relative.max(1)[converged & ~right]
    # BiCGSTAB alone has no guarantee; what others miss is rounding.
    assert converged.mean() >= 0.9
    assert np.isin(found.status, [Status.CONVERGED, Status.ROUNDING]).mean() >= 0.95


@each_rule
def test_units_of_powers_of_two_change_nothing(name):
    """Bit for bit: the same steps, residual and, in its units, adjoint."""
    jac, g, _ = problems()
    s = np.repeat(np.float32([2.0**20, 1.0, 2.0**-17, 2.0**3]), SIZE)
    jac, g = jac.astype(np.float32), g.astype(np.float32)
    plain, _, _ = solved(RULES[name], jac, g)
    other, _, _ = solved(
        RULES[name], jac * s[:, None] / s, g / s * np.float32(2.0**-30)
    )
    np.testing.assert_array_equal(plain.num_steps, other.num_steps)
    np.testing.assert_array_equal(plain.residual, other.residual)
    np.testing.assert_array_equal(
        plain.value, np.asarray(other.value) * s * np.float32(2.0**30)
    )


@pytest.mark.parametrize("name", rows(RULES.keys(), ("adaptive", "neumann")))
def test_a_leaf_that_is_reached_late(name):
    """A chain of leaves with the cotangent at its end: each has its own size."""
    random = np.random.default_rng(0)
    blocks = np.eye(LEAVES, k=1) * 1e-3 + np.eye(LEAVES) * 0.3
    jac = np.kron(blocks, np.ones((SIZE, SIZE))) * random.normal(size=(CASES, N, N))
    jac /= 6**0.5  # so that Jᵀ leads from each leaf to the next
    g = random.normal(size=(CASES, N)) * (np.arange(N) < SIZE)
    # The other way round the other leaves are never reached, and zero; not by CG on the
    # normal equations, whose products with J leave rounding in them.
    for chain in (jac, np.swapaxes(jac, 1, 2))[: 1 if name == "cg_normal" else 2]:
        found, chain32, g32 = solved(RULES[name], chain, g)
        z = np.linalg.solve(np.eye(N) - chain32.transpose(0, 2, 1), g32[..., None])
        leaves = lambda x: np.linalg.norm(x.reshape(CASES, LEAVES, SIZE), axis=2)
        error, size = leaves(np.asarray(found.value) - z[..., 0]), leaves(z)
        assert np.asarray(found.converged).all()
        # κ of I - J in its leaves' own sizes is below 20.
        assert (error <= 10 * 20 * TOL * size).all()


@pytest.mark.parametrize("rule", [CG(), RBP(), Direct(), Neumann(steps=40)])
def test_a_small_leaf_is_in_the_residual_of_every_rule(rule):
    """Unscaled rules too: wrong in a leaf of 1e-7 beside one of 1 is not converged."""
    a = (jnp.float32(0.5), jnp.float32(0.999))
    g = (jnp.ones(1, jnp.float32), jnp.full(1, 1e-7, jnp.float32))
    vjp = lambda v: jax.tree.map(jnp.multiply, a, v)
    found = jax.jit(lambda g: rule(vjp, g))(g)
    want = 1e-7 / (1 - np.asarray(a[1], float))
    error = abs(float(found.value[1][0]) - want) / want
    assert error < 1e-2 or not found.converged


def test_one_leaf_pays_nothing_and_several_next_to_nothing():
    """The products that find the sizes are the first of the series."""
    random = np.random.default_rng(0)
    jac = jnp.asarray(0.5 * np.linalg.qr(random.normal(size=(N, N)))[0])
    g = jnp.asarray(random.normal(size=N))
    for rule in (Neumann(tol=1e-6), Adaptive(tol=1e-6), Neumann(steps=5)):
        one, _ = counted_products(rule, lambda h: jac @ h, g, g)
        split_step = lambda h: split(jac @ jnp.concatenate(h))
        several, found = counted_products(rule, split_step, split(g), split(g))
        assert found.status in (Status.CONVERGED, Status.TRUNCATED)
        # The tolerance of each leaf's own is up to four times tighter: two terms, and
        # one by the looks.
        assert several <= one + (0 if getattr(rule, "steps", None) else 3)


def test_a_garbage_start_of_other_units_is_harmless():
    """Leaves of a start that are off by 1e±6 among each other: right, and said so."""
    jac, g, unit = problems(units=4.0)
    start = np.random.default_rng(3).normal(size=(CASES, N))

    def run(jac, g, start):
        found = Adaptive()(partial(product, jac), split(g), start=split(start))
        return found._replace(value=jnp.concatenate(found.value))

    args = [jnp.asarray(x, jnp.float32) for x in (jac, g, start)]
    found = jax.jit(jax.vmap(run))(*args)
    jac, g = (np.asarray(x, float) for x in args[:2])
    z = np.linalg.solve(np.eye(N) - jac.transpose(0, 2, 1), g[..., None])[..., 0]
    error = np.linalg.norm((np.asarray(found.value) - z) / unit, axis=1)
    assert np.asarray(found.converged).all()
    assert (error <= 1e-2 * np.linalg.norm(z / unit, axis=1)).all()
