"""The exponential of skew-Hermitian matrices and its derivatives."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.scipy.linalg import expm
from jax.test_util import check_grads

from rbpjax.unitary import expm_skew

METHODS = ("taylor", "pade", "eigh")
methods = pytest.mark.parametrize("method", METHODS)


def skew(w):
    w = jax.lax.complex(w[0], w[1])
    return (w - jnp.conj(jnp.swapaxes(w, -1, -2))) / 2


def weights(key):
    """Five matrices: zero, a multiple of 1, a triple eigenvalue, two generic ones."""
    w = jax.random.normal(key, (2, 5, 4, 4))
    w = w.at[:, :2].set(0.0).at[1, 1].set(jnp.eye(4))
    return w.at[0, 2].set(0.0).at[1, 2].set(jnp.diag(jnp.array([1.0, 1.0, 1.0, -2.0])))


def series(s):
    """Σ Sⁿ/n!, with no eigenvalues and no squaring; 50 terms reach 1e-16 at ‖S‖ = 9."""
    one = jnp.broadcast_to(jnp.eye(s.shape[-1], dtype=s.dtype), s.shape)
    n = jnp.arange(50, 0, -1).astype(s.dtype)
    return jax.lax.scan(lambda u, n: (one + s @ u / n, None), one, n)[0]


def loss(exponential, key):
    c = jax.random.normal(key, (2, 5, 4, 4))

    def value(w):
        u = exponential(skew(w))
        return jnp.sum(u.real * c[0] + u.imag * c[1] + u.real**3)

    return value


def test_equals_the_general_exponential_and_is_unitary(key):
    """exp(S) agrees with Padé approximation; UᴴU = 1 also at large norm."""
    s = skew(weights(key)).at[4].multiply(20.0)
    u = expm_skew(s)
    # The largest norm here is about 100, so the oracle squares 6 times.
    chex.assert_trees_all_close(u, jax.jit(expm)(s), rtol=0, atol=1e-12)
    gram = jnp.conj(jnp.swapaxes(u, -1, -2)) @ u
    chex.assert_trees_all_close(
        gram,
        jnp.broadcast_to(jnp.eye(4, dtype=complex), gram.shape),
        rtol=0,
        atol=1e-14,
    )


ORDERS = {
    "reverse": lambda f, w, v: jax.grad(f)(w),
    "forward": lambda f, w, v: jax.jvp(f, (w,), (v,))[1],
    "reverse over reverse": lambda f, w, v: jax.grad(
        lambda w: jnp.vdot(jax.grad(f)(w), v)
    )(w),
    "forward over reverse": lambda f, w, v: jax.jvp(jax.grad(f), (w,), (v,))[1],
    "reverse over forward": lambda f, w, v: jax.grad(
        lambda w: jax.jvp(f, (w,), (v,))[1]
    )(w),
    "third": lambda f, w, v: jax.jvp(
        lambda w: jax.jvp(jax.grad(f), (w,), (v,))[1], (w,), (v,)
    )[1],
}


FULL = {"forward", "reverse over forward", "third"}


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(order, marks=pytest.mark.full if order in FULL else ())
        for order in ORDERS
    ],
)
def test_derivatives_equal_those_of_the_power_series(key, order):
    """Every mode and order is right, degenerate eigenvalues included."""
    derivative = ORDERS[order]
    w, v = weights(key), jax.random.normal(jax.random.key(2), (2, 5, 4, 4))
    ours = jax.jit(lambda w: derivative(loss(expm_skew, key), w, v))(w)
    theirs = jax.jit(lambda w: derivative(loss(series, key), w, v))(w)
    # ‖S‖ ~ 4: the series cancels e⁴ and loses two digits.
    scale = jnp.max(jnp.abs(theirs))
    assert scale > 1.0
    chex.assert_trees_all_close(ours / scale, theirs / scale, rtol=0, atol=1e-12)


@pytest.mark.full
def test_derivative_against_finite_differences(key):
    """The rule agrees with the function itself, to second order."""
    w = weights(key)[:, :4, :3, :3]
    f = jax.jit(lambda w: expm_skew(skew(w)).real)
    check_grads(f, (w,), order=2, modes=("fwd", "rev"), rtol=1e-5, atol=1e-5)


def test_linear_in_the_direction_with_the_right_transpose(key):
    """⟨c, L(S, E)⟩ = ⟨L*(S, c), E⟩ for a direction that is not skew."""
    s = skew(weights(key))
    e, c = (
        jax.lax.complex(*jax.random.normal(k, (2, *s.shape)))
        for k in jax.random.split(key)
    )
    forward = lambda e: jax.jvp(expm_skew, (s,), (e,))[1]
    back = jax.linear_transpose(forward, e)(c)[0]
    # JAX transposes without conjugating, hence plain sums.
    chex.assert_trees_all_close(jnp.sum(c * forward(e)), jnp.sum(back * e), rtol=1e-12)


def test_vmap_is_the_loop_over_matrices(key):
    """Batching, over either argument alone and both, changes nothing."""
    s = skew(weights(key))
    e = skew(jax.random.normal(key, (2, 5, 4, 4)))
    l = jax.jit(lambda s, e: jax.jvp(expm_skew, (s,), (e,))[1])
    loop = jnp.stack([l(s[i], e[i]) for i in range(5)])
    chex.assert_trees_all_close(jax.vmap(l)(s, e), loop, rtol=0, atol=1e-14)
    one = jax.vmap(l, (None, 1), 1)(s[3], jnp.swapaxes(e, 0, 1))
    loop = jnp.stack([l(s[3], e[i]) for i in range(5)], 1)
    chex.assert_trees_all_close(one, loop, rtol=0, atol=1e-14)
    other = jax.vmap(l, (0, None))(s, e[3])
    loop = jnp.stack([l(s[i], e[3]) for i in range(5)])
    chex.assert_trees_all_close(other, loop, rtol=0, atol=1e-14)


def test_second_derivative_fails_loudly_beyond_its_range():
    """Where the squarings do not suffice the second derivative is NaN, not wrong."""
    f = lambda a: expm_skew(skew(a * jnp.array([[[0.0, 1.0], [-1.0, 0.0]]] * 2)))[0, 1]
    second = jax.jit(jax.grad(jax.grad(lambda a: f(a).real)))
    # e^{aS} with S = (1 + i)/2·W - h.c. = [[0, 1 + i], ...]: an oscillation of a.
    assert jnp.isnan(second(1e6))
    chex.assert_tree_all_finite(second(1e3))


def test_keeps_single_precision(key):
    """complex64 in, complex64 out, with gradients of float32 accuracy."""
    w = weights(key)[:, :4]
    grad = jax.jit(jax.grad(lambda w: jnp.sum(expm_skew(skew(w)).real)))
    single = grad(w.astype(jnp.float32))
    assert single.dtype == jnp.float32
    # A few hundred roundings of 6e-8 relative to entries of order one.
    chex.assert_trees_all_close(single.astype(float), grad(w), rtol=0, atol=2e-5)


def matrices(kind, size, number=None):
    """Skew matrices with a 2-norm of one, not symmetric in any way."""
    rng = np.random.default_rng(size)
    shape = (size, size) if number is None else (number, size, size)
    w = rng.normal(size=shape)
    w = w + 1j * rng.normal(size=shape) if kind == "complex" else w
    s = w - np.conj(np.swapaxes(w, -1, -2))
    return s / np.linalg.norm(s, 2, (-2, -1), keepdims=True)


@methods
@pytest.mark.parametrize(("kind", "size"), [("real", 4), ("complex", 3), ("real", 17)])
def test_every_method_is_the_exponential_of_scipy(method, kind, size):
    """To the rounding of S, ε‖S‖, which each squaring doubles; the dtype is kept."""
    f = jax.jit(expm_skew, static_argnames="method")
    for norm in (0.0, 1e-9, 0.7, 0.8, 3.0, 50.0, 3000.0):
        s = norm * matrices(kind, size)
        got = f(jnp.array(s), method=method)
        assert got.dtype == s.dtype
        want = scipy.linalg.expm(s)
        tol = 20 * np.finfo(float).eps * max(1, norm) * size**0.5
        np.testing.assert_allclose(got, want, rtol=0, atol=tol, err_msg=f"{norm}")


FEW = {("float32", 3), ("complex64", 16), ("complex128", 3), ("float64", 16)}


@methods
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        pytest.param(
            dtype, size, marks=() if (dtype, size) in FEW else pytest.mark.full
        )
        for dtype in ("float32", "float64", "complex64", "complex128")
        for size in (3, 16, 65)
    ],
)
def test_unitary_to_rounding_at_any_norm(method, dtype, size):
    """|UᴴU - 1| ≤ 4 (C + 4) u: what the last Newton step itself rounds.

    It takes UᴴU with errors of Cu in the real parts and as much in the imaginary ones,
    adds half of that to U, and rounds the sum; anything before is squared away.
    """
    s = matrices("complex" if "complex" in dtype else "real", size, 2)
    info = jnp.finfo(dtype)
    f = jax.jit(expm_skew, static_argnames="method")
    largest = float(info.max) / 8
    for norm in (0.0, float(info.tiny), 1e-5, 1.0, 40.0, 1e4, 1e8, 1e30, largest):
        u = np.asarray(f(jnp.array(norm * s, dtype), method=method))
        assert u.dtype == dtype
        u = u.astype(np.clongdouble)
        gram = np.conj(np.swapaxes(u, -1, -2)) @ u
        error = np.max(np.abs(gram - np.eye(size)))
        assert error <= 4 * (size + 4) * info.eps / 2, norm


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=pytest.mark.full if m == "pade" else ()) for m in METHODS],
)
def test_gradients_of_every_method_real_and_complex(method):
    """Reverse and forward mode against those of JAX's Padé, and vmap over both."""
    general = jax.jit(expm)
    for kind in ("real", "complex"):
        s = jnp.array(3 * matrices(kind, 5, 3)).at[0].multiply(0.0)
        e = jnp.array(np.random.default_rng(1).normal(size=(2, 3, 5, 5)), s.dtype)
        c = e[1] * 1.5 + 0.5
        forward = lambda f, s, e: jax.jvp(f, (s,), (e,))[1]
        ours = lambda s: expm_skew(s, method=method)
        got = forward(ours, s, e[0])
        # A direction of no symmetry is right too: L is the derivative on all matrices.
        want = forward(general, s, e[0])
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
        got = jax.jit(jax.vjp(ours, s)[1])(c)[0]
        want = jax.vjp(general, s)[1](c)[0]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
        along = partial(forward, ours, s)
        many = jax.vmap(along)(e)
        one_by_one = jnp.stack([along(a) for a in e])
        np.testing.assert_allclose(many, one_by_one, rtol=0, atol=1e-14)


@methods
def test_what_is_not_finite_stays_in_its_matrix(method):
    """Of a batch with a NaN, an infinity and a huge matrix the others are right."""
    s = matrices("real", 4, 5)
    bad = jnp.array(s).at[1, 0, 1].set(jnp.nan).at[2, 3, 0].set(jnp.inf)
    bad = bad.at[3].multiply(1e200)
    u = expm_skew(bad, method=method)
    for good in (0, 4):
        np.testing.assert_allclose(u[good], scipy.linalg.expm(s[good]), atol=1e-14)
    assert not np.isfinite(u[1]).any() and not np.isfinite(u[2]).any()
    assert np.isfinite(u[3]).all()


def test_what_is_no_skew_matrix_is_named():
    """Dtype, shape and method."""
    for call, words in (
        (lambda: expm_skew(jnp.zeros((2, 2), int)), "`s` must be a floating.*int64"),
        (lambda: expm_skew([[0.0]]), "`s` must be a floating-point.*list"),
        (lambda: expm_skew(jnp.zeros((2, 3))), r"square matrices; got \(2, 3\)"),
        (lambda: expm_skew(jnp.zeros((2, 2)), method="cayley"), "'eigh'; got 'cayley'"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
