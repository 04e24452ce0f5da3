"""Seeded perturbation: the same estimate, unbiased at any rank, without the copies."""

import chex
import jax
import jax.numpy as jnp
import pytest

from rbpjax import perturb
from rbpjax.perturb import SeededPerturbation, WeightPerturbation
from rbpjax.perturb.difference import Central, Exact, OneSided
from rbpjax.perturb.seeded import direction
from tests.support.perturb import TIGHT, distance, rows_of, signs
from tests.support.problems import rows

PARAMS = {
    "b": jnp.array([0.3, -1.0]),
    "w": jnp.array([[0.5, -0.2, 0.9], [1.1, 0.4, -0.7]]),
}
X = jnp.array([0.8, -0.6, 0.3])


def loss(params, x, scale=1.0):
    """Not quadratic, no two entries alike."""
    return scale * jnp.sum(
        jnp.tanh(params["w"] @ x + params["b"]) ** 2 * jnp.arange(2.0)
    )


def leaf_by_leaf(rule):
    """The noise of a ``WeightPerturbation`` with the directions of ``rule``."""

    def noise(key, indices, size, dtype):
        def one(index):
            leaves = jax.tree.leaves(PARAMS)
            drawn = [direction(rule, key, index, i, u) for i, u in enumerate(leaves)]
            return jnp.concatenate([d.astype(dtype).reshape(-1) for d in drawn])

        return jax.vmap(one)(indices)

    return noise


@pytest.mark.parametrize("rank", [None, 1, 2])
@pytest.mark.parametrize(
    "difference",
    rows(
        {"one-sided": OneSided(), "central": Central(sigma=0.1), "exact": Exact()},
        ["exact"],
    ),
)
def test_it_is_weight_perturbation_with_the_same_directions(rank, difference):
    """To rounding, which a difference of 1e-8 of the loss leaves eight digits of."""
    rule = SeededPerturbation(
        num_samples=5, rank=rank, difference=difference, scale=2.0
    )
    same = WeightPerturbation(
        num_samples=5, noise=leaf_by_leaf(rule), difference=difference, scale=2.0
    )
    key = jax.random.key(0)
    got, want = (
        jax.jit(perturb.value_and_grad(loss, r))(key, PARAMS, X, scale=3.0)
        for r in (rule, same)
    )
    close = 1e-6 if isinstance(difference, OneSided) else 1e-12
    chex.assert_trees_all_close(got, want, rtol=close, atol=close)
    step = jax.jit(perturb.seeded_descent(loss, rule))
    value, after = step(key, PARAMS, 0.1, X, scale=3.0)
    assert value == got[0]
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, got[1])
    chex.assert_trees_all_close(after, moved, rtol=1e-9, atol=1e-9)


def enumerated(rank, size):
    """A noise that goes through all signs of a matrix's factors, a sample each."""
    every = signs(size)

    def noise(key, indices, size, dtype):
        return every[indices][:, :size].astype(dtype)

    return noise, len(every)


@pytest.mark.parametrize(("rank", "size"), [(None, 6), (1, 5), (2, 10)])
def test_any_rank_is_unbiased(rank, size):
    """Over all signs of a 2 × 3 matrix's factors; rank 1 has the variance of signs."""
    w = {"w": PARAMS["w"]}
    noise, count = enumerated(rank, size)
    f = lambda p: loss(p | {"b": PARAMS["b"]}, X)
    exact = jax.grad(f)(w)
    rule = SeededPerturbation(
        num_samples=count, rank=rank, noise=noise, difference=Exact()
    )
    got = perturb.value_and_grad(f, rule)(jax.random.key(0), w)[1]
    assert distance(got, exact) < TIGHT

    def one(i):
        here = lambda key, indices, size, dtype: noise(key, indices + i, size, dtype)
        rule = SeededPerturbation(rank=rank, noise=here, difference=Exact())
        return perturb.value_and_grad(f, rule)(jax.random.key(0), w)[1]

    made = rows_of(jax.vmap(one)(jnp.arange(count, dtype=jnp.uint32)))
    g = rows_of(jax.tree.map(lambda x: x[None], exact))
    spread = jnp.sum((made - g) ** 2) / count / jnp.sum(g**2)
    if rank == 2:
        assert spread > 5 + 1e-3
    else:
        assert abs(spread - 5) < TIGHT


