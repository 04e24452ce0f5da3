"""Bad input is named, degenerate input is finite or reported, everything composes."""

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
from tests.support.perturb import dense, estimate, gated, plain

RULES = [
    NodePerturbation(2),
    ActivityPerturbation(2),
    WeightPerturbation(2),
    WeightPerturbation(2, every_step=True),
]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OneSided(0.0), r"`sigma` must be above 0.*Exact\(\)"),
        (lambda: Central(0), r"`sigma` must be above 0"),
        (lambda: Central(jnp.array(0.1)), "`sigma` must be a Python number"),
        (lambda: Trace(1.5), "`decay` must be at most 1; got 1.5"),
        (lambda: NodePerturbation(0), "`num_samples`"),
        (lambda: NodePerturbation(10, 3), "`chunk` = 3 must divide `num_samples` = 10"),
        (lambda: NodePerturbation(noise="normal"), "`noise` must be a callable"),
        (lambda: WeightPerturbation(credit=None), "`credit` must be a callable"),
        (lambda: WeightPerturbation(every_step=1), "`every_step` must be True or"),
        (lambda: ActivityPerturbation(norm="layer"), "`norm` must be None or"),
        (lambda: ActivityPerturbation(scale=True), "`scale` must be a Python number"),
        (lambda: perturb.paper_code(0), "`num_units`"),
    ],
)
def test_bad_fields_are_named(make, message):
    """Strategies validate what they are given when they are made."""
    with pytest.raises(ValueError, match=message):
        make()


def test_rules_are_values():
    """Equal rules are equal, hash alike, print as written: one compilation."""
    for rule in RULES:
        again = type(rule)(**vars(rule))
        assert again == rule and hash(again) == hash(rule)
        assert repr(rule).startswith(type(rule).__name__)
        assert not jax.tree.leaves(rule)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (lambda p, x, h, n: (h, h), "must return"),
        (lambda p, x, h, n: (h + n["a"], h, {"b": h + n["a"]}), "another structure"),
        (lambda p, x, h, n: (h + n, h, h), "without the noise added"),
        (lambda p, x, h, n: (h[:1], h, h + n), "must return a state like `h0`"),
        (lambda p, x, h, n: (h, h, ()), "no nodes"),
        (
            lambda p, x, h, n: (h, h, jax.tree.map(jnp.add, {"a": h}, n)),
            "leaf by leaf",
        ),
    ],
)
def test_cells_that_are_none(cell, message):
    """What a cell gets wrong is said when it is first called."""
    net = dense()._replace(cell=cell)
    for rule in RULES[:3]:
        with pytest.raises(ValueError, match=message):
            estimate(net, rule)
    with pytest.raises(ValueError, match=message):
        perturb.unroll(cell, *net.data[:3])


def test_bad_calls_are_named():
    """Losses, parameters and rules of the wrong kind: the argument and a remedy."""
    net = dense(examples=3)
    with pytest.raises(ValueError, match="scalar or a vector"):
        estimate(net._replace(loss=lambda o, y: o - y), RULES[0])
    with pytest.raises(ValueError, match=r"3 losses.*leading axis of 3"):
        bare = dense()._replace(loss=lambda o, y: jnp.ones(3) * jnp.sum(o))
        estimate(bare, RULES[0])
    with pytest.raises(ValueError, match=r"int.*'steps'"):
        estimate(net._replace(params=net.params | {"steps": 3}), RULES[0])
    with pytest.raises(ValueError, match="`xs` has no leaves"):
        estimate(net._replace(xs=None), RULES[0])
    with pytest.raises(ValueError, match="`rule` must be"):
        perturb.recurrent_value_and_grad(net.cell, net.loss, Exact())
    with pytest.raises(ValueError, match="recurrent_value_and_grad"):
        perturb.value_and_grad(jnp.sum, NodePerturbation())
    with pytest.raises(ValueError, match="needs the steps"):
        perturb.value_and_grad(jnp.sum, RULES[3])
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"must return a scalar.*has_aux"):
        perturb.value_and_grad(lambda p: (p, p), RULES[2])(key, jnp.ones(()))


def test_no_activity_gives_no_error_signal():
    """δa = 0 with every norm (and no noise at all): gradient 0, nowhere NaN."""
    net = dense()
    nothing = lambda key, indices, size, dtype: jnp.zeros((len(indices), size), dtype)
    # Central: one-sided differences compare passes that may be rounded differently.
    fields = dict(noise=nothing, difference=Central())
    for norm in (
        None,
        perturb.per_layer_step,
        perturb.per_step,
        perturb.per_sequence,
    ):
        grads = estimate(net, ActivityPerturbation(2, **fields, norm=norm))
        chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))
    grads = estimate(net, NodePerturbation(2, **fields))
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))


