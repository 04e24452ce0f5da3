"""What arithmetic does to a verdict: half precision, overflow, lost digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import (
    CG,
    GMRES,
    RBP,
    Adaptive,
    Anderson,
    BiCGSTAB,
    CGNormal,
    Direct,
    FixedPointIteration,
    Neumann,
    Status,
)
from tests.support.problems import rows

RULES = {
    "neumann": Neumann(),
    "neumann_steps": Neumann(steps=30),
    "rbp": RBP(),
    "anderson": RBP(Anderson()),
    "cg": CG(),
    "cg_normal": CGNormal(),
    "bicgstab": BiCGSTAB(),
    "gmres": GMRES(),
    "direct": Direct(),
    "adaptive": Adaptive(),
}
every_rule = pytest.mark.parametrize("name", RULES)


def true_residual(jac, g, z):
    """‖g + Jᵀz - z‖ / ‖g‖ of a batch, in float64 whatever the arrays are."""
    jac, g, z = (np.asarray(x, float) for x in (jac, g, z))
    r = g + np.einsum("bij,bi->bj", jac, z) - z
    return np.linalg.norm(r, axis=1) / np.linalg.norm(g, axis=1)


def solved(rule, jac, g):
    """The rule on a batch of dense Jacobians."""
    run = lambda jac, g: rule(lambda v: v @ jac, g)
    return jax.jit(jax.vmap(run))(jac, g)


@every_rule
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_cotangents_of_any_size(name, dtype):
    """As small as the mean over a large batch makes them: as right as those of size 1.

    J is symmetric, of norm 0.45: κ(I - J) below 3.
    """
    random = np.random.default_rng(0)
    q = np.linalg.qr(random.normal(size=(8, 8)))[0]
    jac = jnp.asarray((q * np.linspace(-0.45, 0.45, 8)) @ q.T, dtype)
    sizes = np.array([1.0, 1e-2, 1e-4, 1e-5, 100.0])
    g = jnp.asarray(sizes[:, None] * random.choice([-1.0, 1.0, 0.7], (5, 8)), dtype)
    found = solved(RULES[name], jnp.broadcast_to(jac, (5, 8, 8)), g)
    z = np.linalg.solve(np.eye(8) - np.asarray(jac, float).T, np.asarray(g, float).T).T
    error = np.linalg.norm(np.asarray(found.value, float) - z, axis=1)
    eps = float(jnp.finfo(dtype).eps)
    # The tolerance ε^¾ or some roundings, by κ; at 1e-5 float16 has steps of 6e-8.
    allowed = 3 * (eps**0.75 + 4 * eps) * np.linalg.norm(z, axis=1)
    steps = float(jnp.finfo(dtype).smallest_subnormal) * 8**0.5
    assert (error <= allowed + steps).all(), error / np.linalg.norm(z, axis=1)


@every_rule
def test_an_adjoint_that_overflows_is_not_finite(name):
    """16 times a cotangent near the largest float32, by any rule: never converged."""
    a = 0.9375 * jnp.eye(4, dtype=jnp.float32)
    g = jnp.array([1.0, 1.0, 0.5, 0.25], jnp.float32)
    rule = Neumann(steps=300) if name == "neumann_steps" else RULES[name]
    run = jax.jit(lambda g: rule(lambda v: a @ v, g))
    found = run(3e37 * g)
    assert not jnp.isfinite(found.value).all()
    assert int(found.status) == Status.NOT_FINITE and not found.converged
    found = run(1e37 * g)
    assert jnp.isfinite(found.value).all()
    assert int(found.status) != Status.NOT_FINITE


ITERATIVE = [n for n in RULES if n not in ("neumann_steps", "rbp", "anderson", "cg")]


@pytest.mark.parametrize("name", rows(ITERATIVE, ("neumann", "adaptive", "gmres")))
def test_rounding_shared_with_the_iteration_is_not_convergence(name):
    """J = (1 - δ) I as a matrix product: z ← g + Jᵀz stalls with a residual of zero.

    The true one, in float64, is at most ten times what is reported or tolerated.
    """
    random, n = np.random.default_rng(0), 4
    deltas = np.concatenate([d * random.uniform(0.5, 2, 40) for d in (2e-3, 3e-4)])
    jac = jnp.asarray((1 - deltas)[:, None, None] * np.eye(n), jnp.float32)
    g = jnp.asarray(random.normal(size=(80, n)), jnp.float32)
    found = solved(RULES[name], jac, g)
    true = true_residual(jac, g, found.value)
    tol = float(np.finfo(np.float32).eps) ** 0.75
    assert (true[np.asarray(found.converged)] <= 10 * tol).all()
    assert (true <= 10 * np.asarray(found.residual)).all()
    assert (np.asarray(found.status) != Status.STAGNATED).all()


@pytest.mark.parametrize("name", ["bicgstab", "gmres", "cg_normal", "adaptive"])
def test_a_gradient_that_rounding_blurs_is_flagged_and_kept(name):
    """‖z‖ = 1e5 ‖g‖ in float32: the best iterate, 1 % off at most, and "rounding".

    Value iteration with a discount of 0.99999: the sum of z is 1e5 exactly.
    """
    p = np.random.default_rng(0).dirichlet(np.ones(30), size=30)
    p = jnp.asarray(p, jnp.float32)
    f = lambda r, x, v: r + 0.99999 * p @ v
    one = jnp.ones(30, jnp.float32)
    (bar, _), found = rbpjax.rbp_vjp(
        f, one, None, 1e5 * one, one / 30, backward=RULES[name]
    )
    assert abs(float(bar.sum()) - 1e5) < 1e3
    assert not found.converged and int(found.status) == Status.ROUNDING


def test_a_truncated_rule_is_not_a_failed_one():
    """Its status says so, whatever the residual, unless that meets the tolerance."""
    jac = jnp.asarray([[0.5, 0.2], [0.0, -0.4]])
    run = lambda rule, jac: rule(lambda v: jac.T @ v, jnp.ones(2))
    for rule in (Neumann(steps=3), RBP(FixedPointIteration(steps=3))):
        found = run(rule, jac)
        assert int(found.status) == Status.TRUNCATED and not found.converged
        assert 0 < found.residual < 0.2
        worse = run(rule, 4 * jac)
        assert int(worse.status) == Status.TRUNCATED and worse.residual > 1
        assert "above 1" in Status(int(worse.status)).words
        assert int(run(rule, jac.at[0].set(jnp.nan)).status) == Status.NOT_FINITE
        done = run(rule, 1e-6 * jac)
        assert done.converged and int(done.status) == Status.CONVERGED
