"""Evolution strategies in windows: their means, by enumeration and quadrature."""

import itertools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import online, perturb
from tests.support.perturb import TIGHT, distance, signs
from tests.support.problems import rows

NAMES = {"pes": perturb.pes, "nres": perturb.nres, "truncated_es": perturb.truncated_es}
METHODS = list(NAMES.values())
# Where the method hardly matters: one by default, the others in the long form.
each_method = pytest.mark.parametrize("method", rows(NAMES, ["pes"]))
MATRIX = jnp.array([[0.6, -0.3], [0.5, 0.2]])


class Unroll(NamedTuple):
    """A step, its loss, and windows of it."""

    f: object
    loss: object
    params: object
    h0: object
    xs: object
    ys: object

    @property
    def windows(self):
        """How many."""
        return len(self.xs)


def quadratic(windows=3, length=2):
    """Linear in the parameters, a loss that is quadratic in the state: two lines."""
    f = lambda p, x, h: MATRIX @ h + p * x
    loss = lambda p, h, y: jnp.sum((h - y) ** 2 * jnp.array([1.0, 2.0])) + p[0] * h[1]
    xs = 1 + 0.3 * jnp.arange(windows * length * 1.0).reshape(windows, length)
    params, h0 = jnp.array([0.7, -0.4]), jnp.array([0.2, 0.5])
    return Unroll(f, loss, params, h0, xs, 0.4 * xs)


def polynomial():
    """h ← θ h + x, loss h²: two windows of two steps, degree 4 in each window's θ."""
    f = lambda a, x, h: a * h + x
    xs = jnp.array([[1.0, -0.5], [0.8, 0.3]])
    return Unroll(f, lambda a, h, y: h**2, jnp.array(0.7), jnp.array(0.5), xs, xs)


def run(unroll, thetas):
    """The loss of the last window, each window with parameters of its own."""
    h, total = unroll.h0, 0.0
    for theta, xs, ys in zip(thetas, unroll.xs, unroll.ys, strict=True):
        total = 0.0
        for x, y in zip(xs, ys, strict=True):
            h = unroll.f(theta, x, h)
            total = total + unroll.loss(theta, h, y)
    return total


def part(unroll, windows):
    """The first windows."""
    return unroll._replace(xs=unroll.xs[:windows], ys=unroll.ys[:windows])


def gradient(unroll):
    """Of the last window's loss through all windows, in a plain loop."""
    return jax.grad(lambda p: run(unroll, [p] * unroll.windows))(unroll.params)


def truncated(unroll):
    """The same through the last window alone."""
    fixed = [unroll.params] * (unroll.windows - 1)
    return jax.grad(lambda p: run(unroll, [*fixed, p]))(unroll.params)


def estimates(method, unroll, noises, **options):
    """The gradients of all windows, ``[patterns, windows, …]``, one sample each."""
    est = method(unroll.f, unroll.loss, **options)

    def one(noise):
        carry = est.init(unroll.params, unroll.h0)
        step = lambda carry, data: est.step(unroll.params, carry, *data)
        data = (unroll.xs, unroll.ys, noise[:, None])
        return jax.lax.scan(step, carry, data)[1].grads

    return jax.jit(jax.vmap(one))(noises)


def all_signs(unroll):
    """Every sign of every parameter in every window."""
    size = unroll.params.size
    every = signs(unroll.windows * size)
    return every.reshape(-1, unroll.windows, size)


@pytest.mark.parametrize("sigma", [1e-3, 2.0])
def test_pes_and_nres_are_unbiased_and_truncated_es_is_not(sigma):
    """Over all 64 signs, at any σ, in every window: against ``jax.grad``."""
    unroll = quadratic()
    means = {
        m: estimates(m, unroll, all_signs(unroll), sigma=sigma).mean(0) for m in METHODS
    }
    for t in (1, 2, 3):
        exact, short = gradient(part(unroll, t)), truncated(part(unroll, t))
        # A difference of 1e-3 of the loss has 13 digits.
        close = TIGHT / min(sigma, 1)
        assert distance(means[perturb.pes][t - 1], exact) < close
        assert distance(means[perturb.nres][t - 1], exact) < close
        assert distance(means[perturb.truncated_es][t - 1], short) < close
        assert t == 1 or distance(short, exact) > 0.1


