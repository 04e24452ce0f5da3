"""The baselines: BPTT and TBPTT against loops written out by hand."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import pytest

import rbpjax
from tests.support.problems import IDENTITY_RTOL, PROBLEMS, assert_close, readout

PROBLEM = PROBLEMS["pytree"]
H0 = jax.tree.map(lambda x: x + 0.3, PROBLEM.h0)
T = 7


@cache
def by_hand(truncation=None):
    """Loss and gradients of T steps in a Python loop, cut ``truncation`` steps back."""

    def loss(params, inputs, h):
        for t in range(T):
            if truncation is not None and t == T - truncation:
                h = jax.lax.stop_gradient(h)
            h = PROBLEM.f(params, inputs, h)
        return readout(h)

    return gradient(loss)


def gradient(loss):
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(
        PROBLEM.params, PROBLEM.inputs, H0
    )


def loss_of(solve):
    return lambda params, inputs, h0: readout(solve(params, inputs, h0).value)


@pytest.mark.parametrize("remat", [False, True, 2, T], ids=str)
def test_bptt_is_the_loop(remat):
    """Value and gradients, of h0 too, with segments that divide T and that do not."""
    value, bars = gradient(loss_of(rbpjax.bptt(PROBLEM.f, T, remat=remat)))
    want_value, want = by_hand()
    chex.assert_trees_all_close(value, want_value, rtol=1e-14)
    for bar, wanted in zip(bars, want, strict=True):
        assert_close(bar, wanted, IDENTITY_RTOL)


@pytest.mark.parametrize("truncation", [1, 3, T - 1, T])
def test_tbptt_is_the_loop_cut_by_stop_gradient(truncation):
    """Value of T steps, gradient of the last ``truncation``; h0's is zero if cut."""
    value, bars = gradient(loss_of(rbpjax.bptt(PROBLEM.f, T, truncation=truncation)))
    # The cut is before step T - truncation: at T it is before the first, of h0 itself.
    want_value, want = by_hand(truncation if truncation < T else None)
    chex.assert_trees_all_close(value, want_value, rtol=1e-14)
    assert_close(bars[:2], want[:2], IDENTITY_RTOL)
    if truncation < T:
        chex.assert_trees_all_equal(bars[2], jax.tree.map(jnp.zeros_like, H0))
    else:
        assert_close(bars[2], want[2], IDENTITY_RTOL)


def test_convolutions_have_the_gradient_of_the_loop():
    """Whose body is rewritten: the kernel's gradient too, and all else in f."""
    key = jax.random.key(0)
    kernel, x = jax.random.normal(key, (3, 4, 2)), jax.random.normal(key, (2, 7, 4))
    params = {"down": kernel / 3, "up": kernel.transpose(0, 2, 1) / 3}

    def f(params, x, h):
        low = jnp.tanh(convolve(h, params["down"]))
        return jnp.tanh(convolve(low, params["up"]) + x * h[:, :1])

    def convolve(h, kernel):
        numbers = ("NHC", "HIO", "NHC")
        return jax.lax.conv_general_dilated(
            h, kernel, (1,), "SAME", dimension_numbers=numbers
        )

    def loop(params, x):
        h = 0.3 * x
        for _ in range(T):
            h = f(params, x, h)
        return h

    of = lambda run: jax.jit(jax.grad(lambda p, x: readout(run(p, x)), (0, 1)))
    got = of(lambda p, x: rbpjax.bptt(f, T)(p, x, 0.3 * x).value)(params, x)
    # T steps of sums of 12 products of O(1): some hundred roundings.
    chex.assert_trees_all_close(got, of(loop)(params, x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("remat", [False, True], ids=str)
def test_forward_mode_goes_through_bptt(remat):
    """jacfwd and jacrev of the last state agree, and with the loop's."""
    solve = rbpjax.bptt(PROBLEM.f, T, remat=remat)
    state = lambda x: solve(PROBLEM.params, x, H0).value["u"]

    def loop(x):
        h = H0
        for _ in range(T):
            h = PROBLEM.f(PROBLEM.params, x, h)
        return h["u"]

    want = jax.jit(jax.jacrev(loop))(PROBLEM.inputs)
    assert_close(jax.jit(jax.jacfwd(state))(PROBLEM.inputs), want, IDENTITY_RTOL)
    assert_close(jax.jit(jax.jacrev(state))(PROBLEM.inputs), want, IDENTITY_RTOL)


@pytest.mark.parametrize(
    "make", [lambda f: rbpjax.bptt(f, T), lambda f: rbpjax.bptt(f, T, truncation=3)]
)
def test_solution_reports_the_last_state(make):
    """Steps, and the residual of the returned state; no gradient through it."""
    solve = make(PROBLEM.f)
    solution = jax.jit(solve)(PROBLEM.params, PROBLEM.inputs, H0)
    step = partial(PROBLEM.f, PROBLEM.params, PROBLEM.inputs)
    norm = jnp.linalg.norm
    pairs = zip(
        *map(jax.tree.leaves, (solution.value, step(solution.value))), strict=True
    )
    largest = max(norm(v - u) / jnp.maximum(norm(u), norm(v)) for u, v in pairs)
    assert solution.num_steps == T and not solution.converged
    chex.assert_trees_all_close(solution.residual, largest, rtol=1e-9)
    residual = lambda params: solve(params, PROBLEM.inputs, H0).residual
    bars = jax.grad(residual)(PROBLEM.params)
    chex.assert_trees_all_equal(bars, jax.tree.map(jnp.zeros_like, bars))


def test_convergence_is_recognized():
    """Enough steps of a contraction are reported as converged."""
    solution = rbpjax.bptt(lambda a, x, h: a * h + x, 60)(0.5, 1.0, 0.0)
    assert solution.converged and solution.residual < 1e-12


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (lambda f: rbpjax.bptt(f, 0), "num_steps", "0"),
        (lambda f: rbpjax.bptt(f, 2.0), "num_steps", "2.0"),
        (lambda f: rbpjax.bptt(f, True), "num_steps", "True"),
        (lambda f: rbpjax.bptt(f, 5, remat=0), "remat", "0"),
        (lambda f: rbpjax.bptt(f, 5, remat=6), "remat", "6"),
        (lambda f: rbpjax.bptt(f, 5, remat="yes"), "remat", "yes"),
        (lambda f: rbpjax.bptt(f, 5, truncation=0), "truncation", "0"),
        (lambda f: rbpjax.bptt(f, 5, truncation=6), "truncation", "6"),
        (lambda f: rbpjax.bptt(f, -1, truncation=1), "num_steps", "-1"),
        (lambda f: rbpjax.bptt(f, 5, truncation=jnp.int32(2)), "truncation", "Array"),
    ],
)
def test_bad_counts(make, name, value):
    """A count out of range is a ValueError with the name, the value and the range."""
    with pytest.raises(ValueError, match=f"`{name}`.*at least.*{value}"):
        make(PROBLEM.f)
