"""What holds in the mean: variance formulas, unbiasedness, independent noise."""

import jax
import jax.numpy as jnp
import pytest

from rbpjax import perturb
from rbpjax.perturb import (
    ActivityPerturbation,
    Exact,
    NodePerturbation,
    OneSided,
    WeightPerturbation,
)
from tests.support.perturb import (
    Network,
    dense,
    distance,
    estimate,
    estimates,
    flat,
    gated,
    gradient,
    node_gradient,
    rows_of,
)

COUNT = 40_000


def variance(samples, mean):
    """Total variance about the true mean, and its standard error."""
    squares = jnp.sum((rows_of(samples) - flat(mean)[None]) ** 2, axis=1)
    return jnp.mean(squares), jnp.std(squares) / len(squares) ** 0.5


def check_variance(samples, mean, formula):
    """Within 5 %, and the sample large enough to tell."""
    measured, error = variance(samples, mean)
    assert 4 * error < 0.05 * formula
    assert abs(measured / formula - 1) < 0.05


def check_unbiased(samples, mean):
    """Each entry within 5 standard errors, which are small against the gradient."""
    rows, g = rows_of(samples), flat(mean)
    error = rows.std(0) / len(rows) ** 0.5
    assert jnp.max(jnp.abs(rows.mean(0) - g) / error) < 5
    assert jnp.linalg.norm(error) < 0.1 * jnp.linalg.norm(g)


