"""The function of a sequence: frames, batches, chunks, transformations, dtypes."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest

from rbpjax import perturb
from rbpjax.perturb import ActivityPerturbation, NodePerturbation, WeightPerturbation
from rbpjax.perturb.difference import Central, Exact, OneSided
from tests.support.perturb import (
    COARSE,
    RULES,
    TIGHT,
    Network,
    dense,
    distance,
    estimate,
    flat,
    gated,
    gradient,
    losses,
    one_estimate,
    signs,
    silent,
    table,
)

full = pytest.mark.full


@pytest.mark.parametrize("make", [pytest.param(dense, marks=full), gated])
def test_orthonormal_frame_is_the_gradient(make):
    """A whole frame with exact derivatives has no variance: BPTT, any cell."""
    net = make()
    taps = flat(silent(net)).size
    for rule in (
        WeightPerturbation(num_samples=flat(net.params).size),
        NodePerturbation(num_samples=taps, credit=perturb.credit.total),
        NodePerturbation(num_samples=taps, credit=perturb.credit.causal),
    ):
        fields = dict(difference=Exact(), noise=perturb.noise.orthonormal)
        rule = type(rule)(num_samples=rule.num_samples, **fields, credit=rule.credit)
        assert distance(estimate(net, rule), gradient(net)) < TIGHT


@pytest.mark.parametrize(
    "rule", [NodePerturbation, pytest.param(ActivityPerturbation, marks=full)]
)
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
        one = (a[:, i] for a in (net.inputs, net.targets))
        single = net._replace(
            h0=net.h0[i], **dict(zip(("inputs", "targets"), one, strict=True))
        )
        alone.append(estimate(single, rule(noise=table(rows[i : i + 1]), **fields)))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *alone)
    assert distance(batch, mean) < TIGHT


@pytest.mark.parametrize(
    "rule",
    [
        NodePerturbation,
        pytest.param(ActivityPerturbation, marks=full),
        pytest.param(WeightPerturbation, marks=full),
        partial(WeightPerturbation, every_step=True),
    ],
)
def test_chunks_change_nothing(rule):
    """Samples are numbered: chunks of any length give the same gradient."""
    net = dense(units=3)
    fields = dict(num_samples=12, difference=COARSE)
    whole, parts = (estimate(net, rule(**fields, chunk=c)) for c in (12, 3))
    assert distance(parts, whole) < TIGHT


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
        static = net.cell, net.loss, rule
        value = one_estimate(static, jax.random.key(0), net.data)[0]
        assert abs(value - want) < TIGHT


@pytest.mark.parametrize("rule", RULES)
def test_a_loss_that_is_not_finite_is_reported(rule):
    """NaN in the loss comes out as value and gradient, compiled, without a crash."""
    net = dense()
    targets = net.targets.at[1].set(jnp.nan)
    data = net.params, net.inputs, net.h0, targets
    static = net.cell, net.loss, rule
    value, grads = one_estimate(static, jax.random.key(0), data)
    assert jnp.isnan(value)
    assert jnp.isnan(grads["input"]).all()


def test_a_bad_example_spoils_the_batch_openly():
    """One example's NaN is in the sum over the batch, as it is with jax.grad."""
    net = dense(examples=3)
    targets = net.targets.at[0, 1].set(jnp.nan)
    f = perturb.recurrent_value_and_grad(
        net.cell, net.loss, NodePerturbation(num_samples=2)
    )
    data = net.params, net.inputs, net.h0, targets
    assert jnp.isnan(jax.jit(f)(jax.random.key(0), *data)[0])


@pytest.mark.parametrize(
    "rule",
    [
        RULES[0],
        pytest.param(RULES[1], marks=full),
        pytest.param(RULES[2], marks=full),
        RULES[3],
    ],
)
def test_jit_vmap_and_scan(rule):
    """The same gradients inside every transformation, for a cell of many leaves."""
    net = gated() if isinstance(rule, NodePerturbation) else dense()
    f = perturb.recurrent_value_and_grad(net.cell, net.loss, rule)
    keys = jax.random.split(jax.random.key(0), 2)
    one = lambda k: f(k, *net.data)
    compiled = jax.jit(one)
    want = jax.tree.map(lambda *x: jnp.stack(x), *map(compiled, keys))
    batched = jax.jit(jax.vmap(one))(keys)
    scan = jax.jit(lambda keys: jax.lax.scan(lambda c, k: (c, one(k)), None, keys)[1])
    for got in (batched, scan(keys)):
        # One-sided differences keep 12 digits of 16.
        chex.assert_trees_all_close(got, want, rtol=1e-9, atol=1e-9)


