"""What h does not reach is computed once, and nothing else changes."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

import rbpjax
from rbpjax._core.step import close
from rbpjax.fixed_point.hoisting import hoist

N = 6


def reader(params, inputs, h):
    """A step as one writes it: everything in its place, nothing saved."""
    w = params["w"] + params["w"].T
    w = rbpjax.spectral_normalize(w, 0.8)
    mask = jax.random.bernoulli(inputs["key"], 0.7, h.shape)
    drive = jax.nn.relu(inputs["x"] @ params["b"]) + jnp.exp(params["bias"])[None]
    return jnp.where(mask, jnp.tanh(h @ w.T + drive), 0.1 * drive)


def problem():
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "w": jax.random.normal(keys[0], (N, N)),
        "b": jax.random.normal(keys[1], (3, N)),
        "bias": jax.random.normal(keys[2], (N,)),
    }
    inputs = {"x": jax.random.normal(keys[3], (4, 3)), "key": keys[4]}
    return params, inputs, jnp.zeros((4, N))


def primitives(jaxpr: core.Jaxpr) -> Iterator[str]:
    """Names of all operations, nested ones too."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if isinstance(inner, core.Jaxpr):
                    yield from primitives(inner)


def loop_bodies(jaxpr: core.Jaxpr) -> Iterator[list[str]]:
    """The operations of every while loop's body."""
    for equation in jaxpr.eqns:
        for name, value in equation.params.items():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if isinstance(inner, core.Jaxpr):
                    if equation.primitive.name == "while" and name == "body_jaxpr":
                        yield list(primitives(inner))
                    yield from loop_bodies(inner)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_the_rest_is_the_step_and_holds_only_what_h_reaches(wrap):
    step, args, h = close(wrap(reader), *problem())
    rest, crossed = hoist(step, args, h)
    h = jax.random.normal(jax.random.key(1), h.shape)
    # The same operations in the same order; XLA may fuse the ones of a jit otherwise,
    # which is a rounding or two: 1e-15.
    np.testing.assert_allclose(rest(crossed, h), step(args, h), rtol=1e-15)
    left = list(primitives(jax.make_jaxpr(rest)(crossed, h).jaxpr))
    assert left.count("dot_general") == 1
    assert "transpose" in left, "free in a loop, and half the memory if it stays"
    assert not {"svd", "exp", "random_bits", "threefry2x32", "max"} & set(left), left


def test_gradients_are_those_of_the_unrolled_step():
    params, inputs, h0 = problem()
    solve = rbpjax.rbp_solve(
        reader,
        forward=rbpjax.FixedPointIteration(tol=1e-15),
        backward=rbpjax.Adaptive(tol=1e-13),
    )
    # 0.8^150 = 3e-15: the unrolled loop is at the fixed point, in value and gradient.
    unrolled = rbpjax.bptt(reader, 150)
    loss = lambda solve: (
        lambda p, x: jnp.sum(solve(p, inputs | {"x": x}, h0).value ** 3)
    )
    at = (params, inputs["x"])
    for order in (jax.grad, lambda f, argnums: _directional(f, argnums)):
        ours = order(loss(solve), argnums=(0, 1))(*at)
        truth = order(loss(unrolled), argnums=(0, 1))(*at)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def _directional(f, argnums):
    """Second order: the gradient of the gradient's square."""
    square = lambda *a: sum(
        jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(f, argnums=argnums)(*a))
    )
    return jax.grad(square, argnums=argnums)


def test_no_decomposition_is_left_in_any_loop():
    params, inputs, h0 = problem()
    solve = rbpjax.rbp_solve(reader)
    loss = lambda p: jnp.sum(solve(p, inputs, h0).value ** 2)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(params).jaxpr
    assert "svd" in set(primitives(jaxpr)), "computed somewhere"
    bodies = list(loop_bodies(jaxpr))
    assert bodies
    for body in bodies:
        assert not {"svd", "random_bits", "threefry2x32"} & set(body)


def test_nothing_to_move_gives_the_same_step_back():
    f = lambda w, x, h: jnp.tanh(h @ w.T + x[None, :])
    step, args, h = close(f, jnp.eye(3), jnp.ones(3), jnp.zeros((2, 3)))
    same, same_args = hoist(step, args, h)
    assert same is step
    assert same_args is args


def test_side_effects_stay_in_every_step():
    seen = []

    def f(w, x, h):
        jax.debug.callback(lambda s: seen.append(float(s)), jnp.sum(w))
        return 0.5 * h + jnp.sin(w) * x

    solve = rbpjax.rbp_solve(f, forward=rbpjax.FixedPointIteration(steps=5))
    jax.block_until_ready(jax.jit(solve)(jnp.ones(2), jnp.ones(2), jnp.zeros(2)))
    jax.effects_barrier()
    assert len(seen) == 6, "five steps, and one for the residual"


def test_an_output_that_h_does_not_reach():
    f = lambda w, x, h: {"a": jnp.sin(w) * x, "b": 0.5 * h["b"] + h["a"]}
    h0 = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    w, x = jnp.array([0.3, 0.4]), jnp.array([1.0, -2.0])
    solve = rbpjax.rbp_solve(f)
    np.testing.assert_allclose(solve(w, x, h0).value["b"], 2 * jnp.sin(w) * x)
    grad = jax.grad(lambda w: jnp.sum(solve(w, x, h0).value["b"]))(w)
    np.testing.assert_allclose(grad, 2 * jnp.cos(w) * x, rtol=1e-12)


def test_one_function_called_twice_keeps_its_variables_apart():
    inner = jax.jit(lambda a: jnp.sin(a))
    f = lambda w, x, h: 0.1 * h * inner(w) + inner(x) + inner(inner(w))
    step, args, h = close(f, jnp.ones(2), jnp.full(2, 0.7), jnp.zeros(2))
    rest, crossed = hoist(step, args, h)
    h = jnp.array([0.2, -0.5])
    np.testing.assert_array_equal(rest(crossed, h), step(args, h))
