"""What the compiled gradient stores and computes: bytes, products, traces."""

import math

import chex
import jax
import jax.numpy as jnp
import pytest

import rbpjax
from rbpjax import RBP, CGNormal, FixedPointIteration, Neumann
from tests.support.hlo import assert_no_more, count, loop_bodies
from tests.support.problems import PROBLEMS, RULES, readout, replace, rows

rules = pytest.mark.parametrize("name", rows(RULES.keys()))
W = jax.random.normal(jax.random.key(0), (16, 16)) / 8
X = jax.random.normal(jax.random.key(1), (4, 16))


def tanh_rnn(w, x, h):
    return jnp.tanh(h @ w + x)


def loss_of(solve):
    return lambda w: jnp.sum(jnp.sin(solve(w, X, jnp.zeros_like(X)).value))


def temp_bytes(solve) -> int:
    """Temporary memory of the compiled gradient."""
    compiled = jax.jit(jax.grad(loss_of(solve))).lower(W).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def solver(rule, forward_steps=50):
    forward = FixedPointIteration(steps=forward_steps)
    return rbpjax.rbp_solve(tanh_rnn, forward=forward, backward=rule)


@rules
def test_memory_is_the_same_for_any_number_of_steps(name):
    """50 or 5,000 steps forward, 5 or 500 backward: the same bytes, to the byte."""
    # A bare callable has no budget to set, and stays as it is.
    backward = lambda k: replace(RULES[name], steps=k, max_steps=k)
    few, many = solver(backward(5), 50), solver(backward(500), 5000)
    assert 0 < temp_bytes(many) <= temp_bytes(few)


def test_memory_of_bptt_is_linear_in_the_steps():
    """BPTT stores each state; with remat about 2√T of them; RBP a few."""
    state = X.nbytes
    short, long = (temp_bytes(rbpjax.bptt(tanh_rnn, t)) for t in (50, 5000))
    # Per step at most what goes in and out of tanh.
    assert short < long <= short + 3 * 4950 * state
    short, long = (temp_bytes(rbpjax.bptt(tanh_rnn, t, remat=True)) for t in (50, 5000))
    growth = 2 * (5000**0.5 - 50**0.5) * state
    assert short < long <= short + 3 * growth
    assert temp_bytes(solver(CGNormal())) < 50 * state
    short, long = (
        temp_bytes(rbpjax.bptt(tanh_rnn, t, truncation=20)) for t in (50, 5000)
    )
    assert long <= short


PRODUCT = r" dot\(|custom_call_target=\"[^\"]*(?:gemm|matmul|dot)"


@pytest.mark.parametrize(
    ("rule", "products"),
    [
        (Neumann(steps=20), [1]),
        # A block's last product stands in the loop around, which looks at the rest.
        (Neumann(), [1, 1]),
        (RBP(), [1]),
        (RBP(FixedPointIteration(damping=0.3)), [1]),
        # Inner loop: one VJP and one JVP; each restart one of each more.
        (CGNormal(), [2, 2]),
    ],
    ids=repr,
)
def test_products_in_a_backward_step(rule, products):
    """Compiled: one product with W for a VJP, two for VJP and JVP, and no tanh."""
    h = jnp.zeros_like(X)
    bars = lambda w, h, g: rbpjax.rbp_vjp(tanh_rnn, w, X, h, g, backward=rule)[0]
    compiled = jax.jit(bars).lower(W, h, h).compile()
    bodies = loop_bodies(compiled)
    assert_no_more([count(PRODUCT, body) for body in bodies], products)
    assert sum(count(r" tanh\(", body) for body in bodies) == 0
    assert count(r" tanh\(", compiled.as_text()) <= 1  # the linearization, outside


@rules
def test_f_is_traced_once(name):
    """A gradient, forward and backward, runs the Python of f one time."""
    calls = []

    def f(w, x, h):
        calls.append(1)
        return tanh_rnn(w, x, h)

    solve = rbpjax.rbp_solve(f, backward=RULES[name])
    jax.jit(jax.grad(loss_of(solve))).trace(W)
    assert len(calls) == 1


@rules
def test_equal_strategies_share_one_compilation(name):
    """Strategies equal in value are one cache key, as static pytrees through jit."""
    if name == "callable":
        pytest.skip("a function is a cache key of its own, not a strategy")
    problem = PROBLEMS["linear"]
    chex.clear_trace_counter()  # which goes by the function's name

    @jax.jit
    @chex.assert_max_traces(n=1)
    def grad(rule, forward, w):
        solve = rbpjax.rbp_solve(problem.f, forward=forward, backward=rule)
        loss = lambda w: readout(solve(w, problem.inputs, problem.h0).value)
        return jax.grad(loss)(w)

    first, second = replace(RULES[name]), replace(RULES[name])
    assert first is not second and first == second
    one = grad(first, FixedPointIteration(tol=1e-12), problem.params)
    two = grad(second, FixedPointIteration(tol=1e-12), problem.params)
    chex.assert_trees_all_equal(one, two)
    with pytest.raises(AssertionError, match="traced"):
        grad(first, FixedPointIteration(tol=1e-11), problem.params)


@rules
def test_only_arguments_and_fixed_point_are_saved(name):
    """Between forward and backward: params, inputs and h*, once each, no history."""

    def saved(steps):
        solve = rbpjax.rbp_solve(
            tanh_rnn, forward=FixedPointIteration(steps=steps), backward=RULES[name]
        )
        value = lambda w, x: solve(w, x, jnp.zeros_like(X)).value
        _, pullback = jax.eval_shape(lambda w, x: jax.vjp(value, w, x), W, X)
        return sorted(leaf.shape for leaf in jax.tree.leaves(pullback))

    size = lambda shapes: sum(map(math.prod, shapes))
    assert 0 < size(saved(50)) <= size([W.shape, X.shape, X.shape])
    assert size(saved(5000)) <= size(saved(50))
