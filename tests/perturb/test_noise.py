"""Directions: unit covariance, numbered samples."""

import chex
import jax
import jax.numpy as jnp
import pytest

from rbpjax import perturb
from rbpjax.perturb import WeightPerturbation
from rbpjax.perturb.difference import Central, Exact, OneSided
from tests.support.perturb import (
    COUNT,
    TIGHT,
    check_unbiased,
    check_variance,
    distance,
)

FRAMES = [perturb.noise.orthonormal, perturb.noise.coordinate]
BOTH = perturb.noise.Antithetic(noise=perturb.noise.normal)
ALL = [
    perturb.noise.normal,
    perturb.noise.rademacher,
    perturb.noise.sphere,
    perturb.noise.hadamard,
    BOTH,
    *FRAMES,
]


def drawn(noise, key, indices, size):
    draw = jax.jit(lambda key, indices: noise(key, indices, size, jnp.float64))
    return draw(key, indices)


@pytest.mark.parametrize("noise", FRAMES)
def test_frames_are_orthogonal(noise):
    """A whole frame has the covariance 1 without chance."""
    v = drawn(noise, jax.random.key(4), jnp.arange(6), 6)
    chex.assert_trees_all_close(v.T @ v / 6, jnp.eye(6), atol=1e-12)


@pytest.mark.parametrize("size", [1, 5, 8, 70])
def test_hadamard_signs_are_orthogonal_by_columns(size):
    """Over a power of two of samples the covariance is 1 without chance; each is signs.

    The next round has other signs, and is whole, too.
    """
    rows = 1 << (size - 1).bit_length()
    two = drawn(perturb.noise.hadamard, jax.random.key(4), jnp.arange(2 * rows), size)
    assert two.dtype == jnp.int8 and bool(jnp.all(abs(two) == 1))
    two = two.astype(float)
    for v in (two[:rows], two[rows:]):
        chex.assert_trees_all_equal(v.T @ v, rows * jnp.eye(size))
    if size == rows:
        chex.assert_trees_all_equal(two[:rows] @ two[:rows].T, rows * jnp.eye(size))
    assert size < 5 or not jnp.array_equal(two[:rows], two[rows:])


@pytest.mark.parametrize("noise", [*FRAMES, perturb.noise.hadamard])
def test_the_variance_of_orthogonal_directions(noise):
    """K ≤ d samples of a linear loss: (d / K - 1) ‖g‖²; none is left at K = d."""
    g = jnp.linspace(-1.0, 2.0, 8)
    for k in (1, 2, 8):
        rule = WeightPerturbation(num_samples=k, difference=Exact(), noise=noise)
        f = perturb.value_and_grad(lambda p: g @ p, rule)
        keys = jax.random.split(jax.random.key(1), COUNT if k < 8 else 10)
        samples = jax.jit(jax.vmap(f, (0, None)))(keys, 0 * g)[1]
        if k == 8:
            assert jnp.max(abs(samples - g[None])) < TIGHT
        else:
            check_variance(samples, g, (8 / k - 1) * g @ g)
            check_unbiased(samples, g)


def test_antithetic_one_sided_is_central():
    """Pairs of one-sided differences: the central ones, to the last curvature."""
    loss = lambda p: jnp.sum(jnp.exp(p) * jnp.arange(1.0, 4.0)) ** 2
    p, key = jnp.array([0.3, -0.5, 0.1]), jax.random.key(2)
    one, two = (
        perturb.value_and_grad(loss, WeightPerturbation(**fields))(key, p)[1]
        for fields in (
            dict(num_samples=6, difference=OneSided(sigma=0.3), noise=BOTH),
            dict(num_samples=3, difference=Central(sigma=0.3), noise=BOTH.noise),
        )
    )
    assert distance(one, two) < TIGHT
    alone = WeightPerturbation(
        num_samples=6, difference=OneSided(sigma=0.3), noise=BOTH.noise
    )
    assert distance(perturb.value_and_grad(loss, alone)(key, p)[1], two) > 0.01
    with pytest.raises(ValueError, match="`noise` must be a callable"):
        perturb.noise.Antithetic(noise=None)


FEW = [perturb.noise.rademacher, perturb.noise.normal, perturb.noise.orthonormal]


@pytest.mark.parametrize(
    "noise",
    [pytest.param(n, marks=() if n in FEW else pytest.mark.full) for n in ALL],
)
def test_noise_has_numbers(noise):
    """Key and number alone decide, and no two samples are the same."""
    key, six = jax.random.key(4), jnp.arange(6)
    v = drawn(noise, key, six, 70)
    chex.assert_trees_all_equal(drawn(noise, key, six[3:5], 70), v[3:5])
    assert not jnp.array_equal(drawn(noise, jax.random.key(5), six, 70), v)
    assert jnp.unique(v, axis=0).shape == v.shape


def test_signs_have_unit_covariance():
    """Signs are signs, uncorrelated also within a word of random bits."""
    rademacher = perturb.noise.rademacher
    v = drawn(rademacher, jax.random.key(4), jnp.arange(400), 70).astype(float)
    assert bool(jnp.all(jnp.abs(v) == 1))
    off = v.T @ v / 400 - jnp.eye(70)
    assert jnp.max(jnp.abs(off)) < 6 / 20  # six standard errors
    assert jnp.max(jnp.abs(v.mean(0))) < 6 / 20
