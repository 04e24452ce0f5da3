"""The bound on a gradient's error, against dense gradients in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import Adaptive, FixedPointIteration, Hybrid, Neumann, Newton

N = 8


def network(w, x, h):
    return jnp.tanh(w @ h + x)


def dense(w, x, weights, h):
    """The exact gradient of weights · h* for w, by Newton from h and LU."""
    for _ in range(50):
        image, jac = network(w, x, h), jax.jacobian(network, 2)(w, x, h)
        h = h + jnp.linalg.solve(jnp.eye(N) - jac, image - h)
    jac = jax.jacobian(network, 2)(w, x, h)
    z = jnp.linalg.solve(jnp.eye(N) - jac.T, weights)
    return jax.vjp(lambda w: network(w, x, h), w)[1](z)[0]


def draw(seed, gain):
    random = np.random.default_rng(seed)
    w = gain * random.normal(size=(N, N)) / N**0.5
    return jnp.asarray(w), *jnp.asarray(random.normal(size=(2, N)))


SOLVES = {
    "defaults": (Hybrid(), Adaptive()),
    "loose": (FixedPointIteration(tol=1e-2), Adaptive(tol=1e-2)),
    "few steps": (FixedPointIteration(steps=12), Adaptive()),
    "few terms": (Hybrid(), Neumann(steps=3)),
    "loose Newton": (Newton(tol=1e-2), Adaptive(tol=1e-3)),
}


@pytest.mark.parametrize("name", SOLVES)
def test_bounds_hold_within_their_factor_and_decide(name):
    """60 networks: hardly exceeded, not idle, and ``converged`` is the comparison.

    The cotangent is constant, so that the bound covers the whole gradient. An estimate
    is right to a small factor; one that were ten times too large would be of no use.
    """
    forward, backward = SOLVES[name]
    solve = rbpjax.rbp_solve(network, forward=forward, backward=backward)

    def both(w, x, weights):
        def loss(w, probe):
            found = solve(w, x, jnp.zeros(N), probe=probe)
            return weights @ found.value, found.value

        run = rbpjax.value_and_grad_with_report(loss, has_aux=True)
        (_, h), grad, report = run(w)
        right = dense(w, x, weights, h)
        error = jnp.linalg.norm(grad - right) / jnp.linalg.norm(right)
        return error, report

    drawn = [draw(seed, 0.4 + 1.2 * (seed % 10) / 10) for seed in range(60)]
    batch = [jnp.stack(parts) for parts in zip(*drawn, strict=True)]
    error, report = jax.jit(jax.vmap(both))(*batch)
    stated = np.isfinite(report.bound)
    assert np.all(error[stated] <= 3 * report.bound[stated])
    accuracy = float(jnp.finfo(jnp.float64).eps) ** 0.5
    assert np.array_equal(report.converged == 1, report.bound <= accuracy)
    assert not np.any((report.converged == 1) & (error > 10 * accuracy))
    if name == "few steps":  # of a state not at rest nothing is said
        assert not stated.any()
        return
    assert stated.mean() > 0.7
    assert np.median(error[stated] / report.bound[stated]) > 0.1
    assert np.all(report.converged == float(name == "defaults"))


def test_a_failed_forward_solve_is_never_converged():
    """Plain iteration diverges; the adjoint of where it stopped is solved exactly."""
    solve = rbpjax.rbp_solve(
        lambda k, x, h: x - k * h, forward=FixedPointIteration(max_steps=50)
    )
    loss = lambda k, probe: jnp.sum(solve(k, jnp.ones(2), jnp.ones(2), probe).value)
    _, grad, report = rbpjax.value_and_grad_with_report(loss)(jnp.array(5.0))
    assert abs(grad + 2 / 36) > 1
    assert report.status == 0 and report.forward_status != 0
    assert report.converged == 0 and jnp.isinf(report.bound)


def test_the_report_covers_both_solves():
    """Steps, products and residual of the forward solve are those of its solution."""
    w, x, weights = draw(0, 0.7)
    solve = jax.jit(rbpjax.rbp_solve(network))
    alone = solve(w, x, jnp.zeros(N))
    loss = lambda w, probe: weights @ solve(w, x, jnp.zeros(N), probe).value
    _, _, report = jax.jit(rbpjax.value_and_grad_with_report(loss))(w)
    assert int(report.forward_steps) == int(alone.num_steps)
    assert int(report.forward_products) == int(alone.num_products)
    assert report.forward_residual == pytest.approx(float(alone.residual), rel=1e-6)
    assert int(report.forward_status) == int(alone.status) == 0
    assert report.converged == 1 and 0 < report.bound < 1e-8


def test_a_loss_without_a_gradient_has_a_bound_of_zero():
    """Nothing arrived, and nothing is wrong with it."""
    w, x, _ = draw(1, 0.7)
    solve = rbpjax.rbp_solve(network)
    loss = lambda w, probe: 0.0 * jnp.sum(solve(w, x, jnp.zeros(N), probe).value)
    _, grad, report = rbpjax.value_and_grad_with_report(loss)(w)
    assert not jnp.any(grad)
    assert report.bound == 0 and report.converged == 1
