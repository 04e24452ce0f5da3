"""Decorrelation: monotone, volume-preserving, and apart from the loss."""

import jax
import jax.numpy as jnp
import pytest

from rbpjax import perturb
from tests.support.perturb import dense, distance, estimate, gradient, node_gradient


def rows():
    """Activities whose covariance (not about the mean) is a dense 4 × 4 matrix."""
    mix = jnp.array([[2, 0.7, 0, 0], [-1, 1, 0.4, 0], [0.5, 0, 1, 0.3], [0, 1, 0, 1.5]])
    return jax.random.normal(jax.random.key(0), (200, 4)) @ mix + 0.5


def second_moment(matrix, x):
    y = x @ matrix.T
    return y.T @ y / len(y)


def off_diagonal(matrix, x):
    moment = second_moment(matrix, x)
    return moment - jnp.diag(jnp.diag(moment))


def path(rate, steps, **options):
    """D after each update, the identity first."""
    x = rows()
    init, _, update = perturb.decorrelate(rate, **options)
    step = lambda matrix, _: (update(matrix, x),) * 2
    start = init(4)
    return jnp.concatenate([start[None], jax.lax.scan(step, start, None, steps)[1]])


def test_flow_decorrelates_monotonically():
    """‖C‖² and tr X only fall, at the rates of the flow; det D stays."""
    x, matrices = rows(), path(3e-4, 20_000)
    energy = jax.vmap(lambda m: jnp.sum(off_diagonal(m, x) ** 2))(matrices)
    trace = jax.vmap(lambda m: jnp.trace(second_moment(m, x)))(matrices)
    assert jnp.all(jnp.diff(energy)[energy[:-1] > 1e-12] < 0)
    assert jnp.all(jnp.diff(trace)[energy[:-1] > 1e-8] < 0)
    assert energy[-1] < 1e-9 * energy[0]
    c, moment = off_diagonal(matrices[0], x), second_moment(matrices[0], x)
    rates = -4 * jnp.trace(c @ c @ moment), -2 * jnp.sum(c**2)
    for curve, rate in zip((energy, trace), rates, strict=True):
        # The discrete step departs from the flow by rate × curvature, some 3e-4 × 40.
        assert abs((curve[1] - curve[0]) / 3e-4 / rate - 1) < 2e-2
    volume = jnp.linalg.slogdet(matrices[-1])[1]
    half = jnp.linalg.slogdet(path(1.5e-4, 40_000)[-1])[1]
    assert abs(volume) < 2e-2  # first order in the rate: halved with it
    assert abs(half / volume - 0.5) < 0.01


def test_one_update_by_hand():
    """D - rate C D, with C off the diagonal and a D that does not commute with it."""
    x, matrix = rows(), jnp.array(jnp.arange(16.0).reshape(4, 4) / 10 + jnp.eye(4))
    c = off_diagonal(matrix, x)
    for multiply, change in ((True, c @ matrix), (False, c)):
        got = perturb.decorrelate(0.01, multiply=multiply).update(matrix, x)
        assert distance(got, matrix - 0.01 * change) < 1e-13
    folded = perturb.decorrelate(0.01).update(matrix, x.reshape(10, 20, 4))
    assert distance(folded, matrix - 0.01 * c @ matrix) < 1e-13


def test_update_of_the_papers_time_loses_volume():
    """D - rate C decorrelates too, keeps D symmetric, and shrinks det D and trace."""
    x = rows()
    new, old = path(1e-3, 4000)[-1], path(1e-3, 4000, multiply=False)[-1]
    start = jnp.sum(off_diagonal(jnp.eye(4), x) ** 2)
    assert jnp.sum(off_diagonal(old, x) ** 2) < 1e-6 * start
    assert distance(old, old.T) < 1e-12 and distance(new, new.T) > 1e-3
    volume = lambda m: jnp.linalg.slogdet(m)[1]
    assert volume(old) < volume(new) - 0.1
    assert jnp.trace(second_moment(old, x)) < jnp.trace(second_moment(new, x))


