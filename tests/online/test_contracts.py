"""What every estimator promises: units, precision, bad sequences, and whose carry."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import online
from rbpjax.online import combine
from tests.online.test_estimator import STREAMING, each, suited
from tests.support.online import enumerate_runs, exact_run, mean, run, vanilla

TIGHT = dict(rtol=1e-12, atol=1e-12)


def leaky(p, x, h):
    """Units that saturate: ∂f/∂θ is 0.1 (1 - tanh²) ĥ, as small as x makes it."""
    return 0.9 * h + 0.1 * jnp.tanh(p @ h + x)


def distance_from_one(p, h, y):
    return jnp.sum((h - 1) ** 2)


@pytest.mark.parametrize("make", [online.uoro, online.nobacktrack])
def test_the_noise_of_an_estimate_does_not_depend_on_its_size(make):
    """Relative error of one estimate, gradients from 1e-2 to 1e-12: below 3.

    With a constant of 1e-7 in the scales it was 282 at x = 12 and 112,000 at x = 15.
    """
    w = jax.random.normal(jax.random.key(0), (4, 4))

    def last(make, x, key):
        est = make(leaky, distance_from_one)
        carry = est.init(w, jnp.zeros(4))

        def body(carry, key):
            noise = est.noise(key, carry)
            carry, out = est.step(w, carry, jnp.full(4, x), None, noise)
            return carry, out.grads

        return jax.lax.scan(body, carry, jax.random.split(key, 30))[1][-1]

    keys = jax.random.split(jax.random.key(1), 100)
    many = jax.jit(
        jax.vmap(jax.vmap(lambda x, k: last(make, x, k), (None, 0)), (0, None))
    )
    xs = jnp.array([3.0, 12.0, 15.0])
    exact = jax.jit(jax.vmap(lambda x: last(online.rtrl, x, keys[0])))(xs)
    square = jnp.sum((many(xs, keys) - exact[:, None]) ** 2, (2, 3))
    size = jnp.sum(exact**2, (1, 2))
    error = jnp.sqrt(jnp.mean(square, 1) / size)
    assert size[-1] < 1e-20
    assert np.all(error < 3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@each("uoro", names=("rtrl", "uoro", "nobacktrack", "kf_rtrl", "snap1", "rflo"))
def test_other_units_scale_the_estimate_and_nothing_else(name, dtype):
    """Parameters, states and losses in units of 4ᵏ, f adjusted: the same, scaled.

    To rounding: powers of two are exact, the order of sums is the compiler's. Those of
    the cell's kernel are not scaled, where an estimator needs a cell.
    """
    system = vanilla(n=3, steps=5)
    params, h0, xs, ys = jax.tree.map(lambda x: x.astype(dtype), system[2:])
    on_cell = name in ("kf_rtrl", "snap1", "rflo")

    @jax.jit
    def grads(a, b, c):
        """In units a of the parameters, b of the state and c of the loss."""
        scaled = lambda by, tree: jax.tree.map(lambda p: p * by, tree)
        f = lambda p, x, h: b * system.f(scaled(1 / a, p), x, h / b)
        cost = lambda p, h, y: c * jnp.sum((h / b - y[0]) ** 2)
        if on_cell:
            kernel, b = system.f.kernel, jnp.ones((), dtype)
            f = online.PreactivationCell(
                kernel=lambda p: kernel(scaled(1 / a, p)),
                features=system.f.features,
                activate=system.f.activate,
            )
        est = STREAMING[name](f, cost)
        moved = system._replace(
            f=f, loss=cost, params=scaled(a, params), h0=scaled(b, h0), xs=xs, ys=ys
        )
        _, out = run(est, moved)
        return jax.tree.map(lambda g: g * (a / c), out.grads)

    call = lambda *units: grads(*(jnp.asarray(u, dtype) for u in units))
    base, small = call(1.0, 1.0, 1.0), 4.0**-30
    eps = float(jnp.finfo(dtype).eps)
    for units in ((small, 1.0, 1.0), (1.0, small, 1.0), (1.0, 1.0, 1 / small)):
        for got, want in zip(*map(jax.tree.leaves, (call(*units), base)), strict=True):
            np.testing.assert_allclose(
                got, want, rtol=0, atol=1e3 * eps * abs(want).max()
            )


PAIRS = [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")]


@pytest.mark.parametrize(("of_state", "of_params"), PAIRS)
@each("uoro", "kf_rtrl", "rtrl", "nobacktrack")
def test_states_and_parameters_may_differ_in_dtype(name, of_state, of_params):
    """Scanned: every part of the carry keeps its dtype, gradients are finite."""
    system = suited(name, vanilla)(n=2, steps=3)
    cast = lambda p: jax.tree.map(lambda a: a.astype(of_state), p)
    cell = dataclasses.replace(system.f, kernel=lambda p: system.f.kernel(cast(p)))
    if name == "diagonal_rtrl":
        cell = dataclasses.replace(cell, own=lambda p: system.f.own(cast(p)))
    last = lambda h: jax.tree.leaves(h)[-1]
    loss = lambda p, h, y: jnp.sum((last(h) - y[0]).astype(jnp.float32) ** 2)
    low = system._replace(
        f=cell,
        loss=loss,
        params=jax.tree.map(lambda a: (0.3 * a).astype(of_params), system.params),
        **{k: cast(getattr(system, k)) for k in ("h0", "xs", "ys")},
    )
    with jax.numpy_dtype_promotion("standard"):
        _, out = run(STREAMING[name](cell, loss), low)
    chex.assert_tree_all_finite(out.grads)
    assert all(g.dtype == of_params for g in jax.tree.leaves(out.grads))


@pytest.mark.parametrize("name", ["uoro", "nobacktrack", "kf_rtrl", "renormalize"])
def test_second_derivatives_at_the_first_step(name):
    """∂/∂h0 of the gradient at h0 = 0, where F is 0 and its derivative is not.

    The mean over all signs is the derivative of the exact gradient.
    """
    system = vanilla(n=2, steps=2)
    cell = online.PreactivationCell(
        kernel=lambda p: p["W"][None],
        features=lambda x, h: h,
        activate=lambda z, h: jnp.tanh(z[0]) + 0.5 * h,
    )
    loss = lambda p, h, y: jnp.sum((h - 1) ** 2)

    def slope(make):
        est = make(cell, loss)
        at = lambda h0: system._replace(f=cell, loss=loss, h0=h0)
        whole = lambda h0: enumerate_runs(est, at(h0))[1].grads["W"]
        return jax.jacfwd(whole)(jnp.zeros(2))

    exact = jax.jacfwd(
        lambda h0: run(
            online.rtrl(cell, loss), system._replace(f=cell, loss=loss, h0=h0)
        )[1].grads["W"]
    )(jnp.zeros(2))
    assert jnp.max(jnp.abs(exact)) > 0.1
    # Single patterns are 2¹⁰ times larger: the share of a factor without a partner.
    got = mean(slope(STREAMING[name]))
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-9)


ORDERS = {
    "renormalize(per_sequence)": lambda e: combine.renormalize(
        combine.per_sequence(e), 2.0
    ),
    "per_sequence(renormalize)": lambda e: combine.per_sequence(
        combine.renormalize(e, 2.0)
    ),
    "renormalize(average(per_sequence))": lambda e: combine.renormalize(
        combine.average(combine.per_sequence(e), 2), 2.0
    ),
    "per_sequence(average)": lambda e: combine.per_sequence(combine.average(e, 2)),
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_bad_sequence_stays_by_itself(order):
    """NaN in one of two: the other's carry is the same bits; a reset heals."""
    system = vanilla(n=2, steps=2)
    est = ORDERS[order](online.uoro(system.f, system.loss))
    h0 = jnp.stack([system.h0, -system.h0])
    start = est.init(system.params, h0)
    noise = est.noise(jax.random.key(0), start)
    x = jnp.stack([system.xs[0]] * 2)
    y = jnp.stack([system.ys[0]] * 2)
    step = jax.jit(est.step)
    clean, _ = step(system.params, start, x, y, noise)
    spoilt, _ = step(system.params, start, x.at[0, 0].set(jnp.nan), y, noise)
    lead = 1 if "average(per_sequence)" in order else 0
    pick = lambda carry, i: (
        carry.h[i],
        jax.tree.map(lambda a: jnp.take(a, i, lead), carry.influence),
    )
    chex.assert_trees_all_equal(pick(spoilt, 1), pick(clean, 1))
    assert not np.isfinite(pick(spoilt, 0)[0]).all()
    healed = combine.reset(spoilt, start, jnp.array([True, False]))
    chex.assert_trees_all_equal(pick(healed, 0), pick(start, 0))
    chex.assert_trees_all_equal(pick(healed, 1), pick(clean, 1))


