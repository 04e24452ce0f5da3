"""Samples over devices, and batches over devices: the estimate of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rbpjax import perturb
from tests.support.problems import assert_close, rows

vma = pytest.mark.parametrize("check_vma", rows([True, False], [True]))
CELL = perturb.DenseCell()
RULES = {
    "weight": perturb.WeightPerturbation,
    "node": perturb.NodePerturbation,
    "activity": perturb.ActivityPerturbation,
}


def mesh():
    return jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))


def data():
    params = CELL.init(jax.random.key(0), inputs=2, units=4, outputs=1)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    k1, k2 = jax.random.split(jax.random.key(1))
    inputs, targets = jax.random.normal(k1, (5, 8, 2)), jax.random.normal(k2, (5, 8, 1))
    return params, inputs, jnp.zeros((8, 4)), targets


def estimate(rule):
    loss = lambda out, target: jnp.mean((out - target) ** 2, axis=-1)
    return perturb.recurrent_value_and_grad(CELL, loss, rule)


@pytest.mark.full
@vma
@pytest.mark.parametrize("chunk", rows([None, 2], [2]))
@pytest.mark.parametrize("name", rows(RULES.keys(), ["node"]))
def test_samples_over_devices(name, chunk, check_vma):
    """The same samples, each on one of eight devices."""
    key = jax.random.key(2)
    make = lambda **kw: RULES[name](num_samples=32, chunk=chunk, **kw)
    want = jax.jit(estimate(make()))(key, *data())[1]
    mapped = jax.shard_map(
        lambda *args: estimate(make(axis_name="d"))(key, *args)[1],
        mesh=mesh(),
        in_specs=P(),
        out_specs=P(),
        check_vma=check_vma,
    )
    assert_close(jax.jit(mapped)(*data()), want, 1e-12)


@pytest.mark.full
@pytest.mark.parametrize("name", RULES)
def test_a_batch_over_devices(name):
    """Under jit, examples of a batch on eight devices."""
    # A quotient of differences would magnify rounding by 1/σ.
    exact = perturb.difference.Exact()
    f = estimate(RULES[name](num_samples=16, chunk=4, difference=exact))
    params, inputs, h0, targets = data()
    want = jax.jit(f)(jax.random.key(2), params, inputs, h0, targets)
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh(), P(*spec)))
    sharded = put(inputs, None, "d"), put(h0, "d"), put(targets, None, "d")
    got = jax.jit(f)(jax.random.key(2), put(params), *sharded)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
    assert_close(jax.device_get(got[1]), want[1], 1e-12)


def test_what_cannot_be_shared_out_is_refused():
    f = estimate(perturb.NodePerturbation(num_samples=12, axis_name="d"))
    call = lambda *args: f(jax.random.key(0), *args)[1]
    mapped = jax.shard_map(call, mesh=mesh(), in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match="must be a multiple of the 8 devices"):
        jax.jit(mapped)(*data())
    with pytest.raises(ValueError, match=r"inside `jax\.shard_map`"):
        call(*data())
    with pytest.raises(ValueError, match="axis_name"):
        perturb.NodePerturbation(axis_name=3)


STREAMED = {
    "pes": perturb.pes,
    "nres": perturb.nres,
    "truncated_es": perturb.truncated_es,
}


def spread_out(f, check_vma, in_specs=P(), out_specs=P()):
    mapped = jax.shard_map(
        f, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
    )
    return jax.jit(mapped)


@vma
@pytest.mark.parametrize("name", rows(STREAMED.keys(), ["pes"]))
def test_pairs_over_devices(name, check_vma):
    """The same pairs, two on each of eight devices: every window, in and out of it.

    The step has a loop of its own that starts from an input, so that its types hold
    only if inputs, too, are marked as differing between devices.
    """
    turn = lambda w, x: jax.lax.fori_loop(0, 2, lambda _, a: jnp.tanh(w @ a), x)
    f = lambda w, x, h: turn(w["a"], x) + w["b"] * h
    loss = lambda w, h, y: jnp.sum((h - y) ** 2) + w["b"][0] * h[1]
    w = {"a": jnp.array([[0.5, 0.2], [-0.3, 0.1]]), "b": jnp.array([0.7, -1.1])}
    xs, ys = jax.random.normal(jax.random.key(1), (2, 3, 4, 2))
    h0 = jnp.array([0.3, -0.2])
    # A coarse σ: the quotient of differences magnifies rounding by 1/σ = 10.
    make = lambda **kw: STREAMED[name](f, loss, num_samples=16, sigma=0.1, **kw)
    one, many = make(), make(axis_name="d")

    def window(est, w, carry, key, x, y):
        return est.step(w, carry, x, y, est.noise(key, carry))

    keys = jax.random.split(jax.random.key(0), 3)
    ahead = P() if name == "truncated_es" else P("d")
    specs = perturb.EvolutionCarry(ahead, ahead, P("d"), P(), P())
    if name == "truncated_es":
        specs = specs._replace(behind=())
    start = spread_out(many.init, check_vma, out_specs=specs)
    step = spread_out(
        lambda *args: window(many, *args),
        check_vma,
        in_specs=(P(), specs, P(), P(), P()),
        out_specs=(specs, P()),
    )
    got, want = start(w, h0), one.init(w, h0)
    for key, x, y in zip(keys, xs, ys, strict=True):
        got, out = step(w, got, key, x, y)
        want, expected = jax.jit(lambda *args: window(one, *args))(w, want, key, x, y)
        assert_close(out, expected, 1e-12)
        assert_close((got.ahead, got.credit), (want.ahead, want.credit), 1e-12)


@pytest.mark.full
@vma
@pytest.mark.parametrize("rank", [None, 1])
def test_seeded_passes_over_devices(rank, check_vma):
    """The gradient, and the step of descent, of one device with all samples."""
    exact = perturb.difference.Exact()
    make = lambda **kw: perturb.SeededPerturbation(
        num_samples=16, rank=rank, difference=exact, **kw
    )
    turn = lambda w, x: jax.lax.fori_loop(0, 2, lambda _, a: jnp.tanh(w @ a), x)
    loss = lambda w, x: jnp.sum(turn(w, x) ** 2)
    w, x, key = jnp.array([[0.5, 0.2], [-0.3, 0.1]]), jnp.ones(2), jax.random.key(0)
    for f, arguments in (
        (perturb.value_and_grad, (w, x)),
        (perturb.seeded_descent, (w, 0.1, x)),
    ):
        want = jax.jit(f(loss, make()))(key, *arguments)
        got = spread_out(f(loss, make(axis_name="d")), check_vma)(key, *arguments)
        assert_close(got, want, 1e-12)
    inner = lambda k: perturb.value_and_grad(loss, make(axis_name="e"))(k, w, x)
    with pytest.raises(ValueError, match="`axis_name` = 'e' is no axis here"):
        inner(key)


def test_pairs_that_cannot_be_shared_out_are_refused():
    est = perturb.pes(lambda w, x, h: w * h, lambda w, h, y: h, num_samples=12)
    divided = perturb.pes(
        lambda w, x, h: w * h, lambda w, h, y: h, num_samples=12, axis_name="d"
    )
    w = jnp.array(0.5)
    with pytest.raises(ValueError, match="must be a multiple of the 8 devices"):
        spread_out(divided.init, True, out_specs=P("d"))(w, w)
    for call in (
        lambda: divided.init(w, w),
        lambda: divided.noise(jax.random.key(0), est.init(w, w)),
    ):
        with pytest.raises(ValueError, match=r"inside `jax\.shard_map`"):
            call()
    with pytest.raises(ValueError, match="axis_name"):
        perturb.nres(lambda w, x, h: w * h, lambda w, h, y: h, axis_name=3)


@pytest.mark.full
@vma
@pytest.mark.parametrize("name", rows(STREAMED.keys(), ["pes"]))
def test_sequences_over_devices(name, check_vma):
    """Eight sequences, each on a device, in a loop over windows: as under vmap."""
    f, loss = lambda w, x, h: jnp.tanh(w @ h + x), lambda w, h, y: jnp.sum(h**2)
    est, w = (
        STREAMED[name](f, loss, num_samples=2),
        jnp.array([[0.5, 0.2], [-0.3, 0.1]]),
    )

    def one(key, x):
        body = lambda carry, k: est.step(w, carry, x, None, est.noise(k, carry))
        keys = jax.random.split(key, 3)
        return jax.lax.scan(body, est.init(w, 0 * x[0]), keys)[1].grads

    keys, xs = jax.random.split(jax.random.key(0), 8), data()[1].swapaxes(0, 1)
    across = jax.shard_map(
        jax.vmap(one),
        mesh=mesh(),
        in_specs=P("d"),
        out_specs=P("d"),
        check_vma=check_vma,
    )
    # A quotient of differences of 1e-6 magnifies rounding.
    assert_close(jax.jit(across)(keys, xs), jax.jit(jax.vmap(one))(keys, xs), 1e-8)


@pytest.mark.full
@vma
def test_seeded_directions_on_devices(check_vma):
    """A key a device: the estimates of one after another."""
    exact = perturb.difference.Exact()
    rule = perturb.SeededPerturbation(num_samples=3, rank=1, difference=exact)
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w))
    f = perturb.value_and_grad(loss, rule)
    w, xs = jnp.array([[0.5, 0.2], [-0.3, 0.1]]), data()[1].swapaxes(0, 1)
    many = jax.vmap(lambda key, x: f(key, w, x)[1])
    keys = jax.random.split(jax.random.key(0), 8)
    across = jax.shard_map(
        many, mesh=mesh(), in_specs=P("d"), out_specs=P("d"), check_vma=check_vma
    )
    assert_close(jax.jit(across)(keys, xs), jax.jit(many)(keys, xs), 1e-12)
