"""Boundaries that reflect, against matrices that fold the edges site by site."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from rbpjax.unitary import UnitaryCell, activation, conv_exp, recomputed_scan
from rbpjax.unitary.history import HistoryReport, Inverse
from tests.support.problems import rows

# lattice, window, channels, complex: odd and even sizes, windows of both parities and
# as large as the lattice, one to three axes.
CASES = [
    ((7,), (3,), None, True),
    ((6,), (6,), None, True),
    ((6,), (4,), 3, False),
    ((5,), (5,), 2, True),
    ((4, 3), (3, 2), 2, False),
    ((3, 4), (3, 3), None, True),
    ((2, 3, 2), (1, 3, 2), 2, False),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
boundaries = pytest.mark.parametrize("boundary", ["even", "odd"])


def draw(case, seed=0):
    """Weights and a field."""
    lattice, window, channels, is_complex = case
    square = () if channels is None else (channels, channels)
    rng = np.random.default_rng(seed)
    w, z = rng.normal(size=(*window, *square)), rng.normal(size=(*lattice, *square[:1]))
    if is_complex:
        w, z = w + 1j * rng.normal(size=w.shape), z + 1j * rng.normal(size=z.shape)
    return w, z


def fold(place, size, sign):
    """The site that is seen at ``place``, on the lattice or beyond, and its sign."""
    factor = 1
    while not 0 <= place < size:
        place, factor = (
            (-1 - place if place < 0 else 2 * size - 1 - place),
            sign * factor,
        )
    return place, factor


def folded(w, lattice, channels, boundary):
    """Dense matrix of z ↦ Σ_o W(o) z(x - o), W averaged over ±o, with no FFT."""
    c, sign = channels or 1, 1 if boundary == "even" else -1
    sites = list(itertools.product(*map(range, lattice)))
    index = {x: i for i, x in enumerate(sites)}
    dense = np.zeros((len(sites), c, len(sites), c), w.dtype)
    d = len(lattice)
    for x, at, turn in itertools.product(
        sites,
        itertools.product(*map(range, w.shape[:d])),
        itertools.product((-1, 1), repeat=d),
    ):
        offset = [t * (i - n // 2) for t, i, n in zip(turn, at, w.shape, strict=False)]
        seen = [
            fold(a - o, n, sign) for a, o, n in zip(x, offset, lattice, strict=True)
        ]
        y = tuple(place for place, _ in seen)
        factor = np.prod([f for _, f in seen]) / 2**d
        dense[index[x], :, index[y], :] += factor * w[at].reshape(c, c)
    return dense.reshape(len(sites) * c, len(sites) * c)


@pytest.mark.parametrize("case", rows({str(c): c for c in CASES}, [str(CASES[2])]))
@boundaries
def test_equals_the_cayley_transform_of_the_folded_matrix(case, boundary):
    """U z is (1 - S/2)⁻¹ (1 + S/2) z with S = ½(W - Wᴴ), and its adjoint undoes it."""
    lattice, _, channels, _ = case
    w, z = draw(case)
    dense = folded(w, lattice, channels, boundary)
    s, one = (dense - dense.conj().T) / 2, np.eye(len(dense))
    want = np.linalg.solve(one - s / 2, one + s / 2) @ z.reshape(-1)
    u = conv_exp(jnp.array(w), lattice, boundary=boundary, method="cayley")
    got = u(jnp.array(z))
    np.testing.assert_allclose(got.reshape(-1), want, rtol=0, atol=1e-13)
    np.testing.assert_allclose(u.adjoint()(got), z, rtol=0, atol=1e-13)


@cases
@boundaries
def test_equals_the_exponential_of_the_folded_matrix(case, boundary):
    """U z is expm(½(W - Wᴴ)) z, its adjoint undoes it, and the norm is kept."""
    lattice, _, channels, _ = case
    w, z = draw(case)
    dense = folded(w, lattice, channels, boundary)
    dense = scipy.linalg.expm((dense - dense.conj().T) / 2)
    want = (dense @ z.reshape(-1)).reshape(z.shape)
    for method in ("taylor", "eigh"):
        u = conv_exp(jnp.array(w), lattice, boundary=boundary, method=method)
        got = u(jnp.array(z))
        assert got.dtype == z.dtype
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
        np.testing.assert_allclose(u.adjoint()(got), z, rtol=0, atol=1e-13)
    np.testing.assert_allclose(np.linalg.norm(got), np.linalg.norm(z), rtol=1e-14)
    periodic = conv_exp(jnp.array(w), lattice)(jnp.array(z))
    assert np.max(np.abs(got - periodic)) > 0.1 < np.max(np.abs(got - z))


def test_a_real_kernel_on_a_complex_field_is_its_parts():
    """As for periodic lattices."""
    w, z = draw(CASES[4])
    u = conv_exp(jnp.array(w), (4, 3), boundary="odd")
    both = u(jnp.array(z + 1j * z[::-1]))
    apart = jax.lax.complex(u(jnp.array(z)), u(jnp.array(z[::-1])))
    chex.assert_trees_all_close(both, apart, rtol=1e-14)


@boundaries
@pytest.mark.parametrize("lattice", [(9,), (8,), (4, 6), (3, 2, 2)])
def test_the_norm_is_kept_at_any_norm_of_the_weights(lattice, boundary):
    """float32, up to 1e8, where phases have no digits left: fields stay even or odd."""
    window = tuple(min(3, n) for n in lattice)
    for kind, channels in (("complex", ()), ("complex", (3, 3)), ("real", (3, 3))):
        rng = np.random.default_rng(0)
        w = rng.normal(size=(*window, *channels)).astype(np.float32)
        z = rng.normal(size=(*lattice, *channels[:1])).astype(np.float32)
        if kind == "complex":
            w, z = w + 1j * np.flip(w), z + 1j * np.flip(z)

        @jax.jit
        def errors(w, z=jnp.array(z)):
            u = conv_exp(w, lattice, boundary=boundary)
            length = lambda a: jnp.linalg.norm(a.ravel())
            off = length(u.adjoint()(u(z)) - z)
            return length(u(z)) / length(z) - 1, off / length(z)

        for norm in (0.0, 1e-20, 1.0, 1e4, 1e8):
            # Ten roundings of ε = 1.2e-7, of FFTs and products.
            assert max(map(abs, errors(jnp.array(norm * w, w.dtype)))) < 2e-6, norm


@boundaries
def test_what_leaves_at_one_edge_does_not_enter_at_the_other(boundary):
    """A point at an edge: nothing at the other edge, unlike on a ring."""
    w = jnp.array([0.4j, 0.3j, 0.4j])
    point = jnp.zeros(32, complex).at[0].set(1.0)
    assert abs(conv_exp(w, (32,), boundary=boundary)(point)[-1]) < 1e-15
    assert abs(conv_exp(w, (32,))(point)[-1]) > 0.1
    # The mean of the field is a wave of the even lattice, and turns by its frequency.
    flat = jnp.ones(32, complex)
    turned = conv_exp(w, (32,), boundary="even")(flat)
    chex.assert_trees_all_close(turned, np.exp(1.1j) * flat, rtol=1e-14)


def test_derivatives_and_recomputed_history():
    """Gradients through the cell against differences of the folded matrix."""
    case = CASES[4]
    lattice, _, channels, _ = case
    w, z = draw(case)
    v, c = draw(case, 1)

    def dense(t):
        m = folded(w + t * v, lattice, channels, "even")
        return np.vdot(c, scipy.linalg.expm((m - m.T) / 2) @ z.reshape(-1))

    c = c.reshape(-1)
    want = (dense(1e-5) - dense(-1e-5)) / 2e-5
    loss = lambda w: jnp.vdot(c, conv_exp(w, lattice, boundary="even")(z).ravel())
    got = jnp.vdot(jax.grad(loss)(jnp.array(w)), v)
    np.testing.assert_allclose(got, want, rtol=1e-7)  # differences: h² and ε/h
    cell = UnitaryCell(
        lattice=(8,), boundary="odd", activation=activation.identity, channels=2
    )
    drawn = cell.init(jax.random.key(0), radius=1, inputs=3, scale=1.0)
    xs = jax.random.normal(jax.random.key(1), (200, 3))
    history = Inverse(inverse=cell.inverse)

    def end(scan, drawn, probe):
        params = cell.prepare(drawn)
        h, _ = scan(cell, params, xs, cell.start(), history=history, probe=probe)
        return jnp.sum(h.real**2 * jnp.arange(16.0).reshape(8, 2))

    def stored(f, params, xs, h0, history, probe):
        return jax.lax.scan(lambda h, x: (f(params, x, h), None), h0, xs)

    grad = lambda scan: jax.jit(jax.grad(lambda *a: end(scan, *a), (0, 1)))
    ours, report = grad(recomputed_scan)(drawn, HistoryReport.zeros())
    theirs, _ = grad(stored)(drawn, HistoryReport.zeros())
    # 200 products with an error of some ε each, in sums over 200 steps.
    scale = float(jnp.max(jnp.abs(theirs.kernel)))
    chex.assert_trees_all_close(ours, theirs, rtol=0, atol=1e-11 * scale)
    assert report.drift < 1e-12


def test_what_cannot_be_reflected_is_named():
    """A single real channel, boundaries that are none, parameters of another cell."""
    w = jnp.ones((3, 2, 2))
    even, ring = (UnitaryCell(lattice=(8,), boundary=b) for b in ("even", "periodic"))
    params = ring.prepare(ring.init(jax.random.key(0), radius=1))
    for call, words in (
        (lambda: conv_exp(w[:, 0, 0], (8,), boundary="odd"), "a single real channel"),
        (lambda: conv_exp(w, (8,), boundary="zero"), "`boundary` must be.*'zero'"),
        (lambda: conv_exp(w, (2,), boundary="even"), "no window axis may exceed"),
        (lambda: UnitaryCell(lattice=(8,), boundary="x"), "`boundary` must be one of"),
        (
            lambda: even(params, None, even.start()),
            "boundary is 'even'; got 'periodic'",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
