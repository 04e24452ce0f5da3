"""SnAp-1 and RFLO against dense masked recursions, and where they are exact."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import online
from tests.support.online import leaky, lstm, run, spiking, step_gradients, vanilla

TIGHT = dict(rtol=1e-12, atol=1e-12)


def dense(system, local_only):
    """G ← mask ∘ (A G + F) on the whole n × P matrix, gradients δ G.

    The mask keeps a parameter's entries at its own unit; A is J for SnAp-1, and J at
    fixed pre-activations for RFLO.
    """
    flat, unravel = jax.flatten_util.ravel_pytree(system.h0)
    units = jax.tree.leaves(system.h0)[0].size
    unit_of_state = jnp.tile(jnp.arange(units), flat.size // units)
    axis = {"W": -2, "U": -2, "b": -1, "C": None}

    def owners(name, leaf):
        if axis[name] is None:
            return jnp.full(leaf.shape, -1)
        shape = [1] * leaf.ndim
        shape[axis[name]] = units
        return jnp.broadcast_to(jnp.arange(units).reshape(shape), leaf.shape)

    masks = {
        k: jnp.equal(unit_of_state.reshape(-1, *[1] * v.ndim), owners(k, v)[None])
        for k, v in system.params.items()
    }

    def step(p, x, flat_h):
        return jax.flatten_util.ravel_pytree(system.f(p, x, unravel(flat_h)))[0]

    def fixed_z(p, x, flat_h):
        z = system.f.kernel(p) @ system.f.features(x, unravel(flat_h))
        inside = lambda h: jax.vmap(system.f.activate, (1, 0))(z, unravel(h))
        through = lambda h: jax.flatten_util.ravel_pytree(inside(h))[0]
        return jax.jacfwd(through)(flat_h)

    def body(state, xy):
        h, g = state
        x, y = xy
        a = jax.jacfwd(step, 2)(system.params, x, h)
        if local_only:
            a = fixed_z(system.params, x, h)
        f = jax.jacrev(step, 0)(system.params, x, h)
        h = step(system.params, x, h)
        g = {k: jnp.where(masks[k], jnp.tensordot(a, g[k], 1) + f[k], 0.0) for k in g}
        loss = lambda p, h: system.loss(p, unravel(h), y)
        direct, delta = jax.grad(loss, (0, 1))(system.params, h)
        return (h, g), {k: direct[k] + jnp.tensordot(delta, g[k], 1) for k in g}

    zeros = {k: jnp.zeros((flat.size, *v.shape)) for k, v in system.params.items()}
    scan = jax.jit(lambda s: jax.lax.scan(body, s, (system.xs, system.ys))[1])
    return scan((flat, zeros))


FULL = pytest.mark.full


@pytest.mark.parametrize("make", [vanilla, pytest.param(lstm, marks=FULL)])
def test_snap1_is_masked_rtrl(make):
    """Keeping only one-step entries of G, densely, gives the same gradients."""
    system = make()
    _, out = run(online.snap1(system.f, system.loss), system)
    chex.assert_trees_all_close(out.grads, dense(system, local_only=False), **TIGHT)


@pytest.mark.parametrize("make", [pytest.param(leaky, marks=FULL), lstm])
def test_rflo_is_masked_rtrl_without_recurrent_paths(make):
    """The same with J at fixed pre-activations."""
    system = make()
    _, out = run(online.rflo(system.f, system.loss), system)
    chex.assert_trees_all_close(out.grads, dense(system, local_only=True), **TIGHT)


def test_rflo_trace_of_a_leaky_cell_is_the_papers():
    """B ← (1-α) B + α φ' ĥᵀ, by hand."""
    system = leaky(n=3, steps=4)
    carries, _ = run(online.rflo(system.f, system.loss), system)
    h, trace = np.asarray(system.h0), np.zeros((3, 6))
    kernel = np.asarray(system.f.kernel(system.params)[0])
    for x in np.asarray(system.xs):
        features = np.concatenate([h, x, np.ones(1)])
        z = kernel @ features
        trace = 0.7 * trace + 0.3 * np.outer(1 - np.tanh(z) ** 2, features)
        h = 0.7 * h + 0.3 * np.tanh(z)
    chex.assert_trees_all_close(carries.influence[-1, 0, 0], trace, **TIGHT)


adaptive = functools.partial(spiking, adaptation=0.5)


@pytest.mark.parametrize("make", [pytest.param(leaky, marks=FULL), adaptive])
def test_rflo_is_bptt_stopped_where_the_state_enters(make):
    """Autodiff through the history, no derivative into ĥ; and that drops something."""
    system = make()
    features = system.f.features
    cut = lambda x, h: features(x, jax.lax.stop_gradient(h))
    stopped = system._replace(f=dataclasses.replace(system.f, features=cut))
    _, out = run(online.rflo(system.f, system.loss), system)
    chex.assert_trees_all_close(out.grads, step_gradients(stopped), **TIGHT)
    exact = step_gradients(system)["U"]
    assert np.linalg.norm(out.grads["U"] - exact) > 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize("adaptation", [0.5, pytest.param(0.0, marks=FULL)])
