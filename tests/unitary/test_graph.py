"""Unitary convolution on graphs against dense exponentials."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from rbpjax.unitary import graph_exp, normalized_adjacency, orthogonal_exp

NODES, CHANNELS = 9, 3
RNG = np.random.default_rng(0)
# A graph with a loop, a double edge and a node without edges (8).
SENDERS = np.array([0, 1, 2, 3, 4, 5, 6, 0, 2, 2, 7, 3])
RECEIVERS = np.array([1, 2, 3, 4, 5, 6, 0, 3, 5, 5, 7, 7])
WEIGHTS = RNG.uniform(0.5, 2, len(SENDERS))
X = RNG.normal(size=(NODES, CHANNELS)) + 1j * RNG.normal(size=(NODES, CHANNELS))
MIX = RNG.normal(size=(2, CHANNELS, CHANNELS))


def dense(weights):
    """D^{-1/2} A D^{-1/2} edge by edge."""
    a = np.zeros((NODES, NODES))
    for i, j, w in zip(SENDERS, RECEIVERS, weights, strict=True):
        a[i, j] += w
        if i != j:
            a[j, i] += w
    d = a.sum(1)
    half = np.array([x**-0.5 if x else 0 for x in d])
    return half[:, None] * a * half


def propagate(weights=WEIGHTS):
    made = jnp.asarray(weights)
    return normalized_adjacency(SENDERS, RECEIVERS, NODES, weights=made)


def test_the_product_is_that_of_the_dense_matrix():
    """Real and complex, weighted and not; its norm is at most one."""
    for weights in (WEIGHTS, np.ones(len(SENDERS))):
        a = dense(weights)
        got = propagate(weights)(jnp.array(X))
        np.testing.assert_allclose(got, a @ X, rtol=0, atol=1e-15 * 10)
        assert np.linalg.norm(a, 2) <= 1 + 1e-15
    plain = normalized_adjacency(SENDERS, RECEIVERS, NODES)(jnp.array(X.real))
    np.testing.assert_allclose(plain, a @ X.real, rtol=0, atol=1e-15 * 10)
    assert not got[8].any()


@pytest.mark.parametrize("time", [0.0, 0.3, -1.0, 7.5])
def test_equals_the_dense_exponential_and_keeps_the_norm(time):
    """e^{itA} X U, to a few ε a step; real features are taken too."""
    u = orthogonal_exp(jax.lax.complex(*jnp.array(MIX)))
    want = scipy.linalg.expm(1j * time * dense(WEIGHTS)) @ X @ np.asarray(u)
    got = graph_exp(propagate(), jnp.array(X), time, mix=u)
    # The sums of a step have e times the size of their result at most.
    tol = 30 * np.finfo(float).eps * max(1, abs(time))
    np.testing.assert_allclose(got, want, rtol=0, atol=tol * np.abs(X).max())
    norm = jnp.linalg.norm
    np.testing.assert_allclose(norm(got), norm(X), rtol=tol)
    back = graph_exp(propagate(), got @ jnp.conj(u.T), -time)
    np.testing.assert_allclose(back, X, rtol=0, atol=10 * tol)
    real = graph_exp(propagate(), jnp.array(X.real), time)
    want = scipy.linalg.expm(1j * time * dense(WEIGHTS)) @ X.real
    np.testing.assert_allclose(real, want, rtol=0, atol=10 * tol)


def test_the_norm_is_kept_over_a_thousand_layers_in_float32():
    """Not lost as by the plain product, which makes all features alike."""
    x, a = jnp.array(X, jnp.complex64), propagate(WEIGHTS.astype(np.float32))
    layer = lambda _, y: graph_exp(a, y, 0.7)
    later = jax.jit(lambda x: jax.lax.fori_loop(0, 1000, layer, x))(x)
    assert later.dtype == jnp.complex64
    ratio = jnp.linalg.norm(later) / jnp.linalg.norm(x)
    # 1,000 remainders of 0.7¹¹/11! = 5e-10, and as many roundings, at random.
    assert abs(ratio - 1) < 1e-4
    faded = jax.lax.fori_loop(0, 1000, lambda _, y: a(y), x)
    assert np.linalg.matrix_rank(np.asarray(faded[:8]), tol=1e-3) == 1
    assert np.linalg.matrix_rank(np.asarray(later[:8]), tol=1e-3) == CHANNELS


@pytest.mark.parametrize("terms", [1, 3, 6, 12])
def test_the_error_is_within_its_bound_and_near_it(terms):
    """r^(m+1)/(m+1)!, of an eigenvector whose eigenvalue is the norm."""
    values, vectors = np.linalg.eigh(dense(WEIGHTS))
    x = jnp.array(vectors[:, -1:])
    assert abs(values[-1] - 1) < 1e-14
    for steps in (1, 4):
        got = graph_exp(propagate(), x, 1.0, steps=steps, terms=terms)
        error = np.linalg.norm(got - np.exp(1j) * vectors[:, -1:])
        r = 1 / steps
        one = r ** (terms + 1) / math.factorial(terms + 1) / (1 - r / (terms + 2))
        # Errors of several steps add, each grown by the others' as (1 + one) at most.
        bound = steps * one * (1 + one) ** (steps - 1)
        assert 0.5 * bound < error + 1e-15 and error < bound + 1e-15


def test_derivatives_in_time_features_channels_and_edges():
    """Forward and reverse against those of the dense exponential of JAX."""
    c = jnp.array(RNG.normal(size=(2, NODES, CHANNELS)))
    matrix = jax.jit(jax.scipy.linalg.expm)

    def loss(exponential, time, x, mix, weights):
        u = orthogonal_exp(jax.lax.complex(mix[0], mix[1]))
        y = exponential(weights, x, time, u)
        return jnp.sum(c[0] * y.real + c[1] * y.imag**2)

    def ours(weights, x, time, u):
        return graph_exp(propagate(weights), x, time, mix=u, steps=3)

    def theirs(weights, x, time, u):
        a = propagate(weights)(jnp.eye(NODES))
        return matrix(1j * (time * a).astype(complex)) @ x.astype(complex) @ u

    args = (jnp.array(2.5), jnp.array(X.real), jnp.array(MIX), jnp.array(WEIGHTS))
    grads = [
        jax.jit(jax.grad(lambda *a, e=e: loss(e, *a), (0, 1, 2, 3)))(*args)
        for e in (ours, theirs)
    ]
    # Sums of some hundred products of numbers of order one.
    chex.assert_trees_all_close(*grads, rtol=1e-11, atol=1e-12)
    along = jax.jvp(lambda *a: loss(ours, *a), args, args)[1]
    inner = sum(jnp.vdot(a, b) for a, b in zip(grads[1], args, strict=True))
    np.testing.assert_allclose(along, inner, rtol=1e-11)
    assert all(jnp.any(g != 0) for g in grads[0])


def test_traced_times_vmap_and_the_time_that_was_not_promised():
    """A batch of times is each of them; beyond ``steps`` there is NaN, no number."""
    times = jnp.array([0.5, -2.0, 2.0, 2.1])
    many = jax.vmap(lambda t: graph_exp(propagate(), X, t, steps=2))(times)
    for i in range(3):
        one = graph_exp(propagate(), X, float(times[i]), steps=2)
        chex.assert_trees_all_close(many[i], one, rtol=0, atol=1e-14)
    assert jnp.isnan(many[3]).all()


def test_bad_calls_are_named():
    """Shapes, counts, times without steps, products of another shape."""
    a, x = propagate(), jnp.array(X)
    for call, words in (
        (lambda: graph_exp(a, x[0]), r"`x` must be.*\[nodes, C\]"),
        (lambda: graph_exp(a, jnp.ones((9, 3), int)), "`x` must be.*int64"),
        (lambda: graph_exp(a, x, mix=jnp.eye(2)), r"`mix` must.*\(3, 3\)"),
        (lambda: graph_exp(a, x, jnp.array(1.0)), "`steps` must be given"),
        (lambda: graph_exp(a, x, 3.0, steps=2), "`steps` must be at least.*3; got 2"),
        (lambda: graph_exp(a, x, steps=0), "`steps` must be a Python int"),
        (lambda: graph_exp(a, x, terms=1.5), "`terms` must be a Python int"),
        (lambda: graph_exp(a, x, norm=0), "`norm` must be"),
        (lambda: graph_exp(lambda v: v[1:], x), "`propagate` must return"),
        (lambda: normalized_adjacency(SENDERS, RECEIVERS[1:], 9), "of one length"),
        (lambda: normalized_adjacency(SENDERS, RECEIVERS, 9.0), "`nodes` must be"),
        (
            lambda: normalized_adjacency(SENDERS, RECEIVERS, 9, weights=WEIGHTS[1:]),
            "`weights` must have",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