@pytest.mark.parametrize(
    ("noise", "extra"),
    [(perturb.normal, 1), (perturb.rademacher, -1), (perturb.sphere, -1)],
)
def test_variance_of_weight_perturbation(noise, extra):
    """One sample: (d ± 1) ‖g‖²; four samples: a quarter of it."""
    g = jnp.linspace(-1.0, 2.0, 20)
    for k in (1, 4):
        rule = WeightPerturbation(k, difference=Exact(), noise=noise)
        f = perturb.value_and_grad(lambda p: g @ p, rule)
        keys = jax.random.split(jax.random.key(1), COUNT // 2)
        samples = jax.jit(jax.vmap(f, (0, None)))(keys, 0 * g)[1]
        check_variance(samples, g, (20 + extra) * jnp.sum(g**2) / k)
        check_unbiased(samples, g)
        if noise is perturb.normal:  # how well K samples point the right way
            cosine = jnp.mean((samples @ g) ** 2) / (
                jnp.sum(g**2) * jnp.mean(jnp.sum(samples**2, 1))
            )
            assert abs(cosine * (k + 20 + 1) / (k + 2) - 1) < 0.05


def test_variance_of_node_perturbation():
    """Total credit: m ‖g‖² Σ‖x_t‖² + ‖G‖² for each matrix of m rows."""
    net = dense(units=3, outputs=2, inputs=2)
    rule = NodePerturbation(
        difference=Exact(),
        noise=perturb.normal,
        credit=perturb.total,
        readout_credit=perturb.total,
    )
    samples, mean = estimates(net, rule, 2 * COUNT), gradient(net)
    states = perturb.unroll(net.cell, *net.data[:3]).states
    inputs = {
        "input": net.xs,
        "recurrent": jnp.concatenate([net.h0[None], states[:-1]]),
        "readout": states,
    }
    everything = jnp.sum(flat(node_gradient(net)) ** 2)
    for name, x in inputs.items():
        formula = len(mean[name]) * everything * jnp.sum(x**2) + jnp.sum(
            mean[name] ** 2
        )
        check_variance(samples[name], mean[name], formula)
    check_unbiased(samples, mean)


def layer(examples=8):
    """One linear layer, one step, a batch whose means are not zero."""
    keys = jax.random.split(jax.random.key(5), 3)
    cell = lambda w, x, h, n: (h, x @ w.T + n, x @ w.T + n)
    x = 1 + jax.random.normal(keys[0], (1, examples, 3))
    y = 1 + jax.random.normal(keys[1], (1, examples, 2))
    w = jax.random.normal(keys[2], (2, 3))
    return Network(cell, lambda o, y: jnp.sum((o - y) ** 2, -1), w, jnp.zeros(()), x, y)


def test_losses_by_example_cost_less_variance():
    """Own losses: (m + 1) Σ‖g_b‖²‖x_b‖²; one for all: about examples times that."""
    net = layer()
    g, x = node_gradient(net)[0], net.xs[0]
    rule = NodePerturbation(difference=Exact(), noise=perturb.normal)
    square = lambda a: jnp.sum(a**2, axis=-1)
    own = 3 * jnp.sum(square(g) * square(x))
    samples = estimates(net, rule, COUNT)
    check_variance(samples, gradient(net), own)
    check_unbiased(samples, gradient(net))

    one = net._replace(loss=lambda o, y: jnp.mean(net.loss(o, y)))
    shared = 2 * jnp.sum(g**2) * jnp.sum(x**2) + jnp.sum(gradient(net) ** 2)
    check_variance(estimates(one, rule, 3 * COUNT), gradient(net), shared)
    assert shared > 3 * own


@pytest.mark.parametrize("noise", [perturb.normal, perturb.rademacher, perturb.sphere])
def test_noise_is_independent_over_examples_and_steps(noise):
    """The trap: shared noise with one loss would give the product of the means."""
    net = dense(units=2, steps=2, examples=3)
    net = net._replace(loss=lambda o, y: jnp.mean((o - y) ** 2))
    samples = estimates(net, NodePerturbation(difference=Exact(), noise=noise), COUNT)
    mean = gradient(net)
    check_unbiased(samples, mean)
    g, x = node_gradient(net).recurrent, net.xs
    over_examples = jnp.einsum("tbi,tcj->ij", g, x) / 1.0  # noise shared by a batch
    over_steps = jnp.einsum("tbi,sbj->ij", g, x)  # noise shared by all steps
    error = rows_of(samples["input"]).std(0) / COUNT**0.5
    for trap in (over_examples, over_steps):
        assert jnp.max(jnp.abs(flat(trap - mean["input"])) / error) > 10  # would show


def test_defaults_are_unbiased_through_time():
    """Signs, one-sided passes, causal credit: BPTT within the errors, no other."""
    for net in (dense(units=3, outputs=2, inputs=2, steps=4), gated()):
        samples = estimates(net, NodePerturbation(), COUNT)
        check_unbiased(samples, gradient(net))
        rows = rows_of(samples)
        error = rows.std(0) / COUNT**0.5
        cut = jnp.abs(rows.mean(0) - flat(gradient(net, truncated=True))) / error
        assert jnp.max(cut) > 10


def test_fresh_weight_noise_is_unbiased_and_dearer():
    """Redrawn at every step: still BPTT, with more variance than one draw."""
    net = dense(examples=2)
    once, fresh = (
        estimates(
            net,
            WeightPerturbation(
                difference=Exact(), every_step=every, credit=perturb.total
            ),
            COUNT // 2,
        )
        for every in (False, True)
    )
    for samples in (once, fresh):
        check_unbiased(samples, gradient(net))
    assert variance(fresh, gradient(net))[0] > 1.5 * variance(once, gradient(net))[0]


def test_batch_norm_of_activity_costs_variance():
    """The Frobenius norm over a batch is noisier than a norm an example, same mean."""
    net = layer()
    one = net._replace(loss=lambda o, y: jnp.mean(net.loss(o, y)))
    rule = ActivityPerturbation(difference=Exact(), noise=perturb.normal)
    own, shared = (estimates(n, rule, COUNT // 2) for n in (net, one))
    check_unbiased(own, gradient(net))  # white noise: here it is the gradient
    check_unbiased(shared, gradient(net))
    ratio = variance(shared, gradient(net))[0] / variance(own, gradient(net))[0]
    assert ratio > 3


def test_float32_keeps_three_digits():
    """Defaults in float32: rounding stays below the noise of any sample, dtype kept."""
    net = dense(units=50, outputs=3, inputs=2, steps=20)
    small = jax.tree.map(lambda x: x.astype(jnp.float32), net.data)
    weights = jnp.array([1.0, 2.0, 1.0], jnp.float32)
    losses = {
        jnp.float32: lambda o, y: (o - y) ** 2 @ weights,
        jnp.float64: lambda o, y: (o - y) ** 2 @ weights.astype(jnp.float64),
    }
    for rule in (NodePerturbation(4), ActivityPerturbation(4)):
        got, want = (
            estimate(Network(net.cell, losses[dtype], *data), rule)
            for dtype, data in ((jnp.float32, small), (jnp.float64, net.data))
        )
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))
        got = jax.tree.map(lambda x: x.astype(jnp.float64), got)
        # Rounding of a loss of order one, 6e-8, over σ = 1e-4 and √T of them.
        assert distance(got, want) < 1e-2
    rough = NodePerturbation(4, difference=OneSided(1e-6))
    got = estimate(Network(net.cell, losses[jnp.float32], *small), rough)
    got = jax.tree.map(lambda x: x.astype(jnp.float64), got)
    assert distance(got, estimate(net._replace(loss=losses[jnp.float64]), rough)) > 1e-3
