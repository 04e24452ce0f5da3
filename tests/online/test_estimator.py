"""What every estimator keeps: types, transformations, memory, errors."""

import chex
import jax
import jax.numpy as jnp
import pytest

import rbpjax.online
from rbpjax import online
from tests.support.online import lstm, run, vanilla

TIGHT = dict(rtol=1e-12, atol=1e-12)

# A new estimator is one row, and is then tested by everything here.
STREAMING = {
    "rtrl": online.rtrl,
    "uoro": online.uoro,
    "nobacktrack": online.nobacktrack,
    "kalman_nobacktrack": lambda f, loss: online.kalman_nobacktrack(f, loss, decay=0.1),
    "kf_rtrl": online.kf_rtrl,
    "snap1": online.snap1,
    "rflo": online.rflo,
    "average": lambda f, loss: online.average(online.uoro(f, loss), 3),
    "renormalize": lambda f, loss: online.renormalize(online.uoro(f, loss), 5.0),
}
every = pytest.mark.parametrize("name", STREAMING)


def first_step(est, system):
    carry = est.init(system.params, system.h0)
    noise = est.noise(jax.random.key(0), carry)
    return carry, (system.params, carry, system.xs[0], system.ys[0], noise)


@every
def test_jit_scan_and_vmap_agree(name):
    """A jitted scan over a batch of noise equals steps one by one."""
    system = lstm(n=2, steps=3)
    est = STREAMING[name](system.f, system.loss)
    carry = est.init(system.params, system.h0)
    keys = jax.random.split(jax.random.key(1), (2, 3))
    noise = jax.vmap(jax.vmap(est.noise, (0, None)), (0, None))(keys, carry)
    batched = jax.vmap(lambda n: run(est, system, n), axis_size=2)
    _, out = batched(noise)
    step = jax.jit(est.step)
    for t in range(3):
        signs = jax.tree.map(lambda n, t=t: n[1, t], noise)
        carry, single = step(system.params, carry, system.xs[t], system.ys[t], signs)
        got = jax.tree.map(lambda x, t=t: x[1, t], out)
        chex.assert_trees_all_close(got, single, rtol=1e-10, atol=1e-12)


@every
def test_types_are_kept_and_nothing_is_traced_twice(name):
    """Carry and gradients keep structure, shapes, dtypes (here float32); one trace."""
    system = lstm(n=2, steps=3)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), system[2:])
    est = STREAMING[name](system.f, system.loss)
    carry, inputs = first_step(est, system._make((*system[:2], *single)))
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(est.step, n=1))
    new, out = step(*inputs)
    step(inputs[0], new, *inputs[2:])
    chex.assert_trees_all_equal_shapes_and_dtypes(new, carry)
    chex.assert_trees_all_equal_shapes_and_dtypes(out.grads, single[0])
    assert out.loss.dtype == jnp.float32


