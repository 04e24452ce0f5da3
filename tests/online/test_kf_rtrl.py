"""KF-RTRL: its influence in the mean, and its variance."""

import chex
import jax
import numpy as np

from rbpjax import online
from tests.support.online import (
    enumerate_runs,
    exact_run,
    lstm,
    sample,
    vanilla,
    variance,
)

TIGHT = dict(rtol=1e-12, atol=1e-12)


def test_kronecker_influence_is_rtrl_in_the_mean():
    """The mean of A ⊗ u, taken to the parameters, is G at every step (T = 4)."""
    system = lstm(n=2, steps=4)
    carries, _ = enumerate_runs(online.kf_rtrl(system.f, system.loss), system)
    u, a = carries.influence
    kernels = np.einsum("etsiaj,etk->tsiajk", a, u) / len(u)
    _, to_params = jax.vjp(system.f.kernel, system.params)
    flat = kernels.reshape(4 * 4, *kernels.shape[3:])
    (got,) = jax.jit(jax.vmap(to_params))(flat)
    exact, _ = exact_run(system)
    got = jax.tree.map(lambda g, e: g.reshape(e.shape), got, exact.influence)
    chex.assert_trees_all_close(got, exact.influence, **TIGHT)


def test_kronecker_noise_is_smaller():
    """With more units, KF-RTRL has far less variance than UORO."""
    system = vanilla(n=4, steps=8)
    kf_rtrl, uoro = (
        variance(sample(make(system.f, system.loss), system, 400, seed=1)[0])
        for make in (online.kf_rtrl, online.uoro)
    )
    assert kf_rtrl < 0.5 * uoro
