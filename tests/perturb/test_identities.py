"""What holds sample by sample: identities between rules, differences, credits."""

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
    Trace,
    WeightPerturbation,
)
from tests.support.perturb import (
    dense,
    distance,
    estimate,
    losses,
    signs,
    silent,
    table,
)

TIGHT = 1e-12  # sums of some float64 numbers of order one


def test_activity_norms_by_hand():
    """Blocks of a layer, a step, a sequence; a batch with one loss is one block."""
    a = jnp.arange(1.0, 25.0).reshape(2, 3, 4)
    b = jnp.ones((2, 3, 1))
    square = lambda x, axis: jnp.sum(x**2, axis=axis, keepdims=True)
    (s, n), (r, m) = perturb.per_layer_step([a, b])
    chex.assert_trees_all_close((s, r), (square(a, 2), square(b, 2)))
    assert (n, m) == (4, 1)
    (s, n), (r, _) = perturb.per_step([a, b])
    chex.assert_trees_all_close((s, r), (square(a, 2) + 1, square(a, 2) + 1))
    assert n == 5
    (s, n), _ = perturb.per_sequence([a, b])
    chex.assert_trees_all_close(s, square(a, (0, 2)) + 2)
    assert n == 10


@pytest.mark.parametrize("rule", [NodePerturbation, ActivityPerturbation])
def test_a_batch_is_the_mean_of_its_examples(rule):
    """With losses and noise of their own, examples know nothing of each other."""
    net = dense(units=3, outputs=2, examples=2)
    rows = signs(15)[jnp.array([5, 777])] * jnp.array([[1.0], [2.0]])
    hidden, out = rows[:, :9].reshape(2, 3, 3), rows[:, 9:].reshape(2, 3, 2)
    both = [hidden.swapaxes(0, 1).reshape(-1), out.swapaxes(0, 1).reshape(-1)]
    fields = dict(difference=Exact())
    batch = estimate(net, rule(noise=table(jnp.concatenate(both)[None]), **fields))
    alone = []
    for i in range(2):
        one = (a[:, i] for a in (net.xs, net.ys))
        single = net._replace(h0=net.h0[i], **dict(zip(("xs", "ys"), one, strict=True)))
        alone.append(estimate(single, rule(noise=table(rows[i : i + 1]), **fields)))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *alone)
    assert distance(batch, mean) < TIGHT


def test_white_activity_needs_no_norm():
    """Without recurrence and with signs, activity and node perturbation are one."""
    net = dense(units=3)
    net.params["recurrent"] = jnp.zeros((3, 3))
    shared = dict(num_samples=7, difference=Exact())
    node = estimate(net, NodePerturbation(**shared))
    activity = estimate(net, ActivityPerturbation(**shared))
    assert distance(activity["input"], node["input"]) < TIGHT
    assert distance(activity["recurrent"], node["recurrent"]) < TIGHT


def test_trace_is_an_eligibility_trace():
    """Trace(γ) pays δL to E = γE + ξ; γ = 0 is instant, γ = 1 is causal."""
    delta = jnp.array([0.5, -2.0, 3.0, 1.0])
    noise = jnp.array([1.0, 2.0, -1.0, 4.0])
    trace = paid = 0.0
    for d, n in zip(delta, noise, strict=True):
        trace = 0.3 * trace + n
        paid += d * trace
    assert abs(jnp.sum(Trace(0.3)(delta) * noise) - paid) < 1e-14
    chex.assert_trees_all_close(Trace(0.0)(delta), perturb.instant(delta), rtol=1e-15)
    chex.assert_trees_all_close(Trace(1.0)(delta), perturb.causal(delta), rtol=1e-15)
    batch = jnp.stack([delta, 2 * delta], axis=1)
    for credit in (Trace(0.3), perturb.causal, perturb.total):
        chex.assert_trees_all_close(credit(batch)[:, 0], credit(delta), rtol=1e-15)