def test_leaves_and_samples_differ_and_shapes_are_kept():
    """No two leaves of one shape alike; three axes, half precision, aux."""
    params = {
        "a": jnp.ones((4, 5), jnp.float32),
        "b": jnp.ones((4, 5), jnp.float32),
        "c": jnp.ones((2, 3, 4), jnp.bfloat16),
        "d": jnp.ones((), jnp.float32),
    }
    f = lambda p: (sum(jnp.sum(u.astype(jnp.float32)) for u in p.values()), p["d"])
    rule = SeededPerturbation(num_samples=2, rank=1, difference=Exact())
    f = perturb.value_and_grad(f, rule, has_aux=True)
    (value, aux), grads = jax.jit(f)(jax.random.key(0), params)
    assert value == 65 and aux == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    assert not jnp.array_equal(grads["a"], grads["b"])
    key, like, rank2 = jax.random.key(0), params["a"], SeededPerturbation(rank=2)
    v = [direction(rank2, key, jnp.uint32(i), 0, like) for i in range(2)]
    assert not jnp.array_equal(*v)
    assert all(jnp.linalg.matrix_rank(u.astype(jnp.float32)) <= 2 for u in v)


def test_under_vmap_and_scan():
    """Keys in a batch, and steps in a loop: as one by one; NaN stays in its row."""
    rule = SeededPerturbation(num_samples=3, rank=1)
    f = perturb.value_and_grad(loss, rule)
    keys = jax.random.split(jax.random.key(1), 3)
    xs = jnp.stack([X, jnp.nan * X, 2 * X])
    grads = jax.jit(jax.vmap(f, (0, None, 0)))(keys, PARAMS, xs)[1]
    for i in (0, 2):
        one = jax.jit(f)(keys[i], PARAMS, xs[i])[1]
        chex.assert_trees_all_close(
            jax.tree.map(lambda g, i=i: g[i], grads), one, rtol=1e-6, atol=1e-6
        )
    assert jnp.isnan(grads["w"][1]).all()
    step = perturb.seeded_descent(loss, rule)
    body = lambda p, key: step(key, p, 0.05, X)[::-1]
    losses = jax.lax.scan(body, PARAMS, jax.random.split(jax.random.key(2), 100))[1]
    assert losses[-1] < 0.5 * losses[0]


def test_memory_is_that_of_one_perturbed_copy():
    """Eight matrices: one copy and a leaf, whatever the number of samples."""
    layers, units = 8, 64
    params = [jnp.zeros((units, units), jnp.float32) for _ in range(layers)]
    total, leaf = layers * units**2 * 4, units**2 * 4

    def deep(params, x):
        for w in params:
            x = jnp.tanh(w @ x)
        return jnp.sum(x)

    def temporary(f, *between, **options):
        arguments = jax.random.key(0), params, *between, jnp.ones(units, jnp.float32)
        lowered = jax.jit(f, **options).lower(*arguments)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    signs, normal = perturb.noise.rademacher, perturb.noise.normal
    make = lambda rule, **k: temporary(perturb.value_and_grad(deep, rule(**k)))
    few, many = (
        make(SeededPerturbation, num_samples=k, noise=signs) for k in (4, 1000)
    )
    # A slope and a number a sample, held twice at most; no parameter has 8 bytes.
    assert many - few <= 16 * 1000
    assert few < total + leaf
    # Normal noise goes through several buffers: of a leaf or two, not of all of them.
    full = make(SeededPerturbation, num_samples=4, noise=normal)
    assert full < 0.5 * make(WeightPerturbation, num_samples=4, noise=normal, chunk=1)
    thin = SeededPerturbation(num_samples=4, rank=1, noise=normal)
    step = perturb.seeded_descent(deep, thin)
    assert temporary(step, 0.1, donate_argnums=1) < total + leaf


def test_what_does_not_fit_is_named():
    """Fields, rules of another kind, losses."""
    with pytest.raises(ValueError, match="`rank` must be"):
        SeededPerturbation(rank=0)
    with pytest.raises(ValueError, match="must be a SeededPerturbation"):
        perturb.seeded_descent(loss, WeightPerturbation())
    with pytest.raises(ValueError, match="WeightPerturbation or a SeededPerturbation"):
        perturb.value_and_grad(loss, perturb.NodePerturbation())
    step = perturb.seeded_descent(lambda p: p, SeededPerturbation())
    with pytest.raises(ValueError, match="must return a scalar"):
        step(jax.random.key(0), jnp.ones(2), 0.1)
    with pytest.raises(ValueError, match="`key` must be one PRNG key"):
        step(0, jnp.ones(2), 0.1)
