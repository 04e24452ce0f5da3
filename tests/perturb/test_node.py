"""Node perturbation: what it estimates, by enumeration, and with which variance."""

import chex
import jax.numpy as jnp
import pytest

from rbpjax import perturb
from rbpjax.perturb import NodePerturbation
from rbpjax.perturb.difference import Exact
from tests.support.perturb import (
    ALL,
    COUNT,
    TIGHT,
    check_unbiased,
    check_variance,
    dense,
    distance,
    estimate,
    estimates,
    flat,
    gated,
    gradient,
    layer,
    node_gradient,
    plain,
    rows_of,
)


@pytest.mark.parametrize(
    "cell", ["dense", pytest.param("plain", marks=pytest.mark.full)]
)
def test_node_perturbation_by_enumeration(cell):
    """Mean over all 512 signs: causal and total BPTT, instant one step's gradient."""
    net = dense()
    if cell == "plain":
        net = net._replace(cell=plain)
    fields = lambda credit: dict(credit=credit, readout_credit=credit)
    for credit in (perturb.credit.causal, perturb.credit.total):
        got = estimate(net, NodePerturbation(**ALL, **fields(credit)))
        assert distance(got, gradient(net)) < TIGHT
    got = estimate(net, NodePerturbation(**ALL, **fields(perturb.credit.instant)))
    assert distance(got, gradient(net, truncated=True)) < TIGHT
    assert distance(gradient(net, truncated=True), gradient(net)) > 0.1


def test_readout_takes_instant_credit_without_bias():
    """The default, instant credit for the readout only, has the mean of BPTT."""
    got = estimate(dense(), NodePerturbation(**ALL))
    assert distance(got, gradient(dense())) < TIGHT


def test_credit_is_one_thing_without_memory():
    """One step, or no recurrence of noise: instant, causal and total agree in the mean.

    With one step they agree sample by sample.
    """
    net = dense(steps=1)
    one = [
        estimate(net, NodePerturbation(num_samples=5, credit=c))
        for c in (perturb.credit.instant, perturb.credit.causal, perturb.credit.total)
    ]
    chex.assert_trees_all_equal(*one)
    net = dense()
    net.params["recurrent"] = jnp.zeros((2, 2))
    for credit in (perturb.credit.instant, perturb.credit.causal, perturb.credit.total):
        got = estimate(net, NodePerturbation(**ALL, credit=credit))
        assert distance(got["input"], gradient(net)["input"]) < TIGHT


def test_variance_of_node_perturbation():
    """Total credit: m ‖g‖² Σ‖x_t‖² + ‖G‖² for each matrix of m rows."""
    net = dense(units=3, outputs=2, inputs=2)
    rule = NodePerturbation(
        difference=Exact(),
        noise=perturb.noise.normal,
        credit=perturb.credit.total,
        readout_credit=perturb.credit.total,
    )
    samples, mean = estimates(net, rule, 2 * COUNT), gradient(net)
    states = perturb.unroll(net.cell, *net.data[:3]).states
    inputs = {
        "input": net.inputs,
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


def test_losses_by_example_cost_less_variance():
    """Own losses: (m + 1) Σ‖g_b‖²‖x_b‖²; one for all: about examples times that."""
    net = layer()
    g, x = node_gradient(net)[0], net.inputs[0]
    rule = NodePerturbation(difference=Exact(), noise=perturb.noise.normal)
    square = lambda a: jnp.sum(a**2, axis=-1)
    own = 3 * jnp.sum(square(g) * square(x))
    samples = estimates(net, rule, COUNT)
    check_variance(samples, gradient(net), own)
    check_unbiased(samples, gradient(net))

    one = net._replace(loss=lambda o, y: jnp.mean(net.loss(o, y)))
    shared = 2 * jnp.sum(g**2) * jnp.sum(x**2) + jnp.sum(gradient(net) ** 2)
    check_variance(estimates(one, rule, 3 * COUNT), gradient(net), shared)
    assert shared > 3 * own


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(perturb.noise.normal, marks=pytest.mark.full),
        perturb.noise.rademacher,
        pytest.param(perturb.noise.sphere, marks=pytest.mark.full),
    ],
)
def test_noise_is_independent_over_examples_and_steps(noise):
    """The trap: shared noise with one loss would give the product of the means."""
    net = dense(units=2, steps=2, examples=3)
    net = net._replace(loss=lambda o, y: jnp.mean((o - y) ** 2))
    samples = estimates(net, NodePerturbation(difference=Exact(), noise=noise), COUNT)
    mean = gradient(net)
    check_unbiased(samples, mean)
    g, x = node_gradient(net).recurrent, net.inputs
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
