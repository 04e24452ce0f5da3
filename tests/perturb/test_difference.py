"""Differences: exact where they say so, biased as they say."""

import chex
import jax
import jax.numpy as jnp
import pytest

from rbpjax import perturb
from rbpjax.perturb import ActivityPerturbation, NodePerturbation, WeightPerturbation
from rbpjax.perturb.difference import Central, Exact, OneSided
from tests.support.perturb import (
    TIGHT,
    dense,
    distance,
    estimate,
    gradient,
    signs,
    table,
)


def test_coordinate_differences_are_the_gradient():
    """One entry at a time by central differences: the gradient to 1e-9."""
    net = dense()
    # Steps of 1e-5: truncation about 1e-10, rounding about 1e-11.
    by = lambda d: dict(
        num_samples=d,
        difference=Central(sigma=1e-5 / d**0.5),
        noise=perturb.noise.coordinate,
    )
    for rule in (
        WeightPerturbation(**by(8)),
        NodePerturbation(**by(9), credit=perturb.credit.total),
    ):
        assert distance(estimate(net, rule), gradient(net)) < 1e-9


def test_finite_differences_are_off_by_sigma_squared():
    """With passes alone the bias falls a hundredfold with a tenth of σ."""
    net, errors = dense(), []
    for sigma in (1e-2, 1e-3):
        rule = NodePerturbation(
            num_samples=512, difference=OneSided(sigma=sigma), noise=table(signs(9))
        )
        errors.append(distance(estimate(net, rule), gradient(net)))
    assert errors[0] > 1e-5  # far above rounding
    assert 80 < errors[0] / errors[1] < 120


def test_one_sided_both_ways_is_central():
    """The mean of one-sided estimates at +v and -v is the central one at v."""
    net, rows = dense(), signs(9)[100:101]
    both = table(jnp.concatenate([rows, -rows]))
    one = estimate(
        net, NodePerturbation(num_samples=2, difference=OneSided(sigma=0.1), noise=both)
    )
    two = estimate(
        net,
        NodePerturbation(
            num_samples=1, difference=Central(sigma=0.1), noise=table(rows)
        ),
    )
    # Not the mean of differences of v alone: curvature shows at σ = 0.1.
    assert distance(one, two) < TIGHT
    single = estimate(
        net,
        NodePerturbation(
            num_samples=1, difference=OneSided(sigma=0.1), noise=table(rows)
        ),
    )
    assert distance(single, two) > 1e-3


def test_quadratic_losses_have_no_bias():
    """Central differences are exact, the mean of one-sided ones too, at σ = 3."""
    matrix = jnp.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 3.0]])
    loss = lambda p: p["a"] @ matrix @ p["a"] / 2 + 3 * p["a"][0]
    params = {"a": jnp.array([1.0, -2.0, 0.5])}
    want = jax.grad(loss)(params)
    v = table(jnp.array([[1.0, 2.0, -3.0]]))
    rule = WeightPerturbation(num_samples=1, difference=Central(sigma=3.0), noise=v)
    got = perturb.value_and_grad(loss, rule)(jax.random.key(0), params)[1]
    chex.assert_trees_all_close(
        got["a"], jnp.array([1.0, 2.0, -3.0]) * (want["a"] @ jnp.array([1.0, 2, -3]))
    )
    rule = WeightPerturbation(
        num_samples=8, difference=OneSided(sigma=3.0), noise=table(signs(3))
    )
    value, got = perturb.value_and_grad(loss, rule)(jax.random.key(0), params)
    assert distance(got, want) < TIGHT
    assert value == loss(params)


def test_bias_of_a_cubic():
    """E is 3θ² + σ² for signs, 3θ² + 3σ² for Gaussians (by quadrature), 3θ² for jvp."""
    theta, sigma = jnp.array(1.5), 0.5
    two, six = jnp.array([[1.0], [-1.0]]), jnp.zeros((6, 1)).at[0].set(3**0.5)
    six = six.at[1].set(-(3**0.5))  # nodes ±√3 and 0: exact up to the fifth moment
    for rows, difference, bias in (
        (two, OneSided(sigma=sigma), sigma**2),
        (six, OneSided(sigma=sigma), 3 * sigma**2),
        (six, Central(sigma=sigma), 3 * sigma**2),
        (two, Exact(), 0.0),
    ):
        rule = WeightPerturbation(
            num_samples=len(rows), difference=difference, noise=table(rows)
        )
        got = perturb.value_and_grad(lambda p: p**3, rule)(jax.random.key(0), theta)[1]
        assert abs(got - (3 * theta**2 + bias)) < TIGHT


