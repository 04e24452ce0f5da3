"""Dense orthogonal matrices against other formulas, and the cell over them."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from rbpjax.unitary import (
    DenseCell,
    activation,
    orthogonal_cayley,
    orthogonal_exp,
    orthogonal_householder,
    recomputed_scan,
)
from rbpjax.unitary.history import HistoryReport, Inverse, Replay


def exp_by_scipy(w):
    return scipy.linalg.expm((w - w.conj().T) / 2)


def cayley_by_inverse(w):
    s, one = (w - w.conj().T) / 2, np.eye(len(w))
    return np.linalg.inv(one - s / 2) @ (one + s / 2)


def product_of_reflections(w):
    out = np.eye(w.shape[1])
    for v in w:
        out = out @ (np.eye(len(v)) - 2 * np.outer(v, v.conj()) / np.vdot(v, v).real)
    return out


ORACLES = {
    "exp": (orthogonal_exp, exp_by_scipy),
    "cayley": (orthogonal_cayley, cayley_by_inverse),
    "householder": (orthogonal_householder, product_of_reflections),
}
makers = pytest.mark.parametrize("name", ORACLES)


def weights(kind, rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(rows, columns))
    return w + 1j * rng.normal(size=w.shape) if kind == "complex" else w


@makers
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_equals_its_formula(name, kind):
    """To a few roundings of ‖W‖ ~ 5, of odd and even size; batches are their rows."""
    make, oracle = ORACLES[name]
    for rows, columns in ((5, 5), (1, 1), (2, 7), (4, 4)):
        if name != "householder" and rows != columns:
            continue
        w = weights(kind, rows, columns)
        got = make(jnp.array(w))
        assert got.dtype == w.dtype
        np.testing.assert_allclose(got, oracle(w), rtol=0, atol=3e-14)
        assert np.max(np.abs(oracle(w) - np.eye(columns))) > 0.5 or columns == 1
    many = np.stack([w, 2 * w[::-1]])
    each = [oracle(x) for x in many]
    np.testing.assert_allclose(jax.vmap(make)(many), each, rtol=0, atol=3e-14)
    np.testing.assert_allclose(jax.jit(make)(many), each, rtol=0, atol=3e-14)


@makers
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_orthogonal_to_rounding_for_all_weights(name, dtype):
    """Any norm, weights of very different size, of low rank, parallel vectors, zero.

    The bound of the Newton step, 4 (N + 4) u (see test_expm); of K reflections 8 K u
    each way for the K inner products, the K sums of the solve and of the product.
    """
    make, _ = ORACLES[name]
    make = jax.jit(make)
    kind = "complex" if "complex" in dtype else "real"
    info, n = jnp.finfo(dtype), 13
    base = weights(kind, n, n)
    base = base / np.abs(base).max()
    low = np.outer(base[0], base[1].conj())
    cases = [norm * base for norm in (0.0, 1e-20, 1.0, 30.0, 1e4, 1e7, 1e12, 1e30)]
    cases += [float(info.tiny) * base, float(info.max) / 16 * base]
    cases += [np.diag(np.logspace(-20, 20, n)) @ base, low, 1e9 * low]
    cases += [base + 1e6 * np.roll(np.eye(n), 1, 0), np.ones((n, n)) * base[0]]
    for i, w in enumerate(cases):
        u = np.asarray(make(jnp.array(w, dtype))).astype(np.clongdouble)
        error = np.max(np.abs(np.conj(u.T) @ u - np.eye(n)))
        bound = 8 * n if name == "householder" else 4 * (n + 4)
        assert error <= bound * info.eps / 2, (i, error)


def test_cayley_where_the_solve_has_no_digits_left():
    """A cross product at 1e9: one axis is kept, the plane is turned by π."""
    axis = np.array([2.0, -1.0, 2.0]) / 3
    cross = np.cross(np.eye(3), axis)
    want = 2 * np.outer(axis, axis) - np.eye(3)
    # The rounding of S moves the angle of the axis, which is zero, by ε‖S‖.
    got = orthogonal_cayley(jnp.array(1e9 * cross))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    # In a batch the others are as alone.
    many = orthogonal_cayley(jnp.array([1e20 * cross, cross, np.nan * cross]))
    alone = cayley_by_inverse(cross)
    np.testing.assert_allclose(many[1], alone, rtol=0, atol=1e-14)
    assert np.isnan(many[2]).all()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cayley", "complex"),
        ("householder", "real"),
        pytest.param("exp", "real", marks=pytest.mark.full),
        pytest.param("exp", "complex", marks=pytest.mark.full),
        pytest.param("cayley", "real", marks=pytest.mark.full),
        pytest.param("householder", "complex", marks=pytest.mark.full),
    ],
)
def test_derivatives_in_every_mode(name, kind):
    """Forward, reverse and second order against differences of the other formula."""
    make, oracle = ORACLES[name]
    n = 3
    join = lambda p: jax.lax.complex(p[0], p[1])
    if kind == "real":
        join = lambda p: p[0]
    rng = np.random.default_rng(3)
    w, v, c, d = rng.normal(size=(4, 2, n, n))

    def loss(p, make=make):
        u = make(join(p))
        return (c[0] * u.real + c[1] * u.imag + d[0] * u.real**2).sum()

    at = lambda t: loss(w + t * v, lambda w: oracle(np.asarray(w)))
    first = (at(1e-4) - at(-1e-4)) / 2e-4
    second = (at(1e-3) - 2 * at(0) + at(-1e-3)) / 1e-6
    w, v = jnp.array(w), jnp.array(v)
    along = lambda f: jax.jvp(f, (w,), (v,))[1]
    # Differences of the second order: errors of 1e-8 and 1e-6 times derivatives.
    np.testing.assert_allclose(along(loss), first, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(w), v), first, atol=1e-6)
    hessian = lambda g: jnp.vdot(g(w), v)
    reverse = hessian(jax.grad(lambda w: jnp.vdot(jax.grad(loss)(w), v)))
    np.testing.assert_allclose(reverse, second, rtol=1e-4, atol=1e-4)
    both = jnp.vdot(along(jax.grad(loss)), v)
    np.testing.assert_allclose(both, reverse, rtol=1e-10)
    other = jax.grad(lambda w: jax.jvp(loss, (w,), (v,))[1])(w)
    np.testing.assert_allclose(jnp.vdot(other, v), reverse, rtol=1e-10)
    jacobian = jax.jacfwd(loss)(w), jax.jacrev(loss)(w)
    chex.assert_trees_all_close(*jacobian, rtol=1e-11, atol=1e-13)


def test_derivatives_at_zero_and_of_a_vector_without_direction():
    """S = 0 has equal eigenvalues; a vector of zeros has no gradient."""
    zero = jnp.zeros((4, 4))
    c = jnp.array(weights("real", 4, 4))
    for make in (orthogonal_exp, orthogonal_cayley):
        grad = jax.grad(lambda w, make=make: jnp.vdot(c, make(w)))(zero)
        chex.assert_trees_all_close(grad, (c - c.T) / 2, rtol=1e-14)
    w = c.at[1].set(0.0)
    u, grad = jax.value_and_grad(lambda w: jnp.vdot(c, orthogonal_householder(w)))(w)
    rest = jnp.delete(w, 1, 0)
    chex.assert_trees_all_close(u, jnp.vdot(c, orthogonal_householder(rest)))
    assert not grad[1].any() and jnp.isfinite(grad).all() and grad[0].any()
    # No reflection sees the length of its vector, in float32 either.
    for size in (1e-30, 1e30):
        again = orthogonal_householder((w * size).astype(jnp.float32))
        chex.assert_trees_all_close(
            again, orthogonal_householder(w).astype(jnp.float32), atol=1e-6
        )


def problem(name, kind, steps):
    make, _ = ORACLES[name]
    cell = DenseCell(size=12, matrix=make, complex_valued=kind == "complex")
    drawn = cell.init(jax.random.key(0), inputs=3, outputs=2, scale=1.0, reflections=12)
    xs = jax.random.normal(jax.random.key(1), (steps, 3)) / 10
    h0 = jnp.ones(12).astype(cell.start().dtype) / 3

    def loss(scan, drawn, xs, h0, probe=None):
        params = cell.prepare(drawn)
        h = scan(params, xs, h0, probe)
        return jnp.sum(jnp.sin(cell.readout(params, h)))

    def stored(params, xs, h0, _):
        return jax.lax.scan(lambda h, x: (cell(params, x, h), None), h0, xs)[0]

    def recomputed(history, params, xs, h0, probe):
        return recomputed_scan(cell, params, xs, h0, history=history, probe=probe)[0]

    return cell, loss, stored, recomputed, (drawn, xs, h0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cayley", "real"),
        pytest.param("exp", "complex", marks=pytest.mark.full),
        pytest.param("householder", "complex", marks=pytest.mark.full),
    ],
)
def test_norms_and_recomputed_gradients_over_1000_steps(name, kind):
    """The linear cell keeps ‖h‖ and ‖∂L/∂h₀‖; gradients are the stored ones."""
    cell, loss, stored, recomputed, args = problem(name, kind, 1000)
    params, _, h0 = cell.prepare(args[0]), *args[1:]
    end, pull = jax.vjp(lambda h: stored(params, jnp.zeros((1000, 3)), h, None), h0)
    # 1,000 products, each with an error of 12 ε at most.
    close = partial(np.testing.assert_allclose, rtol=1000 * 12 * 2.2e-16)
    close(jnp.linalg.norm(end), jnp.linalg.norm(h0))
    g = jnp.arange(12.0).astype(h0.dtype)
    close(jnp.linalg.norm(pull(g)[0]), jnp.linalg.norm(g))
    assert jnp.linalg.norm(end - h0) > 0.1
    for history in (Inverse(inverse=cell.inverse), Replay(slots=8)):
        grads = jax.jit(
            jax.grad(partial(loss, partial(recomputed, history)), (0, 1, 3))
        )
        *got, report = grads(*args, HistoryReport.zeros())
        want = jax.jit(jax.grad(partial(loss, stored), (0, 1)))(*args)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            # The same products, of gradients that are sums over 1,000 steps.
            assert jnp.linalg.norm(a - b) <= 1e-11 * jnp.linalg.norm(b)
        assert report.drift < 1e-12


def test_step_inverse_and_readout_by_their_formulas():
    """φ(U h + B x), its inverse, Re(C h) + bias, for each φ that has one."""
    rng = np.random.default_rng(0)
    for phi in (activation.identity, activation.saturate):
        cell = DenseCell(size=6, activation=phi)
        drawn = cell.init(jax.random.key(0), inputs=2, outputs=3, scale=1.0)
        params = cell.prepare(drawn._replace(bias=jnp.arange(3.0)))
        h = jnp.array(rng.normal(size=6) + 1j * rng.normal(size=6))
        x = jnp.array([0.5, -1.0])
        inner = params.matrix @ h + params.encoder @ x.astype(complex)
        chex.assert_trees_all_close(cell(params, x, h), phi(inner), rtol=1e-14)
        back = cell.inverse(params, x, cell(params, x, h))
        chex.assert_trees_all_close(back, h, rtol=0, atol=1e-13)
        out = (params.decoder @ h).real + jnp.arange(3.0)
        chex.assert_trees_all_close(cell.readout(params, h), out, rtol=1e-13)
        assert not hasattr(jax.make_jaxpr(cell)(params, x, h), "expm")
        assert "expm" not in str(jax.make_jaxpr(cell)(params, x, h))


def test_bad_weights_and_cells_are_named():
    """Shapes, dtypes, parameters of another cell."""
    cell = DenseCell(size=4, complex_valued=False)
    params = cell.prepare(cell.init(jax.random.key(0)))
    other = DenseCell(size=5).prepare(DenseCell(size=5).init(jax.random.key(0)))
    kept = DenseCell(size=4, activation=activation.modulus)
    for call, words in (
        (lambda: orthogonal_exp(jnp.ones((2, 3))), r"`weights`.*square.*\(2, 3\)"),
        (lambda: orthogonal_cayley(jnp.ones(3)), r"`weights`.*\(3,\)"),
        (lambda: orthogonal_householder(jnp.ones((2, 3), int)), "`weights`.*int64"),
        (lambda: orthogonal_exp(jnp.ones((2, 2)), method="x"), "`method` must be"),
        (lambda: DenseCell(size=0), "`size` must be"),
        (lambda: DenseCell(size=4, matrix=3), "`matrix` must be"),
        (lambda: cell(other, None, jnp.ones(4)), "`params` must be what"),
        (lambda: cell(params, None, jnp.ones(3)), r"`h` must have.*\(3,\)"),
        (lambda: cell(params, None, jnp.ones(4, complex)), "`h` must be real"),
        (lambda: cell(params, jnp.ones(2), jnp.ones(4)), r"`inputs`.*\(4,\)"),
        (lambda: cell.readout(params, jnp.ones(4)), "no read-out"),
        (
            lambda: kept.inverse(params, None, jnp.ones(4)),
            "has no inverse.*use `recomputed_scan` with Replay",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
