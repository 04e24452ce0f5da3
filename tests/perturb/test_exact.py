"""What is estimated, without chance: frames and enumerations of noise."""

import chex
import jax
import jax.numpy as jnp
import pytest

from rbpjax import perturb
from rbpjax.perturb import (
    ActivityPerturbation,
    Central,
    Exact,
    NodePerturbation,
    OneSided,
    WeightPerturbation,
)
from rbpjax.perturb.cell import local_pullback
from tests.support.perturb import (
    dense,
    distance,
    estimate,
    flat,
    gated,
    gradient,
    node_gradient,
    plain,
    rows_of,
    signs,
    silent,
    table,
)

# Sums of up to 512 float64 numbers of order one.
TIGHT = 1e-12
ALL = dict(num_samples=512, difference=Exact(), noise=table(signs(9)))


def test_coordinate_differences_are_the_gradient():
    """One entry at a time by central differences: the gradient to 1e-9."""
    net = dense()
    # Steps of 1e-5: truncation about 1e-10, rounding about 1e-11.
    by = lambda d: dict(
        num_samples=d, difference=Central(1e-5 / d**0.5), noise=perturb.coordinate
    )
    for rule in (
        WeightPerturbation(**by(8)),
        NodePerturbation(**by(9), credit=perturb.total),
    ):
        assert distance(estimate(net, rule), gradient(net)) < 1e-9


@pytest.mark.parametrize("make", [dense, gated])
def test_orthonormal_frame_is_the_gradient(make):
    """A whole frame with exact derivatives has no variance: BPTT, any cell."""
    net = make()
    taps = flat(silent(net)).size
    for rule in (
        WeightPerturbation(flat(net.params).size),
        NodePerturbation(taps, credit=perturb.total),
        NodePerturbation(taps, credit=perturb.causal),
    ):
        fields = dict(difference=Exact(), noise=perturb.orthonormal)
        rule = type(rule)(rule.num_samples, **fields, credit=rule.credit)
        assert distance(estimate(net, rule), gradient(net)) < TIGHT


def test_assembly_from_tap_gradients():
    """True node errors give the true gradient: outer products and local derivatives."""
    net = dense(units=3, outputs=2, inputs=2, examples=4)
    run = perturb.unroll(net.cell, *net.data[:3])
    before = jnp.concatenate([net.h0[None], run.states[:-1]])
    errors = node_gradient(net)
    outer = net.cell.pullback(net.params, net.xs, before, run.states, errors)
    local = local_pullback(net.cell, net.params, net.xs, before, silent(net), errors)
    assert distance(outer, gradient(net)) < TIGHT
    assert distance(local, gradient(net)) < TIGHT


def test_assembly_keeps_nodes_of_a_step_apart():
    """With nodes that hang on nodes, no path within a step is counted twice."""
    net = gated()
    run = perturb.unroll(net.cell, *net.data[:3])
    before = jnp.concatenate([net.h0[None], run.states[:-1]])
    errors = node_gradient(net)
    local = local_pullback(net.cell, net.params, net.xs, before, silent(net), errors)
    assert distance(local, gradient(net)) < TIGHT
    one = jax.vmap(lambda p, n, x, h: net.cell(p, x, h, n)[2], (None, 0, 0, 0))
    _, twice = jax.vjp(lambda p: one(p, silent(net), net.xs, before), net.params)
    assert distance(twice(errors)[0], gradient(net)) > 0.1  # what it would be


def test_local_derivatives_do_not_run_the_network_backwards():
    """For a dense cell the local derivative is all steps at once."""
    net = dense()._replace(cell=plain)
    f = lambda e, xs, before: local_pullback(
        plain, net.params, xs, before, silent(net), e
    )
    args = silent(net), net.xs, jnp.zeros((3, 2))
    text = jax.jit(f).lower(*args).compile().as_text()
    assert "while" not in text  # all steps at once


@pytest.mark.parametrize("cell", ["dense", "plain"])
def test_node_perturbation_by_enumeration(cell):
    """Mean over all 512 signs: causal and total BPTT, instant one step's gradient."""
    net = dense()
    if cell == "plain":
        net = net._replace(cell=plain)
    fields = lambda credit: dict(credit=credit, readout_credit=credit)
    for credit in (perturb.causal, perturb.total):
        got = estimate(net, NodePerturbation(**ALL, **fields(credit)))
        assert distance(got, gradient(net)) < TIGHT
    got = estimate(net, NodePerturbation(**ALL, **fields(perturb.instant)))
    assert distance(got, gradient(net, truncated=True)) < TIGHT
    assert distance(gradient(net, truncated=True), gradient(net)) > 0.1


def test_readout_takes_instant_credit_without_bias():
    """The default, instant credit for the readout only, has the mean of BPTT."""
    got = estimate(dense(), NodePerturbation(**ALL))
    assert distance(got, gradient(dense())) < TIGHT


