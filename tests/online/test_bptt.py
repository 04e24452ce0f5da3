"""BPTT over sequences and windows against the unrolled loss."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import online
from tests.online.test_rtrl import SYSTEMS, TIGHT
from tests.support.online import exact_run, step_gradients, total, vanilla


def over_sequence(system, truncation=None):
    est = online.bptt(system.f, system.loss, truncation=truncation)
    carry = est.init(system.params, system.h0)
    return jax.jit(est.step)(system.params, carry, system.xs, system.ys, ())


@pytest.mark.parametrize("make", SYSTEMS)
def test_bptt_is_the_unrolled_gradient(make):
    """One step over a sequence returns the summed loss, its gradient, the last h."""
    system = make()
    carry, out = over_sequence(system)
    carries, online_out = exact_run(system)
    chex.assert_trees_all_close(out.grads, total(step_gradients(system)), **TIGHT)
    chex.assert_trees_all_close(out.loss, np.sum(online_out.loss), **TIGHT)
    last = jax.tree.map(lambda x: x[-1], carries.h)
    chex.assert_trees_all_close(carry.h, last, **TIGHT)


@pytest.mark.parametrize("truncation", [1, 3, 12])
def test_tbptt_cuts_the_history_at_windows(truncation):
    """Equal to the gradient with stop_gradient on the state every few steps."""
    system = vanilla()

    @jax.jit
    @jax.value_and_grad
    def cut_loss(params, cuts):
        def body(h, xyc):
            x, y, cut = xyc
            h = jnp.where(cut, jax.lax.stop_gradient(h), h)
            h = system.f(params, x, h)
            return h, system.loss(params, h, y)

        return jnp.sum(jax.lax.scan(body, system.h0, (system.xs, system.ys, cuts))[1])

    _, out = over_sequence(system, truncation)
    value, oracle = cut_loss(system.params, np.arange(12) % truncation == 0)
    chex.assert_trees_all_close(out.grads, oracle, **TIGHT)
    chex.assert_trees_all_close(out.loss, value, **TIGHT)


def test_truncated_influence_is_not_the_gradient():
    """Negative control: forgetting the past at each step is visibly different."""
    system = vanilla()
    _, out = over_sequence(system, truncation=1)
    exact = total(step_gradients(system))
    gap = np.linalg.norm(out.grads["W"] - exact["W"])
    assert gap > 0.1 * np.linalg.norm(exact["W"])


def test_truncation_must_divide_the_sequence():
    """Both numbers are in the message."""
    with pytest.raises(ValueError, match=r"`truncation` = 5.*12"):
        over_sequence(vanilla(), truncation=5)


@pytest.mark.parametrize("bad", [0, 2.0, True, np.array(2)])
def test_truncation_must_be_a_positive_int(bad):
    """A Python int of at least one."""
    with pytest.raises(ValueError, match="truncation"):
        online.bptt(lambda p, x, h: h, lambda p, h, y: 0.0, truncation=bad)


@pytest.mark.parametrize("x", [None, np.ones(()), np.ones(0), (np.ones(2), np.ones(3))])
def test_a_sequence_has_one_length(x):
    """No time axis, no steps, or two lengths: refused, with the remedy."""
    est = online.bptt(lambda p, x, h: h, lambda p, h, y: 0.0)
    carry = est.init(np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match=r"`x` and `y` must be sequences.*x\[None\]"):
        est.step(np.ones(2), carry, x, None, ())
