"""Exact gradients: RTRL and BPTT against the unrolled loss."""

import chex
import jax
import jax.numpy as jnp
import pytest

from rbpjax import online
from tests.support.online import (
    gru,
    gru_after,
    leaky,
    lstm,
    mean,
    run,
    step_gradients,
    vanilla,
)

SYSTEMS = [vanilla, leaky, lstm, gru, gru_after]
# Identities in float64: some 10² roundings on numbers of order 1 to 10².
TIGHT = dict(rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", SYSTEMS)
def test_rtrl_is_the_unrolled_gradient_at_every_step(make):
    """δ G plus the direct part is the gradient of each loss, and so is the sum."""
    system = make()
    _, out = run(online.rtrl(system.f, system.loss), system)
    oracle = step_gradients(system)
    assert all(jnp.linalg.norm(leaf) > 0.1 for leaf in jax.tree.leaves(oracle))
    chex.assert_trees_all_close(out.grads, oracle, **TIGHT)
    total = jax.tree.map(lambda x: jnp.sum(x, 0), (out.grads, oracle))
    chex.assert_trees_all_close(*total, **TIGHT)


@pytest.mark.parametrize("make", SYSTEMS)
def test_bptt_is_the_unrolled_gradient(make):
    """One step over a sequence returns the summed loss, its gradient, the last h."""
    system = make()
    est = online.bptt(system.f, system.loss)
    carry = est.init(system.params, system.h0)
    carry, out = est.step(system.params, carry, system.xs, system.ys, ())
    carries, online_out = run(online.rtrl(system.f, system.loss), system)
    oracle = jax.tree.map(lambda x: jnp.sum(x, 0), step_gradients(system))
    chex.assert_trees_all_close(out.grads, oracle, **TIGHT)
    chex.assert_trees_all_close(out.loss, jnp.sum(online_out.loss), **TIGHT)
    last = jax.tree.map(lambda x: x[-1], carries.h)
    chex.assert_trees_all_close(carry.h, last, **TIGHT)


@pytest.mark.parametrize("truncation", [1, 3, 12])
def test_tbptt_cuts_the_history_at_windows(truncation):
    """Equal to the gradient with stop_gradient on the state every few steps."""
    system = vanilla(steps=12)

    def cut_loss(params):
        h, total = system.h0, 0.0
        for t in range(12):
            if t % truncation == 0:
                h = jax.lax.stop_gradient(h)
            h = system.f(params, system.xs[t], h)
            total += system.loss(params, h, system.ys[t])
        return total

    est = online.tbptt(system.f, system.loss, truncation=truncation)
    carry = est.init(system.params, system.h0)
    _, out = est.step(system.params, carry, system.xs, system.ys, ())
    value, oracle = jax.value_and_grad(cut_loss)(system.params)
    chex.assert_trees_all_close(out.grads, oracle, **TIGHT)
    chex.assert_trees_all_close(out.loss, value, **TIGHT)


def test_first_step_of_every_estimator_is_exact():
    """With no past, the gradient has no noise: the last step is exact."""
    system = vanilla(steps=1)
    oracle = step_gradients(system)
    for make in (online.uoro, online.nobacktrack, online.kf_rtrl, online.snap1):
        _, out = run(make(system.f, system.loss), system)
        chex.assert_trees_all_close(out.grads, oracle, **TIGHT)


def test_truncated_influence_is_not_the_gradient():
    """Negative control: forgetting the past at each step is visibly different."""
    system = vanilla()
    est = online.tbptt(system.f, system.loss, truncation=1)
    carry = est.init(system.params, system.h0)
    _, out = est.step(system.params, carry, system.xs, system.ys, ())
    exact = jax.tree.map(lambda x: jnp.sum(x, 0), step_gradients(system))
    gap = jnp.linalg.norm(out.grads["W"] - exact["W"])
    assert gap > 0.1 * jnp.linalg.norm(exact["W"])


def test_mean_over_sequences_is_the_mean_gradient():
    """per_sequence and over_batch both give the gradient of the mean loss."""
    first, second = vanilla(seed=0), vanilla(seed=5)
    stack = lambda *leaves: jnp.stack(leaves)
    batch = first._replace(
        h0=stack(first.h0, second.h0),
        xs=jnp.stack([first.xs, second.xs], 1),
        ys=jnp.stack([first.ys, second.ys], 1),
    )
    apart = [first, second._replace(params=first.params)]
    oracle = mean(jax.tree.map(stack, *(step_gradients(s) for s in apart)))
    for est in (
        online.per_sequence(online.rtrl(first.f, first.loss)),
        online.rtrl(*online.over_batch(first.f, first.loss)),
    ):
        _, out = run(est, batch)
        chex.assert_trees_all_close(out.grads, oracle, **TIGHT)