def test_center_and_keep_norm():
    """Centered: covariances vanish instead of moments. keep_norm: mean ‖x̂‖ = ‖x‖."""
    x = rows()
    center = path(1e-3, 8000, center=True)[-1]
    y = x @ center.T
    covariance = jnp.cov(y.T)
    assert jnp.max(jnp.abs(covariance - jnp.diag(jnp.diag(covariance)))) < 1e-6
    assert jnp.max(jnp.abs(off_diagonal(center, x))) > 1e-2
    length = lambda m: jnp.mean(jnp.linalg.norm(x @ m.T, axis=1))
    kept = path(1e-3, 8000, keep_norm=True)[-1]
    assert abs(length(kept) / length(jnp.eye(4)) - 1) < 1e-12
    assert length(path(1e-3, 8000)[-1]) < 0.96 * length(jnp.eye(4))
    assert jnp.max(jnp.abs(off_diagonal(kept, x))) < 1e-6


def test_decorrelated_activities_are_a_fixed_point():
    """C = 0 (and no activity at all): D stays, with every option, and is finite."""
    x = jnp.concatenate([jnp.diag(jnp.arange(1.0, 5.0)), -jnp.diag(jnp.ones(4))])
    for options in ({}, {"keep_norm": True}, {"multiply": False}, {"center": False}):
        init, _, update = perturb.decorrelate(0.1, **options)
        assert distance(update(init(4), x), jnp.eye(4)) < 1e-12
        assert distance(update(init(4), 0 * x), jnp.eye(4)) < 1e-12


def test_it_composes_with_any_gradient():
    """D in the cell: BPTT and node perturbation agree, and no gradient reaches D."""
    matrix = jnp.array([[1.0, 0.3], [-0.5, 0.8]])
    net = dense(cell=perturb.DenseCell(decorrelation=matrix))
    rule = perturb.NodePerturbation(
        num_samples=9,
        difference=perturb.difference.Exact(),
        noise=perturb.noise.orthonormal,
    )
    assert distance(estimate(net, rule), gradient(net)) < 1e-12
    assert distance(gradient(net), gradient(dense())) > 0.01  # D matters
    assert distance(gradient(net, truncated=True), gradient(net)) > 0.01
    assert node_gradient(net).recurrent.shape == (3, 2)

    def loss(matrix, params):
        cell = perturb.DenseCell(decorrelation=matrix)
        out = perturb.unroll(cell, params, net.inputs, net.h0).outputs
        return jnp.sum(out**2)

    reached, _ = jax.grad(loss, argnums=(0, 1))(matrix, net.params)
    assert jnp.all(reached == 0)
    init, apply, update = perturb.decorrelate(0.1)
    assert init(3, jnp.float32).dtype == jnp.float32
    x = jnp.array([1.0, 2.0])
    assert jnp.all(jax.grad(lambda m: jnp.sum(apply(m, x)))(matrix) == 0)
    assert distance(apply(matrix, x), matrix @ x) < 1e-14

    @jax.jit  # D as a traced value, closed over by the cell
    def train(matrix, params):
        cell = perturb.DenseCell(decorrelation=matrix)
        f = perturb.recurrent_value_and_grad(cell, net.loss, perturb.NodePerturbation())
        states = perturb.unroll(cell, params, net.inputs, net.h0).states
        return f(jax.random.key(0), params, *net.data[1:])[1], update(matrix, states)

    grads, new = train(matrix, net.params)
    assert distance(grads, estimate(net, perturb.NodePerturbation())) < 1e-9
    assert new.shape == (2, 2)


def test_bad_input_is_named():
    """A rate or shapes that cannot be: ValueError with values."""
    for rate in (-1.0, float("nan"), "fast", jnp.array(0.1)):
        with pytest.raises(ValueError, match="`rate`"):
            perturb.decorrelate(rate)
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(4, 4\)"):
        perturb.decorrelate(0.1).update(jnp.eye(4), jnp.ones((5, 3)))
