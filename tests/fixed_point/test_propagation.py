"""Equilibrium propagation against implicit gradients, and a closed form."""

import itertools
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import (
    Direct,
    FixedPointIteration,
    Newton,
    equilibrium_propagation,
)
from tests.support.problems import assert_close

N, M = 5, 3
_random = np.random.default_rng(0)
PARAMS = {
    "s": jnp.asarray(_random.normal(size=(N, N)) / N**0.5),
    "w": jnp.asarray(_random.normal(size=(N, M))),
    "gain": jnp.asarray(0.7),
}
INPUTS = {
    "x": jnp.asarray(_random.normal(size=M)),
    "y": jnp.asarray(_random.normal(size=N)),
}
H0 = {"a": jnp.zeros(2), "b": jnp.zeros((3, 1))}
EXACT = Newton(Direct(), tol=1e-14)


def joined(h):
    return jnp.concatenate([h["a"], h["b"][:, 0]])


def energy(p, x, h):
    """Convex, of fourth degree: the states bend with the nudge."""
    h = joined(h)
    quadratic = 0.5 * jnp.sum(h**2) + 0.5 * jnp.sum((p["s"] @ h) ** 2)
    return quadratic + 0.25 * jnp.sum(h**4) - h @ (p["w"] @ x["x"])


def loss(p, x, h):
    """Not quadratic, and of params by itself too."""
    return jnp.sum(jnp.cosh(p["gain"] * (joined(h) - x["y"])))


@cache
def implicit():
    """Value and gradient through the root of ∂E/∂h, by LU."""
    solve = rbpjax.rbp_root(jax.grad(energy, 2), forward=EXACT, backward=Direct())
    value = lambda p: loss(p, INPUTS, solve(p, INPUTS, H0).value)
    return jax.jit(jax.value_and_grad(value))(PARAMS)


@partial(jax.jit, static_argnums=(1, 2))
def estimate(nudge, centred, forward=EXACT):
    made = equilibrium_propagation(
        energy, loss, nudge=jnp.asarray(nudge), centred=centred, forward=forward
    )
    return made(PARAMS, INPUTS, H0)


@pytest.mark.parametrize(("centred", "order"), [(False, 1), (True, 2)])
def test_the_bias_falls_with_the_order_of_the_difference(centred, order):
    """Halved nudges divide the error by 2, or by 4: to a tenth, the next order."""
    value, want = implicit()
    error = []
    for nudge in (0.02, 0.01, 0.005):
        found = estimate(nudge, centred)
        assert found.converged and len(found.nudged.status) == order
        chex.assert_trees_all_close(found.loss, value, rtol=1e-12)
        gaps = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), found.grads, want)
        error.append(float(sum(jax.tree.leaves(gaps))) ** 0.5)
    for before, after in itertools.pairwise(error):
        assert abs(before / after / 2**order - 1) < 0.1
    assert error[0] > 1e-4  # far above rounding


def test_it_tends_to_the_implicit_gradient():
    """At β = 1e-4 the centred one is 1e-7 away; a relaxation finds the same states."""
    _, want = implicit()
    assert_close(estimate(1e-4, True).grads, want, 1e-7)
    relaxed = estimate(1e-3, True, FixedPointIteration(tol=1e-13, damping=0.7))
    assert relaxed.converged
    assert_close(relaxed.grads, want, 1e-5)


@pytest.mark.parametrize("centred", [False, True])
def test_a_quadratic_in_closed_form(centred):
    """H_β = (A + βI)⁻¹(b + βy) and ∂E/∂b = -h, for a nudge that is not small."""
    a = jnp.asarray(np.eye(N) + (m := _random.normal(size=(N, N))) @ m.T / N)
    b, y, beta = jnp.arange(1.0, N + 1), INPUTS["y"], 0.3
    rest = lambda beta: jnp.linalg.solve(a + beta * jnp.eye(N), b + beta * y)
    made = equilibrium_propagation(
        lambda b, y, h: 0.5 * h @ a @ h - b @ h,
        lambda b, y, h: 0.5 * jnp.sum((h - y) ** 2),
        nudge=beta,
        centred=centred,
        forward=EXACT,
    )
    found = jax.jit(made)(b, y, jnp.zeros(N))
    lower, width = (rest(-beta), 2 * beta) if centred else (rest(0.0), beta)
    assert_close(found.grads, -(rest(beta) - lower) / width, 1e-10)
    assert_close(found.free.value, rest(0.0), 1e-10)
    assert_close(found.nudged.value[0], rest(beta), 1e-10)


def test_transformations():
    """Vmap over examples, and a nudge that is traced."""
    one = lambda x, nudge=0.01: equilibrium_propagation(
        energy, loss, nudge=nudge, forward=EXACT
    )(PARAMS, x, H0).grads["w"]
    xs = jax.tree.map(lambda u: jnp.stack([u, 2 * u, -u]), INPUTS)
    single = jax.jit(one)
    alone = [single(jax.tree.map(lambda u, i=i: u[i], xs)) for i in range(3)]
    alone = jnp.stack(alone)
    assert_close(jax.jit(jax.vmap(one))(xs), alone, 1e-9)
    assert_close(estimate(0.01, True).grads["w"], alone[0], 1e-9)


def test_a_phase_that_does_not_rest_is_told():
    """A budget too small for the states: converged is false."""
    found = estimate(0.01, True, FixedPointIteration(max_steps=2))
    assert not found.converged
    # h² / 2 rests at 0, and with h - h² / 2 it has no slope but 1.
    tipped = equilibrium_propagation(
        lambda a, x, h: 0.5 * jnp.sum(a * h**2),
        lambda a, x, h: jnp.sum(h - 0.5 * h**2),
        nudge=1.0,
        centred=False,
    )(1.0, None, jnp.ones(2))
    assert tipped.free.converged and not tipped.converged
    # An energy without a state of rest.
    flat = equilibrium_propagation(
        lambda a, x, h: jnp.sum(a * h), lambda a, x, h: jnp.sum(h), nudge=0.5
    )(1.0, None, jnp.zeros(2))
    assert not flat.converged


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"energy": 1}, r"`energy`.*energy\(params, inputs, h\).*got 1"),
        ({"loss": None}, r"`loss`.*got None"),
        ({"nudge": 0.0}, r"`nudge`.*other than zero.*got 0.0"),
        ({"nudge": "small"}, r"`nudge`.*got 'small'"),
    ],
)
def test_options_out_of_range(change, words):
    """A ValueError with the name and the value."""
    options = {"energy": energy, "loss": loss, "nudge": 0.1} | change
    with pytest.raises(ValueError, match=words):
        equilibrium_propagation(options.pop("energy"), options.pop("loss"), **options)