def test_the_variance_is_that_of_the_docstrings():
    """A loss that is linear: both formulas, over all signs, and NRES is below PES."""
    unroll = quadratic()._replace(
        loss=lambda p, h, y: h @ jnp.array([1.0, -2.0]) * y, h0=jnp.zeros(2)
    )
    parts = jax.grad(lambda ps: run(unroll, ps))([unroll.params] * 3)
    g, squares = sum(parts), sum(jnp.sum(p**2) for p in parts)
    d, t, both = 2, 3, {}
    for method in METHODS[:2]:
        got = estimates(method, unroll, all_signs(unroll), sigma=0.5)[:, -1]
        both[method] = jnp.mean(jnp.sum((got - g[None]) ** 2, 1))
    pes, nres = both[perturb.pes], both[perturb.nres]
    assert abs(pes / ((t * d - 2) * squares + g @ g) - 1) < TIGHT
    assert abs(nres / ((d - 1) * g @ g) - 1) < TIGHT
    assert nres < pes


def test_normal_noise_gives_the_gradient_of_the_smoothed_loss():
    """At σ = 0.5, by quadrature: smoothed a window (PES), and as a whole (NRES)."""
    unroll, sigma = polynomial(), 0.5
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)  # exact to degree 11
    weights = jnp.asarray(weights / weights.sum())
    grid = jnp.asarray(list(itertools.product(nodes, nodes)))[..., None]
    both = (weights[:, None] * weights[None]).reshape(-1)
    mean = lambda method: jnp.tensordot(
        both, estimates(method, unroll, grid, sigma=sigma)[:, -1], 1
    )

    def by_window(theta):
        moved = theta + sigma * grid[..., 0]
        return both @ jax.vmap(lambda pair: run(unroll, list(pair)))(moved)

    def as_whole(theta):
        moved = theta + sigma * jnp.asarray(nodes)
        return weights @ jax.vmap(lambda p: run(unroll, [p, p]))(moved)

    pes, nres = jax.grad(by_window)(0.7), jax.grad(as_whole)(0.7)
    assert distance(mean(perturb.pes), pes) < TIGHT
    assert distance(mean(perturb.nres), nres) < TIGHT
    assert abs(pes / nres - 1) > 1e-2  # so that the test tells one from the other


@pytest.mark.parametrize("method", METHODS)
def test_samples_are_averaged_and_a_scan_is_a_loop(method):
    """Five samples: the mean of one each; under scan and jit as by hand."""
    unroll, k = quadratic(), 5
    est = method(unroll.f, unroll.loss, num_samples=k, sigma=0.1)
    carry = est.init(unroll.params, unroll.h0)
    keys = jax.random.split(jax.random.key(3), unroll.windows)
    noise = jax.vmap(est.noise, (0, None))(keys, carry)
    assert noise.shape == (unroll.windows, k, 2)
    step = jax.jit(lambda carry, data: est.step(unroll.params, carry, *data))
    data = (unroll.xs, unroll.ys, noise)
    last, out = jax.lax.scan(step, carry, data)
    each = estimates(method, unroll, noise.swapaxes(0, 1), sigma=0.1)
    chex.assert_trees_all_close(out.grads, each.mean(0), rtol=1e-10)
    for t in range(unroll.windows):
        carry, made = step(carry, jax.tree.map(lambda a, t=t: a[t], data))
        chex.assert_trees_all_close(made.grads, out.grads[t], rtol=1e-10)
        chex.assert_trees_all_close(made.loss, out.loss[t], rtol=1e-12)
    chex.assert_trees_all_close(carry, last, rtol=1e-12)


@each_method
def test_sequences_are_a_vmap_and_do_not_reach_each_other(method):
    """Two sequences, one of them not finite: the other is as it is alone."""
    unroll = quadratic()
    est = method(unroll.f, unroll.loss, num_samples=3)
    h0 = jnp.stack([unroll.h0, jnp.array([jnp.nan, 0.0])])
    carry = jax.vmap(est.init, (None, 0))(unroll.params, h0)
    noise = est.noise(jax.random.key(0), est.init(unroll.params, unroll.h0))
    many = jax.jit(jax.vmap(est.step, (None, 0, None, None, None)))
    one_step = jax.jit(est.step)
    alone = est.init(unroll.params, unroll.h0)
    for t in range(unroll.windows):
        data = unroll.xs[t], unroll.ys[t], noise
        carry, out = many(unroll.params, carry, *data)
        alone, one = one_step(unroll.params, alone, *data)
        assert not bool(jnp.isfinite(out.grads[1]).any())
        assert distance(out.grads[0], one.grads) < 1e-9  # of a difference of 1e-6
    # A new sequence begins as if nothing had been.
    fresh = jax.vmap(est.init, (None, 0))(unroll.params, h0[::-1])
    again = online.combine.reset(carry, fresh, jnp.array([False, True]))
    took = jax.tree.map(lambda a: a[1], (again, fresh))
    chex.assert_trees_all_equal(*took)
    kept = jax.tree.map(lambda a: a[0], (again, carry))
    chex.assert_trees_all_equal(*kept)


