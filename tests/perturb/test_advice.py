"""Advice: predicted angle, variance and step, against draws and quadrature."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import perturb
from rbpjax.perturb import SeededPerturbation, WeightPerturbation
from rbpjax.perturb.difference import Exact
from tests.support.perturb import TIGHT, check_variance, table

SIZE = 8
G = jnp.sin(jnp.arange(1.0, SIZE + 1) ** 2)  # no signs of it add up to zero


def draws(rule, count=60_000):
    """Many estimates of one gradient."""
    f = perturb.value_and_grad(lambda p: G @ p, rule)
    keys = jax.random.split(jax.random.key(1), count)
    return jax.jit(jax.vmap(f, (0, None)))(keys, 0 * G)[1]


# The noise, and by how much the mean square may be off beside chance: 0 where exact.
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize(
    ("noise", "off"),
    [
        (perturb.noise.normal, 0),
        (perturb.noise.orthonormal, 0),
        (perturb.noise.hadamard, 0),
        (perturb.noise.rademacher, 0.03),
        (perturb.noise.sphere, 0.03),
    ],
)
def test_the_angle_is_that_of_many_draws(noise, off, k):
    """The mean square of the cosine within five standard errors; and the variance."""
    rule = WeightPerturbation(num_samples=k, difference=Exact(), noise=noise)
    advice, rows = perturb.diagnose(G, rule), draws(rule)
    square = (rows @ G) ** 2 / (jnp.sum(rows**2, 1) * (G @ G))
    error = 5 * square.std() / len(rows) ** 0.5
    assert error < 0.05 * advice.cosine**2
    assert abs(square.mean() - advice.cosine**2) < error + (off if k > 1 else 0)
    check_variance(rows, G, advice.variance * G @ G)


def test_as_many_samples_as_it_says():
    """The number that is asked for reaches the cosine, and one less does not."""
    for noise in (perturb.noise.rademacher, perturb.noise.orthonormal):
        ask = lambda k, c, n=noise: perturb.diagnose(
            G, WeightPerturbation(num_samples=k, noise=n), cosine=c
        )
        for cosine in (0.3, 0.5**0.5, 0.9):
            needed = ask(1, cosine).samples_needed
            assert ask(needed, cosine).cosine >= cosine - TIGHT
            assert needed == 1 or ask(needed - 1, cosine).cosine < cosine
    whole = ask(SIZE, 0.9)
    assert whole.cosine == 1 and whole.variance == 0 and abs(whole.step - 1) < TIGHT


def test_the_step_is_the_largest_stable_one():
    """By quadrature of one normal direction: at the step itself nothing is gained.

    The worst gradient is that along the largest curvature.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)  # exact to degree 5
    weights = weights / weights.sum()
    grid = jnp.asarray(list(itertools.product(nodes, repeat=3)))
    both = jnp.asarray([np.prod(w) for w in itertools.product(weights, repeat=3)])
    curvature = jnp.array([2.0, 0.7, 0.3])
    loss = lambda p: jnp.sum(curvature * p**2) / 2
    rule = WeightPerturbation(noise=perturb.noise.normal, difference=Exact())
    rank = float(curvature.sum() / 2.0)
    step = perturb.diagnose(curvature, rule, effective_rank=rank).step

    def gain(p, part):
        def after(v):
            here = WeightPerturbation(noise=table(v[None]), difference=Exact())
            grads = perturb.value_and_grad(loss, here)(jax.random.key(0), p)[1]
            return loss(p - part * step * 2 / 2.0 * grads)

        return both @ jax.vmap(after)(grid) - loss(p)

    worst = jnp.array([1.0, 0.0, 0.0])
    assert abs(gain(worst, 1.0)) < TIGHT
    assert gain(worst, 0.9) < 0 < gain(worst, 1.1)
    assert gain(jnp.array([0.3, -1.0, 2.0]), 1.0) < 0
    # Half of it is the fastest.
    assert gain(worst, 0.5) < min(gain(worst, 0.4), gain(worst, 0.6))
    assert perturb.diagnose(curvature, rule).step < step  # stable for any Hessian


def test_orthogonal_steps():
    """E ĝᵀHĝ over many frames, three of eight directions: the formula's."""
    rule = WeightPerturbation(
        num_samples=3, noise=perturb.noise.orthonormal, difference=Exact()
    )
    curvature = jnp.linspace(2.0, 0.1, SIZE)
    rank = float(curvature.sum() / 2.0)
    f = perturb.value_and_grad(lambda p: 1.5 * p[0], rule)
    keys = jax.random.split(jax.random.key(1), 20_000)
    rows = jax.jit(jax.vmap(f, (0, None)))(keys, 0 * G)[1]
    square = rows**2 @ curvature / (2.0 * 1.5**2)
    error = 5 * square.std() / len(rows) ** 0.5
    step = perturb.diagnose(G, rule, effective_rank=rank).step
    assert error < 0.03 / step and abs(square.mean() - 1 / step) < error


def test_words_and_relatives():
    """It prints in words; pairs count once; seeded rules are of independent samples."""
    params = {"w": jax.ShapeDtypeStruct((30, 30), jnp.float32), "b": jnp.zeros(100)}
    advice = perturb.diagnose(params, WeightPerturbation(num_samples=100))
    for words in ("1,000 parameters", "cosine of 0.302 (72°)", "takes 333 of them"):
        assert words in str(advice) == repr(advice)
    both = perturb.noise.Antithetic()
    pairs = perturb.diagnose(params, WeightPerturbation(num_samples=200, noise=both))
    assert pairs == advice
    seeded = perturb.diagnose(params, SeededPerturbation(num_samples=100))
    assert seeded == advice
    leaves = SeededPerturbation(num_samples=100, noise=perturb.noise.orthonormal)
    assert not perturb.diagnose(params, leaves).orthogonal


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((G, perturb.NodePerturbation()), {}, "`rule` must be a WeightPerturbation"),
        ((G, WeightPerturbation(every_step=True)), {}, "draws once a sequence"),
        (((), WeightPerturbation()), {}, "`params` must have entries"),
        (
            (G, WeightPerturbation()),
            {"cosine": 1.0},
            r"`cosine` must be .* in \(0, 1\)",
        ),
        ((G, WeightPerturbation()), {"effective_rank": 9}, r"must be in \[1, 8\]"),
    ],
)
def test_what_does_not_fit_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        perturb.diagnose(*arguments, **options)
