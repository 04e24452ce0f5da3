"""Reversible steps: by hand, against closed forms, and their recomputed gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax.unitary import Coupling, Leapfrog, Momentum, recomputed_scan
from rbpjax.unitary.history import HistoryReport, Inverse

RNG = np.random.default_rng(0)
W = {
    "w": jnp.array(RNG.normal(size=(5, 5)) / 5),
    "v": jnp.array(RNG.normal(size=(5, 5)) / 5),
    "c": jnp.array(RNG.normal(size=(5, 2))),
}
XS = jnp.array(RNG.normal(size=(1000, 2)))
START = (jnp.array(RNG.normal(size=5)), jnp.array(RNG.normal(size=5)))


# Gradients of a bounded potential, in directions that turn with the input.
def pull(params, x, q):
    wave = -params["w"].T @ jnp.sin(params["w"] @ q + params["c"] @ x)
    return wave - 0.3 * q + 0.01 * jnp.tanh(params["v"] @ q)


def push(params, x, q):
    return 0.1 * jnp.tanh(params["v"] @ q + params["c"] @ x)


STEPS = {
    "coupling": Coupling(
        first=lambda p, x, b: 0.1 * pull(p, x, b),
        second=lambda p, x, a: -0.1 * pull(p, -x, a) + 0.01 * push(p, x, a),
    ),
    "leapfrog": Leapfrog(force=pull, dt=0.1),
    "momentum": Momentum(force=pull, dt=0.1),
}
steps = pytest.mark.parametrize("name", STEPS)


def stored(f, params, xs, h0, history=None, probe=None):
    return jax.lax.scan(lambda h, x: (f(params, x, h), None), h0, xs)


@steps
def test_the_inverse_undoes_the_step_to_a_few_roundings(name):
    """Before and after, also when the step is undone first; pytrees, float32."""
    step = STEPS[name]
    for there, back in ((step, step.inverse), (step.inverse, step)):
        got = back(W, XS[0], there(W, XS[0], START))
        # Six sums of numbers of order one, each rounded once.
        chex.assert_trees_all_close(got, START, rtol=0, atol=4e-15)
    moved = step(W, XS[0], START)
    assert (
        max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(moved, START, strict=True))
        > 0.01
    )
    single = jax.tree.map(lambda x: x.astype(jnp.float32), (W, XS[0], START))
    out = step(*single)
    assert [x.dtype for x in out] == [jnp.float32] * 2
    chex.assert_trees_all_close(step.inverse(*single[:2], out), single[2], atol=2e-6)


@steps
def test_gradient_and_memory_over_1000_steps(name):
    """As jax.grad through lax.scan; the same bytes for any T; the drift is told."""
    step = STEPS[name]
    history = Inverse(inverse=step.inverse)
    c = jnp.array(RNG.normal(size=(2, 5)))

    def loss(scan, params, xs, h0, probe):
        (a, b), _ = scan(step, params, xs, h0, history=history, probe=probe)
        return jnp.vdot(c[0], jnp.sin(a)) + jnp.vdot(c[1], b)

    grads = {
        scan: jax.jit(
            jax.grad(lambda *args, scan=scan: loss(scan, *args), (0, 1, 2, 3))
        )
        for scan in (recomputed_scan, stored)
    }
    probe = HistoryReport.zeros()
    *got, report = grads[recomputed_scan](W, XS, START, probe)
    *expected, _ = grads[stored](W, XS, START, probe)
    # Each of T steps back rounds by a few ε and all later ones carry it on, by what
    # the Jacobian of all steps grows; so do the cotangents that it is multiplied by.
    end = lambda h: jnp.concatenate(stored(step, W, XS, h)[0])
    jacobian = jnp.concatenate(jax.jit(jax.jacrev(end))(START), 1)
    growth = float(jnp.linalg.norm(jacobian, 2))
    tol = 1000 * 4 * np.finfo(float).eps * max(growth, 1) ** 2
    assert tol < 1e-8, "the steps of the test must not be chaotic"
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert jnp.linalg.norm(b) > 1e-3
        assert jnp.linalg.norm(a - b) < tol * jnp.linalg.norm(b)
    assert 0 < report.drift < tol
    temp = lambda scan, T: (
        (
            grads[scan].lower(W, XS[:T], START, probe).compile().memory_analysis()
        ).temp_size_in_bytes
    )
    assert temp(recomputed_scan, 50) == temp(recomputed_scan, 1000)
    assert temp(stored, 1000) > 10 * temp(stored, 50)


def test_leapfrog_is_the_closed_form_of_an_oscillator():
    """q_n = cos(nθ) with 2 sin(θ/2) = ω dt, the solution of the scheme itself."""
    step, omega, n = Leapfrog(force=lambda w, x, q: -(w**2) * q, dt=0.3), 1.3, 1000
    start = (jnp.array(1.0), jnp.array(0.0))
    q, p = jax.lax.fori_loop(0, n, lambda _, h: step(omega, None, h), start)
    theta = 2 * np.arcsin(omega * 0.3 / 2)
    # The amplitude of p belongs to q_{n+1} - q_{n-1} = 2 dt p_n.
    exact = np.cos(n * theta), -np.sin(n * theta) * np.sin(theta) / 0.3
    # n roundings of the phase.
    np.testing.assert_allclose((q, p), exact, rtol=0, atol=n * 1e-15)


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_momentum_is_the_power_of_its_matrix(decay):
    """p ← μp - dt Kq, q ← q + dt p, as a dense matrix to the power 100."""
    k = np.array([[1.0, 0.4], [-0.2, 2.0]])
    step = Momentum(force=lambda k, x, q: -k @ q, dt=0.2, decay=decay)
    one, none = np.eye(2), np.zeros((2, 2))
    kick = np.block([[one, none], [-0.2 * k, decay * one]])
    drift = np.block([[one, 0.2 * one], [none, one]])
    h0 = np.array([1.0, -2.0, 0.5, 3.0])
    want = np.linalg.matrix_power(drift @ kick, 100) @ h0
    start = (jnp.array(h0[:2]), jnp.array(h0[2:]))
    got = jax.lax.fori_loop(0, 100, lambda _, h: step(k, None, h), start)
    np.testing.assert_allclose(np.concatenate(got), want, rtol=0, atol=1e-12)


def test_forgetting_momentum_loses_its_bits_as_it_says_and_anchors_keep_them():
    """A drift of about ε μ^(-K/2), as this q oscillates, K steps between anchors."""
    step = Momentum(force=pull, dt=0.1, decay=0.9)

    def drift(anchors):
        history = Inverse(inverse=step.inverse, anchors=anchors)

        def loss(w, probe):
            params = W | {"w": w}
            (a, _), _ = recomputed_scan(
                step, params, XS[:240], START, history=history, probe=probe
            )
            return jnp.sum(a**2)

        return float(jax.jit(jax.grad(loss, 1))(W["w"], HistoryReport.zeros()).drift)

    # 240 steps: ε μ^-120 = 7e-11; 60: 5e-15. A factor of 30 for what is summed up.
    assert 2e-12 < drift(1) < 2e-9
    assert drift(4) < 2e-13


def test_pytrees_complex_leaves_and_vmap():
    """Halves may be any pytrees; a batch is its examples."""
    f = lambda p, x, b: {"z": p * b["z"] ** 2 + x}
    step = Coupling(first=f, second=lambda p, x, a: {"z": jnp.conj(a["z"]) * p})
    z = jnp.array(RNG.normal(size=(3, 4)) + 1j * RNG.normal(size=(3, 4)))
    pairs = ({"z": z}, {"z": -z[::-1]})
    p, x = jnp.array(0.3j), jnp.array(1.0 + 0j)
    both = jax.vmap(step, (None, None, 0))(p, x, pairs)
    a = z + 0.3j * z[::-1] ** 2 + 1
    chex.assert_trees_all_close(both[0]["z"], a, rtol=1e-14)
    chex.assert_trees_all_close(both[1]["z"], -z[::-1] + 0.3j * a.conj(), rtol=1e-14)
    back = jax.vmap(step.inverse, (None, None, 0))(p, x, both)
    chex.assert_trees_all_close(back, pairs, rtol=0, atol=1e-14)


def test_bad_steps_and_states_are_named():
    """Options, states that are no pair, forces of another shape."""
    one = jnp.ones(3)
    odd = Coupling(first=lambda p, x, b: b[:2], second=lambda p, x, a: a)
    for call, words in (
        (lambda: Leapfrog(force=pull, dt=0.0), "`dt` must be a Python number"),
        (lambda: Momentum(force=pull, dt=0.1, decay=0.0), "`decay` must be.*0.0"),
        (lambda: Momentum(force=pull, dt=0.1, decay=1.1), "`decay` must be"),
        (lambda: Coupling(first=3, second=pull), "`first` must be a function"),
        (lambda: STEPS["leapfrog"](W, XS[0], one), "must be a pair.*got"),
        (lambda: odd(None, None, (one, one)), "`first`'s output must have"),
        (lambda: STEPS["momentum"](W, XS[0], (one, one[:2])), "the state's q must"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