@pytest.mark.parametrize("rule", RULES)
def test_a_loss_that_is_not_finite_is_reported(rule):
    """NaN in the loss comes out as value and gradient, compiled, without a crash."""
    net = dense()
    ys = net.ys.at[1].set(jnp.nan)
    f = jax.jit(perturb.recurrent_value_and_grad(net.cell, net.loss, rule))
    value, grads = f(jax.random.key(0), net.params, net.h0, net.xs, ys)
    assert jnp.isnan(value)
    assert jnp.isnan(grads["input"]).all()


def test_a_bad_example_spoils_the_batch_openly():
    """One example's NaN is in the sum over the batch, as it is with jax.grad."""
    net = dense(examples=3)
    ys = net.ys.at[0, 1].set(jnp.nan)
    f = perturb.recurrent_value_and_grad(net.cell, net.loss, NodePerturbation(2))
    assert jnp.isnan(f(jax.random.key(0), net.params, net.h0, net.xs, ys)[0])


@pytest.mark.parametrize("rule", RULES)
def test_jit_vmap_and_scan(rule):
    """The same gradients inside every transformation, for a cell of many leaves."""
    net = gated() if isinstance(rule, NodePerturbation) else dense()
    f = perturb.recurrent_value_and_grad(net.cell, net.loss, rule)
    keys = jax.random.split(jax.random.key(0), 2)
    one = lambda k: f(k, *net.data)
    want = [one(k) for k in keys]
    want = jax.tree.map(lambda *x: jnp.stack(x), *want)
    batched = jax.jit(jax.vmap(one))(keys)
    scanned = jax.lax.scan(lambda c, k: (c, one(k)), None, keys)[1]
    for got in (batched, scanned):
        # One-sided differences keep 12 digits of 16.
        chex.assert_trees_all_close(got, want, rtol=1e-9, atol=1e-9)


def test_structures_are_kept():
    """Tuples, nested dictionaries, aux, extra arguments and mixed dtypes come back."""
    params = (jnp.ones(3), {"b": jnp.ones((2, 2), jnp.float32), "c": jnp.array(2.0)})

    def loss(params, x, scale=1.0):
        a, rest = params
        value = jnp.sum(a**2) * x + jnp.sum(rest["b"]).astype(a.dtype) + rest["c"] ** 3
        return scale * value, {"x": x}

    rule = WeightPerturbation(8, difference=Exact(), noise=perturb.orthonormal)
    f = perturb.value_and_grad(loss, rule, has_aux=True)
    (value, aux), grads = jax.jit(f)(jax.random.key(0), params, 3.0, scale=2.0)
    want, exact = jax.value_and_grad(loss, has_aux=True)(params, 3.0, scale=2.0)
    chex.assert_trees_all_close((value, aux), want)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, exact)
    chex.assert_trees_all_close(grads, exact, rtol=1e-5)  # float32 has a leaf in it


def test_states_and_inputs_are_any_pytree():
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
        xs={"u": jnp.ones((4, 2)), "key": jax.random.split(jax.random.key(1), 4)},
        ys={"t": jnp.zeros((4, 2))},
    )
    for difference in (OneSided(), Central(), Exact()):
        for rule in (NodePerturbation, ActivityPerturbation, WeightPerturbation):
            grads = estimate(net, rule(2, difference=difference))
            assert grads["w"].shape == (2,) and jnp.all(jnp.isfinite(grads["w"]))


def test_unroll_runs_function_cells():
    """Zero noise of the right structure is found for cells that ask by any name."""
    net = dense()._replace(cell=plain)
    run = perturb.unroll(plain, *net.data[:3])
    want = perturb.unroll(perturb.DenseCell(), *net.data[:3])
    chex.assert_trees_all_close(run.nodes["hidden"], want.nodes.recurrent)
    chex.assert_trees_all_close(run.outputs, want.outputs)


def test_memory_does_not_grow_with_the_samples():
    """Compiled temporary bytes are those of a chunk: 20 and 2,000 samples alike."""
    net = dense(units=8)
    for rule in (NodePerturbation, ActivityPerturbation, WeightPerturbation):
        asked = []
        for samples in (20, 2000):
            f = perturb.recurrent_value_and_grad(net.cell, net.loss, rule(samples, 10))
            lowered = jax.jit(f).lower(jax.random.key(0), *net.data)
            memory = lowered.compile().memory_analysis()
            asked.append(memory.temp_size_in_bytes)
        # The numbers of the samples themselves are an array: 4 bytes each.
        assert asked[1] - asked[0] <= 4 * 2000