ONCE = {
    (NodePerturbation, OneSided()),
    (ActivityPerturbation, Central()),
    (WeightPerturbation, Exact()),
}


@pytest.mark.parametrize(
    ("rule", "difference"),
    [
        pytest.param(rule, difference, marks=() if (rule, difference) in ONCE else full)
        for rule in (NodePerturbation, ActivityPerturbation, WeightPerturbation)
        for difference in (OneSided(), Central(), Exact())
    ],
)
def test_states_and_inputs_are_any_pytree(rule, difference):
    """State, inputs, targets and nodes nested, a counter and a key among them."""

    def cell(params, x, h, noise):
        bit = jax.random.bernoulli(x["key"]).astype(float)
        a = params["w"] * h["v"] + x["u"] + bit + noise["a"]
        return {"v": jnp.tanh(a), "n": h["n"] + 1}, (a, h["n"]), {"a": a}

    net = dense()._replace(
        cell=cell,
        loss=lambda out, y: jnp.sum((out[0] - y["t"]) ** 2),
        params={"w": jnp.array([0.5, -0.5])},
        h0={"v": jnp.ones(2), "n": jnp.array(0)},
        inputs={"u": jnp.ones((4, 2)), "key": jax.random.split(jax.random.key(1), 4)},
        targets={"t": jnp.zeros((4, 2))},
    )
    grads = estimate(net, rule(num_samples=2, difference=difference))
    assert grads["w"].shape == (2,) and jnp.all(jnp.isfinite(grads["w"]))


@pytest.mark.parametrize(
    "rule",
    [
        NodePerturbation,
        pytest.param(ActivityPerturbation, marks=full),
        WeightPerturbation,
    ],
)
def test_memory_does_not_grow_with_the_samples(rule):
    """Compiled temporary bytes are those of a chunk: 20 and 2,000 samples alike."""
    net = dense(units=8)
    asked = []
    for samples in (20, 2000):
        f = perturb.recurrent_value_and_grad(
            net.cell, net.loss, rule(num_samples=samples, chunk=10)
        )
        lowered = jax.jit(f).lower(jax.random.key(0), *net.data)
        memory = lowered.compile().memory_analysis()
        asked.append(memory.temp_size_in_bytes)
    # The numbers of the samples themselves are an array: 4 bytes each.
    assert asked[1] - asked[0] <= 4 * 2000


@pytest.mark.parametrize(
    "rule", [NodePerturbation, pytest.param(ActivityPerturbation, marks=full)]
)
def test_float32_keeps_three_digits(rule):
    """Defaults in float32: rounding stays below the noise of any sample, dtype kept."""
    net = dense(units=50, outputs=3, inputs=2, steps=20)
    small = jax.tree.map(lambda x: x.astype(jnp.float32), net.data)
    weights = jnp.array([1.0, 2.0, 1.0], jnp.float32)
    losses = {
        jnp.float32: lambda o, y: (o - y) ** 2 @ weights,
        jnp.float64: lambda o, y: (o - y) ** 2 @ weights.astype(jnp.float64),
    }

    def error(rule):
        got, want = (
            estimate(Network(net.cell, losses[dtype], *data), rule)
            for dtype, data in ((jnp.float32, small), (jnp.float64, net.data))
        )
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))
        return distance(jax.tree.map(lambda x: x.astype(jnp.float64), got), want)

    # Rounding of a loss of order one, 6e-8, over σ = 1e-4 and √T of them.
    assert error(rule(num_samples=4)) < 1e-2
    if rule is NodePerturbation:
        rough = NodePerturbation(num_samples=4, difference=OneSided(sigma=1e-6))
        assert error(rough) > 1e-3
