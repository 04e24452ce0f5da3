"""Activity perturbation: a preconditioned gradient, its norms, no activity at all."""

import chex
import jax
import jax.numpy as jnp
import pytest

from rbpjax import perturb
from rbpjax.perturb import ActivityPerturbation, NodePerturbation
from rbpjax.perturb.difference import Central, Exact
from tests.support.perturb import (
    ALL,
    COUNT,
    TIGHT,
    check_unbiased,
    dense,
    distance,
    estimate,
    estimates,
    gradient,
    layer,
    node_gradient,
    signs,
    silent,
    variance,
)


def covariances(net):
    """J with J[t, i, s, j] = ∂a_t,i/∂ξ_s,j over all nodes, flattened by step."""
    nodes = lambda n: perturb.unroll(net.cell, *net.data[:3], n).nodes
    return jax.jit(jax.jacobian(nodes))(silent(net))


def test_activity_perturbation_is_preconditioned():
    """Unnormalized: E e = Cov·g; causal for the state, instant for the readout."""
    net = dense()
    jac = covariances(net)
    sources = lambda row: [row.recurrent, row.readout]
    cov = lambda row: sum(jnp.einsum("tisk,tjsk->tij", j, j) for j in sources(row))
    hidden, readout = cov(jac.recurrent), cov(jac.readout)
    g, g0 = node_gradient(net), node_gradient(net, truncated=True)

    def errors(credit, readout_credit):
        """The mean errors, read off a network whose weights are added to its nodes."""
        taps = net._replace(
            cell=lambda e, x, h, n: net.cell(
                net.params,
                x["x"],
                h,
                perturb.Nodes(
                    n.recurrent + x["i"] @ e.recurrent, n.readout + x["i"] @ e.readout
                ),
            ),
            params=silent(net),
            inputs={"x": net.inputs, "i": jnp.eye(3)},
        )
        # Weight [s] is an input to the nodes of step s alone, so that its gradient is
        # the error of that step.
        rule = ActivityPerturbation(
            **ALL, credit=credit, readout_credit=readout_credit, norm=None
        )
        return estimate(taps, rule)

    want = perturb.Nodes(
        jnp.einsum("tij,tj->ti", hidden, g.recurrent),
        jnp.einsum("tij,tj->ti", readout, g0.readout),
    )
    got = errors(perturb.credit.causal, perturb.credit.instant)
    assert distance(got.recurrent, want.recurrent) < TIGHT
    assert distance(got.readout, want.readout) < TIGHT
    assert distance(got.recurrent, g.recurrent) > 0.1  # it is not the gradient
    swapped = errors(perturb.credit.total, perturb.credit.causal)
    assert distance(swapped.recurrent, want.recurrent) > 0.1
    assert distance(swapped.readout, want.readout) > 0.01
    alone = errors(perturb.credit.instant, perturb.credit.instant)
    want0 = jnp.einsum("tij,tj->ti", hidden, g0.recurrent)
    assert distance(alone.recurrent, want0) < TIGHT


def test_normalized_activity_perturbation():
    """With the norm, E e_t = N S_t g_t; S_t from the enumerated δa themselves."""
    net = dense()
    rows = signs(9)
    jac = covariances(net).recurrent
    push = lambda v: (
        jnp.einsum("tisk,sk->ti", jac.recurrent, v[:6].reshape(3, 2))
        + jnp.einsum("tisk,sk->ti", jac.readout, v[6:].reshape(3, 1))
    )
    delta = jax.vmap(push)(rows)
    norm = jnp.sum(delta**2, axis=2)
    s = jnp.einsum("kti,ktj,kt->tij", delta, delta, 1 / norm) / 512
    errors = 2 * jnp.einsum("tij,tj->ti", s, node_gradient(net).recurrent)
    want = jnp.einsum("ti,tj->ij", errors, net.inputs)
    got = estimate(net, ActivityPerturbation(**ALL))["input"]
    assert distance(got, want) < TIGHT
    half = estimate(net, ActivityPerturbation(**ALL, scale=1.0))["input"]
    assert distance(2 * half, want) < TIGHT
    assert distance(want, gradient(net)["input"]) > 0.1


def test_white_activity_needs_no_norm():
    """Without recurrence and with signs, activity and node perturbation are one."""
    net = dense(units=3)
    net.params["recurrent"] = jnp.zeros((3, 3))
    shared = dict(num_samples=7, difference=Exact())
    node = estimate(net, NodePerturbation(**shared))
    activity = estimate(net, ActivityPerturbation(**shared))
    assert distance(activity["input"], node["input"]) < TIGHT
    assert distance(activity["recurrent"], node["recurrent"]) < TIGHT


def test_no_activity_gives_no_error_signal():
    """δa = 0 with every norm (and no noise at all): gradient 0, nowhere NaN."""
    net = dense()
    nothing = lambda key, indices, size, dtype: jnp.zeros((len(indices), size), dtype)
    # Central: one-sided differences compare passes that may be rounded differently.
    fields = dict(noise=nothing, difference=Central())
    for norm in (
        None,
        perturb.norm.per_layer_step,
        perturb.norm.per_step,
        perturb.norm.per_sequence,
    ):
        grads = estimate(net, ActivityPerturbation(num_samples=2, **fields, norm=norm))
        chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))
    grads = estimate(net, NodePerturbation(num_samples=2, **fields))
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))


@pytest.mark.full
def test_batch_norm_of_activity_costs_variance():
    """The Frobenius norm over a batch is noisier than a norm an example, same mean."""
    net = layer()
    one = net._replace(loss=lambda o, y: jnp.mean(net.loss(o, y)))
    rule = ActivityPerturbation(difference=Exact(), noise=perturb.noise.normal)
    own, shared = (estimates(n, rule, COUNT // 2) for n in (net, one))
    check_unbiased(own, gradient(net))  # white noise: here it is the gradient
    check_unbiased(shared, gradient(net))
    ratio = variance(shared, gradient(net))[0] / variance(own, gradient(net))[0]
    assert ratio > 3