def test_finite_differences_are_off_by_sigma_squared():
    """With passes alone the bias falls a hundredfold with a tenth of σ."""
    net, errors = dense(), []
    for sigma in (1e-2, 1e-3):
        rule = NodePerturbation(512, difference=OneSided(sigma), noise=table(signs(9)))
        errors.append(distance(estimate(net, rule), gradient(net)))
    assert errors[0] > 1e-5  # far above rounding
    assert 80 < errors[0] / errors[1] < 120


def test_weight_perturbation_by_enumeration():
    """Over all 256 signs: mean exact, total variance (d - 1) ‖g‖² exactly."""
    net = dense()
    each = lambda i: estimate(
        net,
        WeightPerturbation(difference=Exact(), noise=table(jnp.roll(signs(8), -i, 0))),
    )
    got = rows_of(jax.vmap(each)(jnp.arange(256)))
    g = flat(gradient(net))
    assert distance(got.mean(0), g) < TIGHT
    variance = jnp.sum((got - g[None]) ** 2) / 256
    assert abs(variance / jnp.sum(g**2) - 7) < TIGHT


def test_fresh_weight_noise_by_enumeration():
    """Redrawn every step, two weights and three steps: credit decides the estimand."""
    cell = lambda w, x, h, n: (
        jnp.tanh(w[0] * h + w[1] * x + n),
        h * w[0] + x,  # a readout that w reaches past the state
        jnp.tanh(w[0] * h + w[1] * x + n) * 0 + n,
    )
    net = dense()._replace(
        cell=cell,
        loss=lambda out, y: (out - y[0]) ** 2,
        params=jnp.array([0.7, -1.2]),
        h0=jnp.array(0.3),
        xs=jnp.array([1.0, -0.5, 2.0]),
    )
    all_signs = signs(6).reshape(64, 3, 2)
    # The library folds the step into the key: find out which one it is at.
    key = jax.random.key(0)
    folded = jax.vmap(lambda t: jax.random.key_data(jax.random.fold_in(key, t)))(
        jnp.arange(3)
    )

    def noise(k, indices, size, dtype):
        step = jnp.argmax(jnp.all(folded == jax.random.key_data(k)[None], axis=1))
        return all_signs[indices, step]

    def mean(credit):
        rule = WeightPerturbation(
            64, difference=Exact(), noise=noise, every_step=True, credit=credit
        )
        return estimate(net, rule, key)

    assert distance(mean(perturb.causal), gradient(net)) < TIGHT
    assert distance(mean(perturb.total), gradient(net)) < TIGHT
    assert distance(mean(perturb.instant), gradient(net, truncated=True)) < TIGHT
    assert distance(gradient(net, truncated=True), gradient(net)) > 0.1


def covariances(net):
    """J with J[t, i, s, j] = ∂a_t,i/∂ξ_s,j over all nodes, flattened by step."""
    nodes = lambda n: perturb.unroll(net.cell, *net.data[:3], n).nodes
    jacobian = jax.jacobian(nodes)(silent(net))
    return jacobian


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
            xs={"x": net.xs, "i": jnp.eye(3)},
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
    got = errors(perturb.causal, perturb.instant)
    assert distance(got.recurrent, want.recurrent) < TIGHT
    assert distance(got.readout, want.readout) < TIGHT
    assert distance(got.recurrent, g.recurrent) > 0.1  # it is not the gradient
    swapped = errors(perturb.total, perturb.causal)
    assert distance(swapped.recurrent, want.recurrent) > 0.1
    assert distance(swapped.readout, want.readout) > 0.01
    alone = errors(perturb.instant, perturb.instant)
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
    want = jnp.einsum("ti,tj->ij", errors, net.xs)
    got = estimate(net, ActivityPerturbation(**ALL))["input"]
    assert distance(got, want) < TIGHT
    half = estimate(net, ActivityPerturbation(**ALL, scale=1.0))["input"]
    assert distance(2 * half, want) < TIGHT
    assert distance(want, gradient(net)["input"]) > 0.1


def test_credit_is_one_thing_without_memory():
    """One step, or no recurrence of noise: instant, causal and total agree in the mean.

    With one step they agree sample by sample.
    """
    net = dense(steps=1)
    one = [
        estimate(net, NodePerturbation(5, credit=c))
        for c in (perturb.instant, perturb.causal, perturb.total)
    ]
    chex.assert_trees_all_equal(*one)
    net = dense()
    net.params["recurrent"] = jnp.zeros((2, 2))
    for credit in (perturb.instant, perturb.causal, perturb.total):
        got = estimate(net, NodePerturbation(**ALL, credit=credit))
        assert distance(got["input"], gradient(net)["input"]) < TIGHT
