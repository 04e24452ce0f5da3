"""Averages, batches, resets, and the bound on the influence."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import online
from rbpjax.online import combine
from tests.support.online import (
    enumerate_runs,
    exact_run,
    mean,
    run,
    signs_like,
    step_gradients,
    vanilla,
    variance,
)

TIGHT = dict(rtol=1e-12, atol=1e-12)


def batch_of(*systems):
    """One system with the data of all, stacked along a batch axis."""
    first = systems[0]
    return first._replace(
        h0=np.stack([s.h0 for s in systems]),
        xs=np.stack([s.xs for s in systems], 1),
        ys=np.stack([s.ys for s in systems], 1),
    )


def test_mean_over_sequences_is_the_mean_gradient():
    """per_sequence and over_batch both give the gradient of the mean loss."""
    first, second = vanilla(), vanilla(seed=5)
    batch = batch_of(first, second)
    # One compiled oracle for both sequences, which share the first's parameters.
    apart = jax.jit(
        jax.vmap(
            lambda h0, xs, ys: step_gradients.__wrapped__(
                first._replace(h0=h0, xs=xs, ys=ys)
            ),
            (0, 1, 1),
        )
    )
    oracle = mean(apart(batch.h0, batch.xs, batch.ys))
    for est in (
        combine.per_sequence(online.rtrl(first.f, first.loss)),
        online.rtrl(*combine.over_batch(first.f, first.loss)),
    ):
        _, out = run(est, batch)
        chex.assert_trees_all_close(out.grads, oracle, **TIGHT)


def test_copies_divide_the_variance_exactly():
    """Two copies: the same mean, half the variance, over all 256 patterns."""
    system = vanilla(n=2, steps=2)
    one = online.uoro(system.f, system.loss)
    _, single = enumerate_runs(one, system)
    _, double = enumerate_runs(combine.average(one, 2), system)
    chex.assert_trees_all_close(mean(double.grads), mean(single.grads), **TIGHT)
    half = variance(single.grads) / 2
    chex.assert_trees_all_close(variance(double.grads), half, rtol=1e-12)


@pytest.mark.full
def test_error_falls_as_one_over_root_n():
    """The mean squared error of N copies is 1/N of that of one."""
    system = vanilla(n=3, steps=5)
    exact = step_gradients(system)

    def squared_error(copies, key):
        est = combine.average(online.uoro(system.f, system.loss), copies)
        carry = est.init(system.params, system.h0)
        keys = jax.random.split(key, 5)
        noise = jax.vmap(est.noise, (0, None))(keys, carry)
        gap = jax.tree.map(jnp.subtract, run(est, system, noise)[1].grads, exact)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(gap))

    keys = jax.random.split(jax.random.key(3), 400)
    errors = {
        n: jax.jit(jax.vmap(squared_error, (None, 0)), static_argnums=0)(n, keys)
        for n in (1, 16)
    }
    # Each mean is known to its standard error over 400 repeats.
    ratio = 16 * jnp.mean(errors[16]) / jnp.mean(errors[1])
    spread = sum(jnp.var(e) / jnp.mean(e) ** 2 / 400 for e in errors.values())
    assert abs(ratio - 1) < 5 * spread**0.5
    assert 5 * spread**0.5 < 0.5


@pytest.mark.parametrize("steps", [2, pytest.param(3, marks=pytest.mark.full)])
def test_shared_parameter_part_is_unbiased_but_noisier(steps):
    """Batch of two, all patterns: both means exact, shared w has more variance.

    256 patterns for two steps, 4096 for three.
    """
    system = vanilla(n=2, steps=steps)
    batch = batch_of(system, vanilla(n=2, steps=steps, seed=9))
    apart = combine.per_sequence(online.uoro(system.f, system.loss))
    shared = online.uoro(*combine.over_batch(system.f, system.loss))
    exact = combine.per_sequence(online.rtrl(system.f, system.loss))
    exact = run(exact, batch)[1].grads
    outs = [enumerate_runs(est, batch)[1].grads for est in (apart, shared)]
    for grads in outs:
        chex.assert_trees_all_close(mean(grads), exact, **TIGHT)
    assert variance(outs[1]) > 1.2 * variance(outs[0])


def test_reset_is_a_fresh_start():
    """After a reset the run equals a run that begins there, sequence by sequence."""
    system = vanilla(n=2, steps=6)
    est = online.uoro(system.f, system.loss)
    signs = signs_like(est, system, 6)

    @jax.jit
    def resetting(begins, xs, ys, signs):
        fresh = est.init(system.params, system.h0)

        def body(carry, xyn):
            x, y, noise, begins = xyn
            carry = combine.reset(carry, fresh, begins)
            carry, out = est.step(system.params, carry, x, y, noise)
            return carry, out

        return jax.lax.scan(body, fresh, (xs, ys, signs, begins))[1]

    out = resetting(np.arange(6) == 3, system.xs, system.ys, signs)
    # The same program from step 3 on, and padded behind: what a fresh run does.
    late = lambda x: np.concatenate([x[3:], x[:3]])
    anew = resetting(np.zeros(6, bool), late(system.xs), late(system.ys), late(signs))
    head = lambda tree, part: jax.tree.map(lambda x: x[part], tree)
    chex.assert_trees_all_equal(head(out, slice(3, 6)), head(anew, slice(3)))


def test_reset_selects_sequences():
    """A vector resets the sequences it names, in all leaves, and no other."""
    system = vanilla(n=2, steps=2)
    est = combine.per_sequence(online.uoro(system.f, system.loss))
    h0 = jnp.stack([system.h0, -system.h0])
    fresh = est.init(system.params, h0)
    rng = np.random.default_rng(0)
    carry = jax.tree.map(lambda x: rng.standard_normal(x.shape), fresh)
    got = combine.reset(carry, fresh, jnp.array([False, True]))
    for i, source in enumerate((carry, fresh)):
        row = lambda x, i=i: x[i]
        chex.assert_trees_all_equal(jax.tree.map(row, got), jax.tree.map(row, source))


def chaotic_weights():
    """16 units, gain 5: the leading Lyapunov exponent is 0.26 a step."""
    return 5 * jax.random.normal(jax.random.key(1), (16, 16), jnp.float32) / 4


def chaotic(make):
    """An estimator of a chaotic network without inputs, and its start."""
    est = make(lambda w, x, h: jnp.tanh(w @ h), lambda w, h, y: jnp.sum(h**2))
    return est, est.init(chaotic_weights(), jnp.full(16, 0.1, jnp.float32))


def bounded(make):
    return lambda f, loss: combine.renormalize(make(f, loss), 1e3)


@pytest.mark.parametrize(
    "make", [online.uoro, pytest.param(online.rtrl, marks=pytest.mark.full)]
)
def test_chaotic_network_needs_renormalization(make):
    """float32: the influence overflows without a bound, never with it."""

    def finite(make):
        est, start = chaotic(make)
        w = chaotic_weights()

        def step(state, _):
            carry, key = state
            key, signs = jax.random.split(key)
            noise = est.noise(signs, carry)
            carry, out = est.step(w, carry, None, None, noise)
            return (carry, key), jnp.all(jnp.isfinite(out.grads))

        start = start, jax.random.key(1)
        return jax.jit(lambda s: jax.lax.scan(step, s, length=2_000)[1])(start)

    assert not np.all(finite(make))
    assert np.all(finite(bounded(make)))


@pytest.mark.full
def test_a_million_steps_stay_finite():
    """UORO in float32, a chaotic network under renormalization, 10⁶ steps."""
    est, start = chaotic(bounded(online.uoro))
    w = chaotic_weights()

    def step(state, _):
        carry, key, fine = state
        key, signs = jax.random.split(key)
        carry, out = est.step(w, carry, None, None, est.noise(signs, carry))
        fine &= jnp.all(jnp.isfinite(out.grads))
        return (carry, key, fine), None

    scan = jax.jit(lambda s: jax.lax.scan(step, s, length=10**6)[0])
    carry, _, fine = scan((start, jax.random.key(1), jnp.array(True)))
    assert fine
    assert jnp.linalg.norm(carry.influence.w) > 1.0  # it has not died either


def test_renormalization_acts_beyond_the_bound_only():
    """Below the bound the run is untouched; above it the norm is the bound."""
    system = vanilla(n=3, steps=6)
    est = online.rtrl(system.f, system.loss)
    untouched = run(combine.renormalize(est, 1e6), system)
    chex.assert_trees_all_close(untouched, exact_run(system), **TIGHT)
    carries, _ = run(combine.renormalize(est, 0.5), system)
    square = sum(np.sum(x[-1] ** 2) for x in jax.tree.leaves(carries.influence))
    np.testing.assert_allclose(np.sqrt(square), 0.5, rtol=1e-12)


@pytest.mark.parametrize("bad", [0, 2.0, True, np.array(2)])
def test_counts_must_be_positive_ints(bad):
    """Copies: a Python int of at least one."""
    est = online.uoro(lambda p, x, h: h, lambda p, h, y: 0.0)
    with pytest.raises(ValueError, match="copies"):
        combine.average(est, bad)


@pytest.mark.parametrize("bad", [-1, 0, True, "1", np.array(2.0)])
def test_the_bound_must_be_positive(bad):
    """max_norm: a Python number above zero."""
    est = online.uoro(lambda p, x, h: h, lambda p, h, y: 0.0)
    with pytest.raises(ValueError, match="max_norm"):
        combine.renormalize(est, bad)
