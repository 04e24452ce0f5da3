"""Credits by their definitions."""

import chex
import jax.numpy as jnp

from rbpjax import perturb
from rbpjax.perturb.credit import Trace


def test_trace_is_an_eligibility_trace():
    """Trace(decay=γ) pays δL to E = γE + ξ; γ = 0 is instant, γ = 1 is causal."""
    delta = jnp.array([0.5, -2.0, 3.0, 1.0])
    noise = jnp.array([1.0, 2.0, -1.0, 4.0])
    trace = paid = 0.0
    for d, n in zip(delta, noise, strict=True):
        trace = 0.3 * trace + n
        paid += d * trace
    assert abs(jnp.sum(Trace(decay=0.3)(delta) * noise) - paid) < 1e-14
    chex.assert_trees_all_close(
        Trace(decay=0.0)(delta), perturb.credit.instant(delta), rtol=1e-15
    )
    chex.assert_trees_all_close(
        Trace(decay=1.0)(delta), perturb.credit.causal(delta), rtol=1e-15
    )
    batch = jnp.stack([delta, 2 * delta], axis=1)
    for credit in (Trace(decay=0.3), perturb.credit.causal, perturb.credit.total):
        chex.assert_trees_all_close(credit(batch)[:, 0], credit(delta), rtol=1e-15)


def test_what_is_not_finite_spoils_no_later_step():
    """A change that is nan or inf: its own step, and those before it."""
    for bad in (jnp.nan, jnp.inf):
        delta = jnp.array([1.0, bad, 2.0, 3.0])
        chex.assert_trees_all_equal(Trace(decay=0.0)(delta), delta)
        for credit in (Trace(decay=1.0), Trace(decay=0.5), perturb.credit.causal):
            got, clean = credit(delta), credit(jnp.array([0.0, 0.0, 2.0, 3.0]))
            chex.assert_trees_all_equal(got[2:], clean[2:])
            assert not jnp.isfinite(got[:2]).any()