def test_eprop_is_exact_without_recurrent_weights(adaptation):
    """Spiking units by themselves, which do spike, and are not always silent."""
    alone = spiking(recurrent=0.0, adaptation=adaptation)
    carries, out = run(online.rflo(alone.f, alone.loss), alone)
    assert 0.1 < np.mean(carries.h["spikes"]) < 0.6
    chex.assert_trees_all_close(out.grads, step_gradients(alone), **TIGHT)


def test_eligibility_vectors_are_the_papers():
    """By hand: ε_v ← α ε_v + ĥ; ε_a ← ψ ε_v + (ρ - ψ β) ε_a of the last step; e."""
    system = adaptive(n=3, steps=6)
    carries, _ = run(online.rflo(system.f, system.loss), system)
    h = {name: np.zeros(3) for name in system.h0}
    voltage, threshold, psi = np.zeros((3, 6)), np.zeros((3, 6)), np.zeros((3, 1))
    trace = np.zeros((3, 6))
    kernel = np.asarray(system.f.kernel(system.params)[0])
    for x in np.asarray(system.xs):
        features = np.concatenate([h["spikes"], x, np.ones(1)])
        threshold = psi * voltage + (0.99 - psi * 0.5) * threshold
        voltage = 0.8 * voltage + features
        h["voltage"] = 0.8 * h["voltage"] + kernel @ features - h["spikes"]
        h["adaptation"] = 0.99 * h["adaptation"] + h["spikes"]
        above = h["voltage"] - 1 - 0.5 * h["adaptation"]
        h["spikes"] = 1.0 * (above > 0)
        psi = 0.3 * np.maximum(0, 1 - np.abs(above))[:, None]
        eligibility = psi * (voltage - 0.5 * threshold)
        trace = 0.9 * trace + eligibility
    names = sorted(h)  # the order of the leaves
    found = dict(zip(names, carries.influence[-1, :, 0], strict=True))
    want = {"adaptation": threshold, "spikes": eligibility, "trace": trace}
    chex.assert_trees_all_close(found, want | {"voltage": voltage}, **TIGHT)


def test_feedback_takes_the_place_of_the_losses_derivative():
    """Random: its signal times the trace. Symmetric, by hand: the default."""
    system = leaky(n=3, steps=4)
    R = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2)))
    error = lambda p, h, y: 2 * (p["C"] @ h - y)
    loss = lambda p, h, y: jnp.sum((p["C"] @ h - y) ** 2)
    plain = online.rflo(system.f, loss)
    carries, want = run(plain, system)
    symmetric = online.rflo(
        system.f, loss, feedback=lambda p, h, y: p["C"].T @ error(p, h, y)
    )
    chex.assert_trees_all_close(run(symmetric, system)[1].grads, want.grads, **TIGHT)
    random = online.rflo(system.f, loss, feedback=lambda p, h, y: R @ error(p, h, y))
    _, out = run(random, system)
    signals = np.einsum("no,to->tn", R, carries.h @ system.params["C"].T - system.ys)
    by_hand = 2 * signals[:, :, None] * carries.influence[:, 0, 0]
    chex.assert_trees_all_close(out.grads["U"], by_hand[:, :, 3:5], **TIGHT)
    # The readout's own gradient is not random.
    chex.assert_trees_all_close(out.grads["C"], want.grads["C"], **TIGHT)
    wrong = online.rflo(system.f, loss, feedback=lambda p, h, y: y)
    with pytest.raises(ValueError, match="`feedback`'s output"):
        run(wrong, system)


@pytest.mark.parametrize("make", [online.snap1, online.rflo])
def test_both_are_exact_without_recurrent_weights_and_biased_with(make):
    """Without connections each unit remembers alone; with them both lose paths."""
    alone, coupled = leaky(recurrent=0.0), leaky()
    _, out = run(make(alone.f, alone.loss), alone)
    chex.assert_trees_all_close(out.grads, step_gradients(alone), **TIGHT)
    _, out = run(make(coupled.f, coupled.loss), coupled)
    exact = step_gradients(coupled)["U"]
    gap = np.linalg.norm(out.grads["U"] - exact)
    assert gap > 0.01 * np.linalg.norm(exact)


def test_snap1_is_exact_for_diagonal_recurrence():
    """Units that feed back on themselves only lose nothing (RFLO does)."""
    system = vanilla()
    alone = lambda p: p | {"W": jnp.diag(jnp.diagonal(p["W"]))}
    kernel = system.f.kernel
    cell = dataclasses.replace(system.f, kernel=lambda p: kernel(alone(p)))
    system = system._replace(f=cell)
    exact = step_gradients(system)
    _, out = run(online.snap1(cell, system.loss), system)
    chex.assert_trees_all_close(out.grads, exact, **TIGHT)
    _, out = run(online.rflo(cell, system.loss), system)
    assert np.max(np.abs(out.grads["U"] - exact["U"])) > 1e-3