@each_method
def test_other_units_and_dtypes(method):
    """Parameters in units of 4ᵏ: the same bits, scaled; trees keep their dtypes."""

    def grads(unit):
        f = lambda p, x, h: jnp.tanh(p["a"] / unit * h + x)
        est = method(f, lambda p, h, y: jnp.sum(h**2) * y, num_samples=4)
        params = {"a": unit * jnp.array([0.3, -1.2, 2.0])}
        carry, xs = est.init(params, jnp.ones(3)), jnp.ones((4, 2))
        step = jax.jit(est.step)
        for key in jax.random.split(jax.random.key(0), 3):
            noise = est.noise(key, carry)
            carry, out = step(params, carry, xs[:, :1], xs[:, 1], noise)
        return unit * out.grads["a"]

    plain = grads(1.0)
    for k in (-30, 7):
        assert jnp.array_equal(grads(4.0**k), plain)

    def f(p, x, h):
        half = (p["half"].astype(jnp.float32) * h["h"]).sum() + p["b"]
        return {"h": jnp.tanh(h["h"] + half), "steps": h["steps"] + 1}

    params = {"half": jnp.ones(3, jnp.bfloat16), "b": jnp.zeros((), jnp.float32)}
    h0 = {"h": 0.1 * jnp.ones(3, jnp.float32), "steps": jnp.zeros((), jnp.int32)}
    est = method(f, lambda p, h, y: jnp.sum(h["h"]), num_samples=2)
    carry = est.init(params, h0)
    noise = est.noise(jax.random.key(0), carry)
    after, out = jax.jit(est.step)(params, carry, jnp.zeros(4), None, noise)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, carry)
    chex.assert_trees_all_equal_shapes_and_dtypes(out.grads, params)
    assert jnp.max(after.ahead["steps"]) == 4 and jnp.isfinite(out.grads["b"])


@each_method
def test_what_does_not_fit_is_named(method):
    """Options, carries, noise, windows, functions."""
    unroll = quadratic()
    make = lambda **k: method(unroll.f, unroll.loss, **k)
    with pytest.raises(ValueError, match="`num_samples` must be a Python int"):
        make(num_samples=0)
    with pytest.raises(ValueError, match="`sigma` must be a Python number"):
        make(sigma=0.0)
    with pytest.raises(ValueError, match="`noise` must be a callable"):
        make(noise="normal")
    est, params = make(num_samples=2), unroll.params
    carry = est.init(params, unroll.h0)
    noise, data = est.noise(jax.random.key(0), carry), (unroll.xs[0], unroll.ys[0])
    with pytest.raises(ValueError, match="`key` must be one PRNG key"):
        est.noise(0, carry)
    with pytest.raises(ValueError, match="int"):
        est.init(jnp.arange(2), unroll.h0)
    with pytest.raises(ValueError, match="`carry` must be the EvolutionCarry"):
        est.step(params, unroll.h0, *data, noise)
    other = make(num_samples=3).init(params, unroll.h0)
    with pytest.raises(ValueError, match="`carry` must have the structure"):
        est.step(params, other, *data, noise)
    with pytest.raises(ValueError, match=r"`noise` must have the shape.*\(2, 2\)"):
        est.step(params, carry, *data, noise[:1])
    with pytest.raises(ValueError, match="`inputs` and `targets` must be sequences"):
        est.step(params, carry, data[0][:1], data[1], noise)
    vector = method(unroll.f, lambda p, h, y: h)
    with pytest.raises(ValueError, match="must return a floating-point scalar"):
        vector.step(params, vector.init(params, unroll.h0), *data, noise[:1])
    pair = method(lambda p, x, h: (h, h), unroll.loss)
    with pytest.raises(ValueError, match="`f`'s output must have"):
        pair.step(params, pair.init(params, unroll.h0), *data, noise[:1])


def test_a_sigma_that_is_lost_is_told():
    """Below the last place of the parameters: NaN, not a gradient of zero."""
    unroll = quadratic()
    est = perturb.pes(unroll.f, unroll.loss, sigma=1e-18)
    carry = est.init(unroll.params, unroll.h0)
    noise = est.noise(jax.random.key(0), carry)
    _, out = est.step(unroll.params, carry, unroll.xs[0], unroll.ys[0], noise)
    assert jnp.isnan(out.grads).all()