@pytest.mark.parametrize(
    ("make", "factor"),
    [
        (lambda s: NodePerturbation(num_samples=3, difference=OneSided(sigma=s)), 1),
        pytest.param(
            lambda s: ActivityPerturbation(num_samples=3, difference=OneSided(sigma=s)),
            1,
            marks=pytest.mark.full,
        ),
        (lambda s: perturb.paper_code(6, sigma=s).activity, 1),
        pytest.param(
            lambda s: perturb.paper_code(6, sigma=s).node, 10, marks=pytest.mark.full
        ),
        pytest.param(
            lambda s: perturb.paper_code(6, sigma=s).weight, 10, marks=pytest.mark.full
        ),
    ],
    ids=["node", "activity", "paper's activity", "paper's node", "paper's weight"],
)
def test_size_of_the_noise_cancels(make, factor):
    """σ tenfold: node and activity rules stay, those of the paper's code scale."""
    net = dense(units=4)
    small, large = (estimate(net, make(sigma)) for sigma in (1e-5, 1e-4))
    # O(σ) of a single sample.
    assert distance(jax.tree.map(lambda x: factor * x, small), large) < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("size", [4.0**-6, 1.0, 4.0**6])
@pytest.mark.parametrize("make", [OneSided, Central])
def test_the_default_sigma_is_seen_in_every_dtype_and_size(make, dtype, size):
    """A frame of directions: the gradient to √ε, for parameters of 1e-4 to 1e4.

    σ = 1e-4 would be lost in bfloat16, and beside float32 parameters of 1e4.
    """
    rule = WeightPerturbation(
        num_samples=3, difference=make(), noise=perturb.noise.coordinate
    )
    f = lambda p: jnp.sum(jnp.sin(p.astype(float) / size))
    p = (size * jnp.array([1.0, 1.3, 1.7])).astype(dtype)
    grads = perturb.value_and_grad(f, rule)(jax.random.key(0), p)[1].astype(float)
    exact = jnp.cos(p.astype(float) / size)
    eps = float(jnp.finfo(dtype).eps)
    # The quotient is wrong by curvature σ/2 · √3, and by the last place of p + σ v.
    assert jnp.max(jnp.abs(grads * size - exact)) < 4 * eps**0.5


@pytest.mark.parametrize("make", [OneSided, Central])
def test_a_sigma_that_is_lost_is_told(make):
    """Below the last place of what it is added to: NaN, not a gradient of zero."""
    rule = WeightPerturbation(difference=make(sigma=1e-4))
    f = perturb.value_and_grad(lambda p: jnp.sum(p.astype(float)), rule)
    for p in (jnp.ones(2, jnp.bfloat16), jnp.full(2, 1e4, jnp.float32)):
        assert jnp.isnan(f(jax.random.key(0), p)[1].astype(float)).all()
    assert jnp.isfinite(f(jax.random.key(0), jnp.ones(2, jnp.float32))[1]).all()


@pytest.mark.parametrize("make", [OneSided, Central])
def test_other_units_of_the_parameters_scale_the_estimate(make):
    """Parameters in units of 4ᵏ, the loss adjusted: the same bits, scaled."""
    rule = WeightPerturbation(num_samples=5, difference=make())

    def grads(unit):
        loss = lambda p: jnp.sum(jnp.sin(p["x"] / unit)) ** 2
        p = {"x": unit * jnp.array([0.3, -1.2, 2.0])}
        return perturb.value_and_grad(loss, rule)(jax.random.key(0), p)[1]["x"] * unit

    for k in (-30, 7, 30):
        assert jnp.array_equal(grads(4.0**k), grads(1.0))
