"""Weight perturbation: what it estimates, by enumeration, and with which variance."""

import chex
import jax
import jax.numpy as jnp
import pytest

from rbpjax import perturb
from rbpjax.perturb import WeightPerturbation
from rbpjax.perturb.difference import Central, Exact
from tests.support.perturb import (
    COUNT,
    TIGHT,
    check_unbiased,
    check_variance,
    dense,
    distance,
    estimate,
    estimates,
    flat,
    gradient,
    losses,
    rows_of,
    signs,
    silent,
    table,
    variance,
)


def test_weight_perturbation_by_enumeration():
    """Over all 256 signs: mean exact, total variance (d - 1) ‖g‖² exactly."""
    net = dense()
    each = lambda i: estimate(
        net,
        WeightPerturbation(difference=Exact(), noise=table(jnp.roll(signs(8), -i, 0))),
    )
    got = rows_of(jax.vmap(each)(jnp.arange(256)))
    g = flat(gradient(net))
    assert distance(got.mean(0), g) < TIGHT
    variance = jnp.sum((got - g[None]) ** 2) / 256
    assert abs(variance / jnp.sum(g**2) - 7) < TIGHT


def test_fresh_weight_noise_by_enumeration():
    """Redrawn every step, two weights and three steps: credit decides the estimand."""
    cell = lambda w, x, h, n: (
        jnp.tanh(w[0] * h + w[1] * x + n),
        h * w[0] + x,  # a readout that w reaches past the state
        jnp.tanh(w[0] * h + w[1] * x + n) * 0 + n,
    )
    net = dense()._replace(
        cell=cell,
        loss=lambda out, y: (out - y[0]) ** 2,
        params=jnp.array([0.7, -1.2]),
        h0=jnp.array(0.3),
        inputs=jnp.array([1.0, -0.5, 2.0]),
    )
    all_signs = signs(6).reshape(64, 3, 2)
    # The library folds the step into the key: find out which one it is at.
    key = jax.random.key(0)
    folded = jax.vmap(lambda t: jax.random.key_data(jax.random.fold_in(key, t)))(
        jnp.arange(3)
    )

    def noise(k, indices, size, dtype):
        step = jnp.argmax(jnp.all(folded == jax.random.key_data(k)[None], axis=1))
        return all_signs[indices, step]

    def mean(credit):
        rule = WeightPerturbation(
            num_samples=64,
            difference=Exact(),
            noise=noise,
            every_step=True,
            credit=credit,
        )
        return estimate(net, rule, key)

    assert distance(mean(perturb.credit.causal), gradient(net)) < TIGHT
    assert distance(mean(perturb.credit.total), gradient(net)) < TIGHT
    assert distance(mean(perturb.credit.instant), gradient(net, truncated=True)) < TIGHT
    assert distance(gradient(net, truncated=True), gradient(net)) > 0.1


@pytest.mark.parametrize(
    ("noise", "extra"),
    [
        pytest.param(perturb.noise.normal, 1, marks=pytest.mark.full),
        (perturb.noise.rademacher, -1),
        pytest.param(perturb.noise.sphere, -1, marks=pytest.mark.full),
    ],
)
def test_variance_of_weight_perturbation(noise, extra):
    """One sample: (d ± 1) ‖g‖²; four samples: a quarter of it."""
    g = jnp.linspace(-1.0, 2.0, 20)
    for k in (1, 4):
        rule = WeightPerturbation(num_samples=k, difference=Exact(), noise=noise)
        f = perturb.value_and_grad(lambda p: g @ p, rule)
        keys = jax.random.split(jax.random.key(1), COUNT // 2)
        samples = jax.jit(jax.vmap(f, (0, None)))(keys, 0 * g)[1]
        check_variance(samples, g, (20 + extra) * jnp.sum(g**2) / k)
        check_unbiased(samples, g)
        if noise is perturb.noise.normal:  # how well K samples point the right way
            cosine = jnp.mean((samples @ g) ** 2) / (
                jnp.sum(g**2) * jnp.mean(jnp.sum(samples**2, 1))
            )
            assert abs(cosine * (k + 20 + 1) / (k + 2) - 1) < 0.05


@pytest.mark.full
def test_fresh_weight_noise_is_unbiased_and_dearer():
    """Redrawn at every step: still BPTT, with more variance than one draw."""
    net = dense(examples=2)
    once, fresh = (
        estimates(
            net,
            WeightPerturbation(
                difference=Exact(), every_step=every, credit=perturb.credit.total
            ),
            COUNT // 2,
        )
        for every in (False, True)
    )
    for samples in (once, fresh):
        check_unbiased(samples, gradient(net))
    assert variance(fresh, gradient(net))[0] > 1.5 * variance(once, gradient(net))[0]


def test_weight_rule_is_one_in_both_functions():
    """A weight rule on a cell is the same rule on the total loss."""
    net = dense(examples=4)
    rule = WeightPerturbation(num_samples=6, chunk=3, difference=Central(sigma=1e-3))
    total = lambda p: jnp.sum(losses(net, p, silent(net)))
    want = perturb.value_and_grad(total, rule)(jax.random.key(0), net.params)
    f = perturb.recurrent_value_and_grad(net.cell, net.loss, rule)
    # 1e-3 of the loss is differenced: 13 digits of 16 are left, at best.
    chex.assert_trees_all_close(f(jax.random.key(0), *net.data), want, rtol=1e-10)


def test_structures_are_kept():
    """Tuples, nested dictionaries, aux, extra arguments and mixed dtypes come back."""
    params = (jnp.ones(3), {"b": jnp.ones((2, 2), jnp.float32), "c": jnp.array(2.0)})

    def loss(params, x, scale=1.0):
        a, rest = params
        value = jnp.sum(a**2) * x + jnp.sum(rest["b"]).astype(a.dtype) + rest["c"] ** 3
        return scale * value, {"x": x}

    rule = WeightPerturbation(
        num_samples=8, difference=Exact(), noise=perturb.noise.orthonormal
    )
    f = perturb.value_and_grad(loss, rule, has_aux=True)
    (value, aux), grads = jax.jit(f)(jax.random.key(0), params, 3.0, scale=2.0)
    want, exact = jax.value_and_grad(loss, has_aux=True)(params, 3.0, scale=2.0)
    chex.assert_trees_all_close((value, aux), want)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, exact)
    chex.assert_trees_all_close(grads, exact, rtol=1e-5)  # float32 has a leaf in it