@every
def test_memory_does_not_grow_with_the_sequence(name):
    """Compiled temporary memory of 100 and of 100,000 steps: the same bytes."""
    system = vanilla(n=4)
    est = STREAMING[name](system.f, system.loss)
    carry = est.init(system.params, system.h0)

    def total(xs, ys):
        def body(state, xy):
            carry, grads, key = state
            key, signs = jax.random.split(key)
            noise = est.noise(signs, carry)
            carry, out = est.step(system.params, carry, *xy, noise)
            return (carry, jax.tree.map(jnp.add, grads, out.grads), key), None

        zeros = jax.tree.map(jnp.zeros_like, system.params)
        return jax.lax.scan(body, (carry, zeros, jax.random.key(0)), (xs, ys))[0][1]

    def temporary(steps):
        shape = jax.ShapeDtypeStruct((steps, 2), jnp.float64)
        compiled = jax.jit(total).lower(shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(100) == temporary(100_000) > 0


@every
def test_dead_network_gives_zeros_not_nans(name):
    """Zero influence (J = 0, F = 0) and zero loss gradient stay finite."""
    system = vanilla(n=2, steps=6)
    kernel = lambda p: 0.0 * system.f.kernel(p)
    dead = online.PreactivationCell(kernel, system.f.features, system.f.activate)
    flat = lambda p, h, y: 0.0 * jnp.sum(h)
    for f, loss in ((dead, system.loss), (system.f, flat)):
        start = system._replace(h0=jnp.zeros(2))
        carries, out = run(STREAMING[name](f, loss), start)
        chex.assert_tree_all_finite((carries, out))
    assert all(jnp.all(g == 0) for g in jax.tree.leaves(out.grads))


@pytest.mark.parametrize("name", ["rtrl", "uoro", "nobacktrack"])
def test_leaves_that_are_no_floats_pass_through(name):
    """Integers and keys in parameters and state: None in grads, values untouched."""
    system = vanilla(n=3, steps=5)
    params = system.params | {"order": jnp.array([2, 0, 1]), "key": jax.random.key(3)}

    def f(p, x, h):
        new = system.f(system.params | {k: p[k] for k in "WUb"}, x, h["h"])
        # Key and order are used, so that they cannot just be dropped.
        x = x + jax.random.normal(p["key"], (2,), float)
        return {"h": new[p["order"]] + 0.0 * jnp.sum(x), "t": h["t"] + 1}

    loss = lambda p, h, y: system.loss({k: p[k] for k in "WC"}, h["h"], y)
    mixed = system._replace(
        f=f, loss=loss, params=params, h0={"h": system.h0, "t": jnp.array(0)}
    )
    carries, out = run(STREAMING[name](f, loss), mixed)
    assert carries.h["t"].tolist() == [1, 2, 3, 4, 5]
    assert out.grads["order"] is None
    assert out.grads["key"] is None

    permuted = lambda p, x, h: system.f(p, x, h)[jnp.array([2, 0, 1])]
    plain = system._replace(f=permuted)
    _, expected = run(STREAMING[name](permuted, system.loss), plain)
    got = {k: out.grads[k] for k in "WUbC"}
    chex.assert_trees_all_close(got, expected.grads, **TIGHT)


def test_reset_is_a_fresh_start():
    """After a reset the run equals a run that begins there, sequence by sequence."""
    system = vanilla(n=2, steps=6)
    est = online.uoro(system.f, system.loss)
    fresh = est.init(system.params, system.h0)
    signs = jnp.sign(jax.random.normal(jax.random.key(0), (6, 2), float))

    def resetting(carry, xyn):
        x, y, noise, begins = xyn
        carry = online.reset(carry, fresh, begins)
        carry, out = est.step(system.params, carry, x, y, noise)
        return carry, out

    begins = jnp.arange(6) == 3
    xyn = (system.xs, system.ys, signs, begins)
    _, out = jax.lax.scan(resetting, fresh, xyn)
    tail = system._replace(xs=system.xs[3:], ys=system.ys[3:])
    _, anew = run(est, tail, signs[3:])
    head = jax.tree.map(lambda x: x[3:], out)
    chex.assert_trees_all_equal(head, anew)


def test_reset_selects_sequences():
    """A vector resets the sequences it names, in all leaves, and no other."""
    system = vanilla(n=2, steps=2)
    est = online.per_sequence(online.uoro(system.f, system.loss))
    h0 = jnp.stack([system.h0, -system.h0])
    fresh = est.init(system.params, h0)
    batch = system._replace(
        h0=h0, xs=jnp.stack([system.xs] * 2, 1), ys=jnp.stack([system.ys] * 2, 1)
    )
    carries, _ = run(est, batch)
    carry = jax.tree.map(lambda x: x[-1], carries)
    got = online.reset(carry, fresh, jnp.array([False, True]))
    for i, source in enumerate((carry, fresh)):
        row = lambda x, i=i: x[i]
        chex.assert_trees_all_equal(jax.tree.map(row, got), jax.tree.map(row, source))


def chaotic_weights():
    """16 units, gain 5: the leading Lyapunov exponent is 0.26 a step."""
    return 5 * jax.random.normal(jax.random.key(1), (16, 16), jnp.float32) / 4


def test_chaotic_network_needs_renormalization():
    """float32: the influence overflows without a bound, never with it."""
    loss = lambda w, h, y: jnp.sum(h**2)
    f = lambda w, x, h: jnp.tanh(w @ h)
    w = chaotic_weights()

    def finite(est):
        def step(state, _):
            carry, key = state
            key, signs = jax.random.split(key)
            noise = est.noise(signs, carry)
            carry, out = est.step(w, carry, None, None, noise)
            return (carry, key), jnp.all(jnp.isfinite(out.grads))

        start = est.init(w, jnp.full(16, 0.1, jnp.float32)), jax.random.key(1)
        return jax.jit(lambda s: jax.lax.scan(step, s, length=2_000)[1])(start)

    for make in (online.uoro, online.rtrl):
        assert not jnp.all(finite(make(f, loss)))
        assert jnp.all(finite(online.renormalize(make(f, loss), 1e3)))


def test_renormalization_acts_beyond_the_bound_only():
    """Below the bound the run is untouched; above it the norm is the bound."""
    system = vanilla(n=3, steps=6)
    est = online.rtrl(system.f, system.loss)
    chex.assert_trees_all_close(
        run(online.renormalize(est, 1e6), system), run(est, system), **TIGHT
    )
    carries, _ = run(online.renormalize(est, 0.5), system)
    square = sum(jnp.sum(x[-1] ** 2) for x in jax.tree.leaves(carries.influence))
    chex.assert_trees_all_close(jnp.sqrt(square), jnp.array(0.5), rtol=1e-12)


def test_a_million_steps_stay_finite():
    """UORO in float32, a chaotic network under renormalization, 10⁶ steps."""
    w = chaotic_weights()
    est = online.renormalize(
        online.uoro(lambda w, x, h: jnp.tanh(w @ h), lambda w, h, y: jnp.sum(h**2)),
        1e3,
    )

    def step(state, _):
        carry, key, fine = state
        key, signs = jax.random.split(key)
        carry, out = est.step(w, carry, None, None, est.noise(signs, carry))
        fine &= jnp.all(jnp.isfinite(out.grads))
        return (carry, key, fine), None

    start = est.init(w, jnp.full(16, 0.1, jnp.float32)), jax.random.key(1)
    scan = jax.jit(lambda s: jax.lax.scan(step, s, length=10**6)[0])
    carry, _, fine = scan((*start, jnp.array(True)))
    assert fine
    assert jnp.linalg.norm(carry.influence.w) > 1.0  # it has not died either


ERRORS = {
    "two outputs": (
        lambda p, x, h: (h, h),
        lambda p, h, y: 0.0,
        r"same pytree.*\(h, output\)",
    ),
    "other shape": (lambda p, x, h: jnp.append(h, 0.0), lambda p, h, y: 0.0, "shapes"),
    "vector loss": (lambda p, x, h: p * h, lambda p, h, y: h, "scalar"),
    "tuple loss": (lambda p, x, h: p * h, lambda p, h, y: (0.0, h), "scalar"),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("make", [online.rtrl, online.uoro, online.nobacktrack])
def test_wrong_functions_are_named(make, case):
    """A step or loss of the wrong kind raises with what it got and the remedy."""
    f, loss, message = ERRORS[case]
    est = make(f, loss)
    carry = est.init(jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match=message):
        est.step(jnp.ones(2), carry, None, None, est.noise(jax.random.key(0), carry))


def test_complex_states_are_refused():
    """Complex leaves raise, with the remedy."""
    est = online.uoro(lambda p, x, h: h, lambda p, h, y: jnp.sum(jnp.abs(h)))
    carry = est.init(jnp.ones(2), jnp.ones(2, complex))
    with pytest.raises(ValueError, match=r"`h` holds a complex leaf.*real and imag"):
        est.step(jnp.ones(2), carry, None, None, None)


@pytest.mark.parametrize("bad", [0, 2.0, True, jnp.array(2)])
def test_counts_must_be_positive_ints(bad):
    """Copies and truncation: Python ints of at least one."""
    f, loss = (lambda p, x, h: h), (lambda p, h, y: 0.0)
    with pytest.raises(ValueError, match="copies"):
        online.average(online.uoro(f, loss), bad)
    with pytest.raises(ValueError, match="truncation"):
        online.tbptt(f, loss, truncation=bad)
    with pytest.raises(ValueError, match="max_norm"):
        online.renormalize(online.uoro(f, loss), -1)


def test_truncation_must_divide_the_sequence():
    """Both numbers are in the message."""
    system = vanilla(steps=12)
    est = online.tbptt(system.f, system.loss, truncation=5)
    carry = est.init(system.params, system.h0)
    with pytest.raises(ValueError, match=r"`truncation` = 5.*12"):
        est.step(system.params, carry, system.xs, system.ys, ())


def test_everything_public_is_documented_and_sorted():
    """__all__ is sorted, each name has a docstring."""
    names = rbpjax.online.__all__
    assert names == sorted(names)
    for name in names:
        assert getattr(rbpjax.online, name).__doc__, name