def test_one_bad_observation_is_one_lost_step_of_the_filter():
    """Kalman: a NaN target loses its direction; the metric stays what it was."""
    system = vanilla(n=2, steps=4)
    est = online.kalman_nobacktrack(system.f, system.loss, decay=0.1)
    bad = system._replace(ys=system.ys.at[1].set(jnp.nan))
    carries, out = run(est, bad)
    assert np.isnan(out.grads["C"][1]).all()
    chex.assert_tree_all_finite(carries.metric)
    chex.assert_tree_all_finite(jax.tree.map(lambda g: g[2:], out.grads))
    assert carries.metric.params.count.tolist() == [1, 1, 2, 3]


def wrong_uses():
    """Name → a call, and the words that its error must have."""
    system = vanilla(n=2, steps=2)
    args = system.f, system.loss
    uoro, rtrl = online.uoro(*args), online.rtrl(*args)
    many, copies = combine.per_sequence(uoro), combine.average(uoro, 2)
    h0 = jnp.stack([system.h0] * 2)
    key, params = jax.random.key(0), system.params
    x, y = system.xs[0], system.ys[0]
    carry, batch = uoro.init(params, system.h0), many.init(params, h0)
    both = combine.average(many, 2).init(params, h0)
    signs = jnp.ones(2)
    step = lambda carry, noise: uoro.step(params, carry, x, y, noise)
    ended = jnp.array([True, False])
    rows = {
        "lost": lambda p: jnp.concatenate([p["W"][:, :1], p["W"]], 1),
        "twice": lambda p: [p["W"], p["W"][:, :1].T],
    }
    two = {"W": jnp.ones((3, 3)), "b": jnp.ones(3)}
    metric = lambda name: online.scale_by_quasi_diagonal(0.1, rows[name]).init(two)
    whole = online.bptt(*args)
    at = whole.init(params, system.h0)
    return {
        "carry of another estimator": (
            lambda: step(rtrl.init(params, system.h0), signs),
            "`carry` must have the structure.*this estimator's `init`",
        ),
        "carry of other parameters": (
            lambda: step(uoro.init(params | {"W": jnp.ones((3, 3))}, system.h0), signs),
            "`carry` must have.*float64\\[3,3\\]",
        ),
        "a state as carry": (
            lambda: step(system.h0, signs),
            "`carry` must be the Carry",
        ),
        "noise of too many signs": (
            lambda: step(carry, jnp.ones(3)),
            r"`noise` must have.*\(2,\).*got \(3,\)",
        ),
        "no noise": (lambda: step(carry, None), "`noise` must have"),
        "a key as noise": (lambda: step(carry, key), "`noise` must have"),
        "an integer as key": (
            lambda: uoro.noise(0, carry),
            "`key` must be one PRNG key.*0",
        ),
        "no key": (lambda: uoro.noise(None, carry), "`key` must be one PRNG key"),
        "swapped": (lambda: uoro.noise(carry, key), "`key` must be one PRNG key"),
        "several keys": (
            lambda: uoro.noise(jax.random.split(key), carry),
            "`key` must be one PRNG key.*vmap",
        ),
        "rows that lose b": (
            lambda: metric("lost"),
            r"`rows\(params\)`.*\['W'\].*2 times",
        ),
        "rows that use W twice": (lambda: metric("twice"), r"`rows\(params\)` must"),
        "reset of one system by a vector": (
            lambda: combine.reset(carry, carry, ended),
            "`ended`.*asks for 1 axes of sequences.*per_sequence",
        ),
        "reset of copies by a vector": (
            lambda: combine.reset(*2 * (copies.init(params, system.h0),), ended),
            "`ended`.*'copies'",
        ),
        "reset with a bool too many": (
            lambda: combine.reset(batch, batch, jnp.array([True, False, True])),
            "`ended` must have one bool for each sequence.*\\(3,\\)",
        ),
        "reset by numbers": (
            lambda: combine.reset(batch, batch, jnp.array([1, 0])),
            "`ended` must be bools",
        ),
        "reset of a scalar by a vector": (
            lambda: combine.reset(jnp.array(1.0), jnp.array(0.0), ended),
            "`ended` must have one bool",
        ),
        "reset to something else": (
            lambda: combine.reset(batch, both, ended),
            "`fresh` must have",
        ),
        "no batch": (
            lambda: many.init(params, jnp.array(0.0)),
            "`h0` must have one leading axis",
        ),
        "batches of two lengths": (
            lambda: many.step(
                params, batch, x[None], jnp.stack([y] * 2), jnp.ones((2, 2))
            ),
            "`h`, `x`, `y` must have one leading axis",
        ),
        "vector loss of bptt": (
            lambda: online.bptt(system.f, lambda p, h, y: h).step(
                params, at, system.xs, system.ys, ()
            ),
            "`loss.*floating-point scalar",
        ),
        "loss and aux of bptt": (
            lambda: online.bptt(system.f, lambda p, h, y: (0.0, h)).step(
                params, at, system.xs, system.ys, ()
            ),
            "auxiliary",
        ),
        "no steps": (
            lambda: whole.step(params, at, system.xs[:0], system.ys[:0], ()),
            "`x` and `y`.*at least one step",
        ),
        "no inputs": (
            lambda: whole.step(params, at, None, None, ()),
            "`x` and `y` must be sequences",
        ),
        "integer loss": (
            lambda: online.uoro(system.f, lambda p, h, y: jnp.array(1)).step(
                params, carry, x, y, signs
            ),
            "floating-point scalar",
        ),
        "row norms of another shape": (
            lambda: online.nobacktrack(*args, row_norms=lambda p, x, h: h[0]).step(
                params, carry, x, y, signs
            ),
            "`row_norms`' output",
        ),
    }


