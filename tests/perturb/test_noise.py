"""Directions: unit covariance, numbered samples."""

import chex
import jax
import jax.numpy as jnp
import pytest

from rbpjax import perturb

FRAMES = [perturb.noise.orthonormal, perturb.noise.coordinate]
ALL = [perturb.noise.normal, perturb.noise.rademacher, perturb.noise.sphere, *FRAMES]


def drawn(noise, key, indices, size):
    draw = jax.jit(lambda key, indices: noise(key, indices, size, jnp.float64))
    return draw(key, indices)


@pytest.mark.parametrize("noise", FRAMES)
def test_frames_are_orthogonal(noise):
    """A whole frame has the covariance 1 without chance."""
    v = drawn(noise, jax.random.key(4), jnp.arange(6), 6)
    chex.assert_trees_all_close(v.T @ v / 6, jnp.eye(6), atol=1e-12)


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
