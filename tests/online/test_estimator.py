"""What every estimator keeps: types, transformations, memory, derivatives, errors."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import online
from tests.support.online import lstm, min_gru, run, signs_like, unit_rows, vanilla

TIGHT = dict(rtol=1e-12, atol=1e-12)

# A new estimator is one row, and is then tested by everything here.
STREAMING = {
    "rtrl": online.rtrl,
    "uoro": online.uoro,
    "nobacktrack": online.nobacktrack,
    "nobacktrack_rows": lambda f, loss: online.nobacktrack(f, loss, rows=unit_rows),
    "kalman_nobacktrack": lambda f, loss: online.kalman_nobacktrack(f, loss, decay=0.1),
    "kf_rtrl": online.kf_rtrl,
    "ok_rtrl": lambda f, loss: online.ok_rtrl(f, loss, rank=2),
    "snap1": online.snap1,
    "rflo": online.rflo,
    "snap2": lambda f, loss: online.snap(f, loss, order=2),
    "diagonal_rtrl": online.diagonal_rtrl,
    "average": lambda f, loss: online.combine.average(online.uoro(f, loss), 3),
    "renormalize": lambda f, loss: online.combine.renormalize(
        online.uoro(f, loss), 5.0
    ),
}


def each(*representatives, names=tuple(STREAMING)):
    """All of ``names``, but by default the representatives only."""
    full = [name for name in names if name not in representatives]
    marked = [pytest.param(name, marks=pytest.mark.full) for name in full]
    return pytest.mark.parametrize("name", [*representatives, *marked])


every = each("rtrl", "uoro", "kf_rtrl")


def suited(name, make):
    """``make``, or a system of units by themselves where the estimator asks for it."""
    return min_gru if name == "diagonal_rtrl" else make


def first_step(est, system):
    carry = est.init(system.params, system.h0)
    noise = est.noise(jax.random.key(0), carry)
    return carry, (system.params, carry, system.xs[0], system.ys[0], noise)


@every
def test_jit_scan_and_vmap_agree(name):
    """A jitted scan over a batch of noise equals steps one by one."""
    system = suited(name, lstm)(n=2, steps=3)
    est = STREAMING[name](system.f, system.loss)
    carry = est.init(system.params, system.h0)
    keys = jax.random.split(jax.random.key(1), (2, 3))
    noise = jax.vmap(jax.vmap(est.noise, (0, None)), (0, None))(keys, carry)
    batched = jax.vmap(lambda n: run(est, system, n), axis_size=2)
    _, out = jax.jit(batched)(noise)
    step = jax.jit(est.step)
    for t in range(3):
        signs = jax.tree.map(lambda n, t=t: n[1, t], noise)
        carry, single = step(system.params, carry, system.xs[t], system.ys[t], signs)
        got = jax.tree.map(lambda x, t=t: x[1, t], out)
        chex.assert_trees_all_close(got, single, rtol=1e-10, atol=1e-12)


@every
def test_types_are_kept_and_nothing_is_traced_twice(name):
    """Carry and gradients keep structure, shapes, dtypes (here float32); one trace."""
    system = suited(name, lstm)(n=2, steps=3)
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
    system = suited(name, vanilla)(n=4)
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
    system = suited(name, vanilla)(n=2, steps=6)
    dead = dataclasses.replace(system.f, kernel=lambda p: 0.0 * system.f.kernel(p))
    flat = lambda p, h, y: 0.0 * jnp.sum(jax.tree.leaves(h)[-1])
    for f, loss in ((dead, system.loss), (system.f, flat)):
        start = system._replace(h0=jax.tree.map(jnp.zeros_like, system.h0))
        carries, out = run(STREAMING[name](f, loss), start)
        chex.assert_tree_all_finite((carries, out))
    assert all(np.all(g == 0) for g in jax.tree.leaves(out.grads))


# The SVD of ok_rtrl has no derivative at the start.
@each("uoro", names=tuple(n for n in STREAMING if n != "ok_rtrl"))
def test_a_run_can_be_differentiated(name):
    """Forward and reverse mode agree with each other and with differences.

    At the start the influence is zero, where the derivative of a norm is infinite.
    """
    system = suited(name, vanilla)(n=2, steps=3)
    est = STREAMING[name](system.f, system.loss)
    noise = signs_like(est, system, 3)

    @jax.jit
    def total(params):
        grads = run(est, system, noise, params)[1].grads
        return sum(jnp.sum(jnp.arcsinh(g)) for g in grads.values())

    rng = np.random.default_rng(0)
    v = {k: rng.standard_normal(p.shape) for k, p in system.params.items()}
    (slope,) = jax.jit(lambda p: jax.jvp(total, (p,), (v,))[1:])(system.params)
    gradient = jax.jit(jax.grad(total))(system.params)
    moved = lambda by: {k: p + by * v[k] for k, p in system.params.items()}
    difference = (total(moved(1e-5)) - total(moved(-1e-5))) / 2e-5
    assert abs(slope) > 0.1
    back = sum(np.vdot(gradient[k], v[k]) for k in v)
    np.testing.assert_allclose(back, slope, rtol=1e-10)
    np.testing.assert_allclose(difference, slope, rtol=1e-5)


@each("uoro", names=("uoro", "rtrl", "nobacktrack"))
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


ERRORS = {
    "two outputs": (
        lambda p, x, h: (h, h),
        lambda p, h, y: 0.0,
        r"`f`'s output.*structure.*its state `h`.*\(h, output\)",
    ),
    "other shape": (lambda p, x, h: jnp.append(h, 0.0), lambda p, h, y: 0.0, "shapes"),
    "vector loss": (lambda p, x, h: p * h, lambda p, h, y: h, "scalar"),
    "tuple loss": (lambda p, x, h: p * h, lambda p, h, y: (0.0, h), "scalar"),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize(
    "make", [online.rtrl, online.uoro, online.nobacktrack, online.bptt]
)
def test_wrong_functions_are_named(make, case):
    """A step or loss of the wrong kind raises with what it got and the remedy."""
    f, loss, message = ERRORS[case]
    est = make(f, loss)
    ones = np.ones(2)
    carry = est.init(ones, ones)
    with pytest.raises(ValueError, match=message):
        est.step(ones, carry, ones, None, ones)


def test_complex_parameters_are_refused():
    """Complex leaves raise, with the remedy: at the start, and in a step."""
    est = online.uoro(lambda p, x, h: h, lambda p, h, y: jnp.sum(jnp.abs(h)))
    real, complex_ = np.ones(2), np.ones(2, complex)
    message = "`params` holds a complex leaf.*real and imag"
    with pytest.raises(ValueError, match=message):
        est.init(complex_, real)
    with pytest.raises(ValueError, match=message):
        est.step(complex_, est.init(real, real), None, None, None)


@pytest.mark.parametrize("make", [online.snap1, online.rflo, online.kf_rtrl])
def test_complex_states_of_kernel_cells_are_refused(make):
    """What is derived for real pre-activations raises, at the start and in a step."""
    system = vanilla(n=2)
    est = make(system.f, system.loss)
    message = "`h0` holds a complex leaf.*real and imag"
    with pytest.raises(ValueError, match=message):
        est.init(system.params, system.h0.astype(complex))
    carry = est.init(system.params, system.h0)
    carry = carry._replace(h=system.h0.astype(complex))
    with pytest.raises(ValueError, match=message):
        est.step(system.params, carry, system.xs[0], system.ys[0], ())


@pytest.mark.parametrize("h0", [{}, {"h": "words"}])
def test_what_is_no_state_is_refused(h0):
    """A state without arrays, and one with leaves that are none."""
    for make in (online.uoro, online.rtrl, online.bptt):
        est = make(lambda p, x, h: h, lambda p, h, y: 0.0)
        with pytest.raises(ValueError, match="`h0` must"):
            est.init(np.ones(2), h0)


@pytest.mark.parametrize("namespace", [online, online.combine, online.rank_one])
def test_everything_public_is_documented_and_sorted(namespace):
    """__all__ is sorted, each name has a docstring."""
    names = namespace.__all__
    assert names == sorted(names)
    for name in names:
        assert getattr(namespace, name).__doc__, name