def test_wrong_uses_are_named():
    """Every one of them: a ValueError that names the argument, what came, and why."""
    unsaid = []
    for name, (call, words) in wrong_uses().items():
        try:
            call()
        except ValueError as error:
            if re.search(words, str(error)):
                continue
            unsaid.append((name, str(error)))
        else:
            unsaid.append((name, "no error"))
    assert not unsaid


def test_reset_finds_the_sequences_of_copies():
    """average(per_sequence): as many copies as sequences, and yet not mistaken."""
    system = vanilla(n=2, steps=2)
    est = combine.average(combine.per_sequence(online.uoro(system.f, system.loss)), 2)
    fresh = est.init(system.params, jnp.stack([system.h0] * 2))
    rng = np.random.default_rng(0)
    carry = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), fresh)
    got = combine.reset(carry, fresh, jnp.array([False, True]))
    v, old = got.influence.v, carry.influence.v
    chex.assert_trees_all_equal(v[:, 0], old[:, 0])
    assert np.all(v[:, 1] == 0)
    chex.assert_trees_all_equal(got.h[0], carry.h[0])


def test_an_average_of_what_has_no_noise_is_itself():
    """Also of bptt, whose carry is the state alone."""
    system = vanilla(n=2, steps=3)
    one = online.bptt(system.f, system.loss)
    many = combine.average(one, 3)
    at = many.init(system.params, system.h0)
    _, got = many.step(system.params, at, system.xs, system.ys, ())
    at = one.init(system.params, system.h0)
    _, want = one.step(system.params, at, system.xs, system.ys, ())
    chex.assert_trees_all_close(got, want, **TIGHT)