def test_one_sided_both_ways_is_central():
    """The mean of one-sided estimates at +v and -v is the central one at v."""
    net, rows = dense(), signs(9)[100:101]
    both = table(jnp.concatenate([rows, -rows]))
    one = estimate(net, NodePerturbation(2, difference=OneSided(0.1), noise=both))
    two = estimate(net, NodePerturbation(1, difference=Central(0.1), noise=table(rows)))
    # Not the mean of differences of v alone: curvature shows at σ = 0.1.
    assert distance(one, two) < TIGHT
    single = estimate(
        net, NodePerturbation(1, difference=OneSided(0.1), noise=table(rows))
    )
    assert distance(single, two) > 1e-3


def test_quadratic_losses_have_no_bias():
    """Central differences are exact, the mean of one-sided ones too, at σ = 3."""
    matrix = jnp.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 3.0]])
    loss = lambda p: p["a"] @ matrix @ p["a"] / 2 + 3 * p["a"][0]
    params = {"a": jnp.array([1.0, -2.0, 0.5])}
    want = jax.grad(loss)(params)
    v = table(jnp.array([[1.0, 2.0, -3.0]]))
    rule = WeightPerturbation(1, difference=Central(3.0), noise=v)
    got = perturb.value_and_grad(loss, rule)(jax.random.key(0), params)[1]
    chex.assert_trees_all_close(
        got["a"], jnp.array([1.0, 2.0, -3.0]) * (want["a"] @ jnp.array([1.0, 2, -3]))
    )
    rule = WeightPerturbation(8, difference=OneSided(3.0), noise=table(signs(3)))
    value, got = perturb.value_and_grad(loss, rule)(jax.random.key(0), params)
    assert distance(got, want) < TIGHT
    assert value == loss(params)


def test_bias_of_a_cubic():
    """E is 3θ² + σ² for signs, 3θ² + 3σ² for Gaussians (by quadrature), 3θ² for jvp."""
    theta, sigma = jnp.array(1.5), 0.5
    two, six = jnp.array([[1.0], [-1.0]]), jnp.zeros((6, 1)).at[0].set(3**0.5)
    six = six.at[1].set(-(3**0.5))  # nodes ±√3 and 0: exact up to the fifth moment
    for rows, difference, bias in (
        (two, OneSided(sigma), sigma**2),
        (six, OneSided(sigma), 3 * sigma**2),
        (six, Central(sigma), 3 * sigma**2),
        (two, Exact(), 0.0),
    ):
        rule = WeightPerturbation(len(rows), difference=difference, noise=table(rows))
        got = perturb.value_and_grad(lambda p: p**3, rule)(jax.random.key(0), theta)[1]
        assert abs(got - (3 * theta**2 + bias)) < TIGHT


def test_size_of_the_noise_cancels():
    """σ tenfold: node and activity rules stay, those of the paper's code scale."""
    net = dense(units=4)
    for rule in (NodePerturbation, ActivityPerturbation):
        a, b = (estimate(net, rule(3, difference=OneSided(s))) for s in (1e-5, 1e-4))
        assert distance(a, b) < 1e-3  # O(σ) of a single sample
    a, b = (perturb.paper_code(6, s) for s in (1e-5, 1e-4))
    assert distance(estimate(net, a.activity), estimate(net, b.activity)) < 1e-3
    for rule in ("node", "weight"):
        small, large = (estimate(net, getattr(code, rule)) for code in (a, b))
        assert distance(jax.tree.map(lambda x: 10 * x, small), large) < 1e-3


