"""The scalings of the authors' code."""

import jax
import jax.numpy as jnp

from rbpjax import perturb
from tests.support.perturb import dense, distance, estimate


def test_paper_code_by_its_formulas():
    """ΔA, ΔR, ΔB as the public code has them, loop by loop, from the same noise."""
    net = dense(units=3, outputs=2, inputs=2, steps=4, examples=5)
    net = net._replace(loss=lambda out, y: jnp.mean((out - y) ** 2), h0=0 * net.h0)
    sigma, key = 1e-3, jax.random.key(3)
    code = perturb.paper_code(7, sigma=sigma)
    drawn = perturb.noise.normal(key, jnp.arange(1), 4 * 5 * 5, jnp.float64)[0] * sigma
    xi, nu = drawn[:60].reshape(4, 5, 3), drawn[60:].reshape(4, 5, 2)
    a, r, b = (net.params[k] for k in ("input", "recurrent", "readout"))

    node = {k: 0 * v for k, v in net.params.items()}
    activity = {k: 0 * v for k, v in net.params.items()}
    h = noisy = jnp.zeros((5, 3))
    for t in range(4):
        pre, pre_noisy = (
            net.inputs[t] @ a.T + s @ r.T + e for s, e in ((h, 0.0), (noisy, xi[t]))
        )
        before, h, noisy = h, jnp.tanh(pre), jnp.tanh(pre_noisy)
        out, out_noisy = h @ b.T, noisy @ b.T + nu[t]
        dl = net.loss(out_noisy, net.targets[t]) - net.loss(out, net.targets[t])
        da, db = pre_noisy - pre, out_noisy - out
        for made, e, f in (
            (node, dl / sigma * xi[t], dl / sigma * nu[t]),
            (activity, *(7**0.5 * dl * d / jnp.sum(d**2) for d in (da, db))),
        ):
            made["input"] += e.T @ net.inputs[t]
            made["recurrent"] += e.T @ before
            made["readout"] += f.T @ h
    # The differences of losses, 1e-3 of them, keep 13 digits.
    assert distance(estimate(net, code.node, key), node) < 1e-10
    assert distance(estimate(net, code.activity, key), activity) < 1e-10