@each("uoro", "rtrl")
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(name, check_vma):
    """One sequence a device, parameters shared: each device's own exact run."""
    system = suited(name, vanilla)(n=2, steps=3)
    est = STREAMING[name](system.f, system.loss)
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    alone = run(est, system)[1].grads

    def device(h0, xs, ys):
        h0 = jax.tree.map(lambda h: h[0], h0)
        _, out = run(est, system._replace(h0=h0, xs=xs[0], ys=ys[0]))
        return jax.tree.map(lambda g: g[None], out.grads)

    mapped = jax.shard_map(
        device, mesh=mesh, in_specs=spec("i"), out_specs=spec("i"), check_vma=check_vma
    )
    h0 = jax.tree.map(lambda h: h[None], system.h0)
    got = jax.jit(mapped)(h0, system.xs[None], system.ys[None])
    got = jax.tree.map(lambda g: g[0], got)
    chex.assert_trees_all_close(got, alone, rtol=1e-10, atol=1e-12)
    exact_run(system)


def test_the_filter_in_other_units_of_the_loss():
    """Kalman: losses in units of 4ᵏ, the damping in their squares: 1/4ᵏ of the same."""
    system = vanilla(n=2, steps=4)

    def grads(c):
        loss = lambda p, h, y: c * system.loss(p, h, y)
        est = online.kalman_nobacktrack(
            system.f, loss, decay=0.1, damping=1e-3 * c**2, include_current=True
        )
        _, out = run(est, system._replace(loss=loss))
        return jax.tree.map(lambda g: c * g, out.grads)

    for c in (4.0**15, 4.0**-15):
        chex.assert_trees_all_close(grads(c), grads(1.0), rtol=1e-9, atol=1e-9)