def test_paper_code_by_its_formulas():
    """ΔA, ΔR, ΔB as the public code has them, loop by loop, from the same noise."""
    net = dense(units=3, outputs=2, inputs=2, steps=4, examples=5)
    net = net._replace(loss=lambda out, y: jnp.mean((out - y) ** 2), h0=0 * net.h0)
    sigma, key = 1e-3, jax.random.key(3)
    code = perturb.paper_code(7, sigma)
    drawn = perturb.normal(key, jnp.arange(1), 4 * 5 * 5, jnp.float64)[0] * sigma
    xi, nu = drawn[:60].reshape(4, 5, 3), drawn[60:].reshape(4, 5, 2)
    a, r, b = (net.params[k] for k in ("input", "recurrent", "readout"))

    node = {k: 0 * v for k, v in net.params.items()}
    activity = {k: 0 * v for k, v in net.params.items()}
    h = noisy = jnp.zeros((5, 3))
    for t in range(4):
        pre, pre_noisy = (
            net.xs[t] @ a.T + s @ r.T + e for s, e in ((h, 0.0), (noisy, xi[t]))
        )
        before, h, noisy = h, jnp.tanh(pre), jnp.tanh(pre_noisy)
        out, out_noisy = h @ b.T, noisy @ b.T + nu[t]
        dl = net.loss(out_noisy, net.ys[t]) - net.loss(out, net.ys[t])
        da, db = pre_noisy - pre, out_noisy - out
        for made, e, f in (
            (node, dl / sigma * xi[t], dl / sigma * nu[t]),
            (activity, *(7**0.5 * dl * d / jnp.sum(d**2) for d in (da, db))),
        ):
            made["input"] += e.T @ net.xs[t]
            made["recurrent"] += e.T @ before
            made["readout"] += f.T @ h
    # The differences of losses, 1e-3 of them, keep 13 digits.
    assert distance(estimate(net, code.node, key), node) < 1e-10
    assert distance(estimate(net, code.activity, key), activity) < 1e-10


def test_chunks_change_nothing():
    """Samples are numbered: chunks of any length give the same gradient."""
    net = dense(units=3)
    for rule in (NodePerturbation, ActivityPerturbation, WeightPerturbation):
        whole, parts = (estimate(net, rule(12, chunk=c)) for c in (None, 3))
        assert distance(parts, whole) < TIGHT
    fresh = [
        estimate(net, WeightPerturbation(4, c, every_step=True)) for c in (None, 2)
    ]
    assert distance(*fresh) < TIGHT


def test_value_is_the_clean_loss():
    """Every rule returns Σ_t mean loss of the run without noise."""
    net = dense(examples=4)
    want = jnp.sum(losses(net, net.params, silent(net)))
    for rule in (
        NodePerturbation(),
        ActivityPerturbation(),
        WeightPerturbation(),
        WeightPerturbation(every_step=True),
    ):
        f = perturb.recurrent_value_and_grad(net.cell, net.loss, rule)
        value = jax.jit(f)(jax.random.key(0), *net.data)[0]
        assert abs(value - want) < TIGHT


def test_weight_rule_is_one_in_both_functions():
    """A weight rule on a cell is the same rule on the total loss."""
    net = dense(examples=4)
    rule = WeightPerturbation(6, 3, difference=Central())
    total = lambda p: jnp.sum(losses(net, p, silent(net)))
    want = perturb.value_and_grad(total, rule)(jax.random.key(0), net.params)
    f = perturb.recurrent_value_and_grad(net.cell, net.loss, rule)
    # 1e-3 of the loss is differenced: 13 digits of 16 are left, at best.
    chex.assert_trees_all_close(f(jax.random.key(0), *net.data), want, rtol=1e-10)


def test_noise_has_unit_covariance_and_numbers():
    """Frames are orthogonal, signs are signs; key and number alone decide."""
    key, six = jax.random.key(4), jnp.arange(6)
    for noise in (perturb.orthonormal, perturb.coordinate):
        v = noise(key, six, 6, jnp.float64)
        chex.assert_trees_all_close(v.T @ v / 6, jnp.eye(6), atol=1e-12)
    for noise in (
        perturb.normal,
        perturb.rademacher,
        perturb.sphere,
        perturb.orthonormal,
        perturb.coordinate,
    ):
        v = noise(key, six, 70, jnp.float64)
        chex.assert_trees_all_equal(noise(key, six[3:5], 70, jnp.float64), v[3:5])
        assert not jnp.array_equal(noise(jax.random.key(5), six, 70, jnp.float64), v)
        assert jnp.unique(v, axis=0).shape == v.shape
    signs = perturb.rademacher(key, jnp.arange(400), 70, jnp.float64).astype(float)
    assert bool(jnp.all(jnp.abs(signs) == 1))
    off = signs.T @ signs / 400 - jnp.eye(70)
    assert jnp.max(jnp.abs(off)) < 6 / 20  # six standard errors, also within a word
    assert jnp.max(jnp.abs(signs.mean(0))) < 6 / 20
