"""What the state does not reach is computed outside the loops, by the compiler.

A promise to who writes a step as it reads best: a decomposition, a mask, the product of
the inputs with a matrix cost one evaluation in a solve. Nothing else may change.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from tests.support.hlo import whole_loops

N = 6


def reader(params, inputs, h):
    """A step as one writes it: everything in its place, nothing saved."""
    w = params["w"] + params["w"].T
    w = rbpjax.regularizers.spectral_normalize(w, 0.8)
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


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_nothing_that_the_state_does_not_reach_is_in_a_loop(wrap):
    """In the compiled program of value and gradient, forward and backward."""
    params, inputs, h0 = problem()
    # Of the default's two ways, Newton's linearizes in its loop, with what f computes.
    plain = rbpjax.FixedPointIteration()
    solve = rbpjax.rbp_solve(wrap(reader), forward=plain)
    loss = lambda p, i: jnp.sum(solve(p, i, h0).value ** 2)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, inputs).compile()
    text, loops = compiled.as_text(), whole_loops(compiled)
    for operation in (r"gesdd|gesvd|syevd", r" exponential\("):
        assert re.search(operation, text), "computed somewhere"
        assert not any(re.search(operation, loop) for loop in loops), operation
    # Random numbers are drawn by a loop, in which there is nothing else.
    draws = [loop for loop in loops if re.search(r"= u32\S* xor\(", loop)]
    assert draws and not any("f64[" in loop for loop in draws)
    inside = "\n".join(loops)
    # The dots left are those with h and the adjoint, all of the state's shape; none
    # contracts the three inputs.
    dots = re.findall(r"= f64\[(\S+?)\]\S* dot\(([^\n]*)", inside)
    assert dots
    assert {shape for shape, _ in dots} == {f"4,{N}"}
    assert not any("[4,3]" in arguments for _, arguments in dots)


@pytest.mark.full
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
        ours = jax.jit(order(loss(solve), argnums=(0, 1)))(*at)
        truth = jax.jit(order(loss(unrolled), argnums=(0, 1)))(*at)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def _directional(f, argnums):
    """Second order: the gradient of the gradient's square."""
    square = lambda *a: sum(
        jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(f, argnums=argnums)(*a))
    )
    return jax.grad(square, argnums=argnums)


def test_side_effects_stay_in_every_step():
    seen = []

    def f(w, x, h):
        jax.debug.callback(lambda s: seen.append(float(s)), jnp.sum(w))
        return 0.5 * h + jnp.sin(w) * x

    solve = rbpjax.rbp_solve(f, forward=rbpjax.FixedPointIteration(steps=5))
    jax.block_until_ready(jax.jit(solve)(jnp.ones(2), jnp.ones(2), jnp.zeros(2)))
    jax.effects_barrier()
    assert len(seen) == 7, "five steps, and two for the residual and its rate"


def test_an_output_that_h_does_not_reach():
    f = lambda w, x, h: {"a": jnp.sin(w) * x, "b": 0.5 * h["b"] + h["a"]}
    h0 = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    w, x = jnp.array([0.3, 0.4]), jnp.array([1.0, -2.0])
    solve = rbpjax.rbp_solve(f)
    np.testing.assert_allclose(solve(w, x, h0).value["b"], 2 * jnp.sin(w) * x)
    grad = jax.grad(lambda w: jnp.sum(solve(w, x, h0).value["b"]))(w)
    np.testing.assert_allclose(grad, 2 * jnp.cos(w) * x, rtol=1e-12)


@pytest.mark.full
def test_one_function_called_twice_keeps_its_variables_apart():
    """h = 0.1 h s(w) + s(x) + s(s(w)), s called four times: in closed form."""
    inner = jax.jit(lambda a: jnp.sin(a))
    f = lambda w, x, h: 0.1 * h * inner(w) + inner(x) + inner(inner(w))
    closed = lambda w, x: (jnp.sin(x) + jnp.sin(jnp.sin(w))) / (1 - 0.1 * jnp.sin(w))
    w, x = jnp.array([0.2, -0.5]), jnp.full(2, 0.7)
    solve = rbpjax.rbp_solve(f)
    found = lambda w, x: solve(w, x, jnp.zeros(2)).value
    np.testing.assert_allclose(found(w, x), closed(w, x), rtol=1e-11)
    total = lambda g: jax.grad(lambda w, x: jnp.sum(g(w, x)), (0, 1))(w, x)
    for a, b in zip(total(found), total(closed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)
