"""The convolutional exponential against dense matrices and closed forms."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special
from jax.test_util import check_grads

from rbpjax import unitary
from rbpjax.unitary import fourier_kernel

conv_exp = jax.jit(unitary.conv_exp, static_argnums=1, static_argnames="method")

# lattice, window, channels, complex: every dimension, odd and even sizes, windows
# smaller than, as large as, and of other parity than the lattice.
CASES = [
    ((7,), (3,), None, False),
    ((8,), (3,), None, True),
    ((6,), (6,), None, True),
    ((6,), (4,), 3, False),
    ((5,), (5,), 2, True),
    ((4, 5), (3, 3), None, False),
    ((4, 3), (3, 2), 2, False),
    ((3, 4), (3, 3), 3, True),
    ((3, 4, 2), (3, 3, 1), None, True),
    ((2, 3, 4), (1, 3, 3), 2, False),
]

# One of each kind: complex ring, real channels, plane, complex channels.
FEW = {1, 3, 6, 7}
SOME = [
    pytest.param(case, marks=() if i in FEW else pytest.mark.full, id=str(case))
    for i, case in enumerate(CASES)
]


def weights_of(case, seed=0):
    _, window, channels, is_complex = case
    shape = window + (() if channels is None else (channels, channels))
    rng = np.random.default_rng(seed)
    w = rng.normal(size=shape)
    return w + 1j * rng.normal(size=shape) if is_complex else w


def fields_of(case, seed=1, number=None, is_complex=None):
    lattice, _, channels, complex_weights = case
    is_complex = complex_weights if is_complex is None else is_complex
    shape = lattice + (() if channels is None else (channels,))
    shape = shape if number is None else (number, *shape)
    rng = np.random.default_rng(seed)
    z = rng.normal(size=shape)
    return jnp.array(z + 1j * rng.normal(size=shape) if is_complex else z)


def circulant(kernel, lattice, channels):
    """Dense matrix of z ↦ Σ_y A(x - y) z(y), entry by entry, with no FFT."""
    c = channels or 1
    sites = list(itertools.product(*map(range, lattice)))
    index = {x: i for i, x in enumerate(sites)}
    dense = np.zeros((len(sites), c, len(sites), c), kernel.dtype)
    window = kernel.shape[: len(lattice)]
    for y in sites:
        for w in itertools.product(*map(range, window)):
            offset = (i - n // 2 for i, n in zip(w, window, strict=True))
            x = tuple((a + o) % n for a, o, n in zip(y, offset, lattice, strict=True))
            dense[index[x], :, index[y], :] += kernel[w].reshape(c, c)
    return dense.reshape(len(sites) * c, len(sites) * c)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_exponential_of_the_dense_circulant_matrix(case):
    """U ⊗ z is expm(½(W - Wᴴ)) z for the dense (block-)circulant W, to 1e-13."""
    lattice, _, channels, _ = case
    w, z = weights_of(case), fields_of(case)
    dense = circulant(w, lattice, channels)
    dense = scipy.linalg.expm((dense - dense.conj().T) / 2)
    got = conv_exp(w, lattice)(z)
    expected = (dense @ z.reshape(-1)).reshape(z.shape)
    chex.assert_trees_all_close(got, expected, rtol=0, atol=1e-13)


def cayley(s):
    """(1 - S/2)⁻¹ (1 + S/2)."""
    one = np.eye(len(s))
    return np.linalg.solve(one - s / 2, one + s / 2)


@pytest.mark.parametrize("case", SOME)
def test_cayley_is_that_of_the_dense_circulant_matrix(case):
    """Value, adjoint, -A, and the derivative: ½(1 + U) dS ½(1 + U), also at S = 0.

    To 1e-13: a solve of matrices with ‖S‖ of order ten, and FFTs of ten to 48 numbers.
    """
    lattice, _, channels, _ = case
    z, direction = fields_of(case), weights_of(case, 5)
    flat = lambda a: a.reshape(-1)
    matrix = lambda w: circulant(w, lattice, channels)
    s, ds = (matrix(w) - matrix(w).conj().T for w in (weights_of(case), direction))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * z.size)
    for size in (0.0, 1.0):
        dense = cayley(size * s / 2)
        f = lambda w: conv_exp(w, lattice, method="cayley")
        w = jnp.array(size * weights_of(case))
        u, du = jax.jvp(f, (w,), (jnp.array(direction),))
        close(flat(u(z)), dense @ flat(z))
        close(u.adjoint()(u(z)), z)
        close(f(-w).hat, u.adjoint().hat)
        half = (np.eye(len(s)) + dense) / 2
        close(flat(du(z)), half @ (ds / 2) @ half @ flat(z))
    # Another map than the exponential, and not the identity.
    assert np.max(np.abs(u(z) - conv_exp(w, lattice)(z))) > 5e-3
    assert np.max(np.abs(u(z) - z)) > 0.1


def test_cayley_of_one_channel_by_its_formula():
    """Û = (1 + iω/2)/(1 - iω/2): near the exponential, without folds, never -1."""
    lattice, offset = (8,), jnp.array([0.0, 1j, 0.0])
    f = lambda w, method: conv_exp(w * offset, lattice, method=method).hat[0]
    for w in (-0.01, 0.01, 0.1):
        # x³/12 for x = iω, and a term ten times smaller at least.
        gap = f(w, "cayley") - f(w, "taylor")
        assert abs(gap - (1j * w) ** 3 / 12) < 0.1 * w**2 * abs(w) / 12
    angles = [jnp.angle(f(w, "cayley")) for w in (1.0, 4.0, 30.0, 1e4)]
    np.testing.assert_allclose(angles, 2 * np.arctan([0.5, 2.0, 15.0, 5e3]), rtol=1e-12)


@pytest.mark.parametrize("case", SOME)
def test_plain_kernel_is_the_circulant_matrix(case):
    """fourier_kernel convolves with the kernel as given: a convolution, unflipped."""
    lattice, _, channels, _ = case
    w, z = weights_of(case), fields_of(case)
    got = fourier_kernel(jnp.array(w), lattice)(z)
    expected = (circulant(w, lattice, channels) @ z.reshape(-1)).reshape(z.shape)
    chex.assert_trees_all_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", SOME)
def test_adjoint_and_inverse(case):
    """⟨Uz, y⟩ = ⟨z, U†y⟩, U†U = 1, and exp(-A) is U†; the norm is kept."""
    lattice = case[0]
    w, z, y = weights_of(case), fields_of(case), fields_of(case, 2)
    u = conv_exp(w, lattice)
    chex.assert_trees_all_close(
        jnp.vdot(u(z), y), jnp.vdot(z, u.adjoint()(y)), rtol=0, atol=1e-13 * z.size
    )
    chex.assert_trees_all_close(u.adjoint()(u(z)), z, rtol=0, atol=1e-14 * z.size)
    back = conv_exp(-w, lattice)
    chex.assert_trees_all_close(u.adjoint().hat, back.hat, rtol=0, atol=1e-13)
    norms = jnp.linalg.norm(u(z).ravel()) / jnp.linalg.norm(z.ravel())
    chex.assert_trees_all_close(norms, jnp.ones(()), rtol=0, atol=1e-14)
    # The test has power: the kernel is far from the identity.
    assert jnp.max(jnp.abs(u(z) - z)) > 0.5


@pytest.mark.parametrize("case", SOME)
def test_commutes_with_cyclic_shifts(case):
    """Shifting the field and convolving is convolving and shifting."""
    lattice = case[0]
    u, z = conv_exp(weights_of(case), lattice), fields_of(case)
    shift = lambda z: jnp.roll(z, (1,) * len(lattice), range(len(lattice)))
    chex.assert_trees_all_close(u(shift(z)), shift(u(z)), rtol=0, atol=1e-13)


def test_nearest_neighbour_kernel_is_bessel():
    """A = a(δ₁ - δ₋₁) on a long ring has U(x) = J_x(2a), to 1e-14."""
    a, n = 0.8, 64
    u = conv_exp(a * jnp.array([-1.0, 0.0, 1.0]), (n,)).kernel()
    x = np.arange(-n // 2, n // 2)
    bessel = scipy.special.jv(x, 2 * a)  # of order ±32: 1e-39, no wrapping to see
    chex.assert_trees_all_close(u[x], jnp.array(bessel), rtol=0, atol=1e-14)


def test_kernel_is_the_response_to_a_point():
    """kernel() is U ⊗ δ, for several channels column by column."""
    for case in (CASES[2], CASES[6]):
        lattice, _, channels, is_complex = case
        u = conv_exp(weights_of(case), lattice)
        origin = (0,) * len(lattice)
        dtype = complex if is_complex else float
        if channels is None:
            got = u(jnp.zeros(lattice, dtype).at[origin].set(1.0))
        else:
            delta = jnp.zeros((channels, *lattice, channels), dtype)
            delta = delta.at[(jnp.arange(channels), *origin, jnp.arange(channels))]
            got = jnp.moveaxis(jax.vmap(u)(delta.set(1.0)), 0, -1)
        chex.assert_trees_all_close(got, u.kernel(), rtol=0, atol=1e-13)


def test_support_decays_factorially():
    """|U(x)| ≤ Σ_{j ≥ ⌈|x|/m⌉} ‖A‖₁ʲ/j! for a window of radius m."""
    w = np.array([0.1, -0.5, 0.3, 0.2, 0.4])
    a = (w - w[::-1]) / 2
    u = jnp.abs(conv_exp(w, (64,)).kernel())
    size = np.sum(np.abs(a))
    for x in range(1, 24):
        bound = sum(size**j / math.factorial(j) for j in range(-(-x // 2), 60))
        assert max(u[x], u[-x]) <= bound + 1e-16


def test_real_single_channel_keeps_mean_and_nyquist_mode():
    """Û = 1 at DC and Nyquist: these modes cannot rotate; complex kernels free them."""
    w = weights_of(((8,), (5,), None, True))
    mean, nyquist = jnp.ones(8), jnp.array([1.0, -1.0] * 4)
    u = conv_exp(w.real, (8,))
    chex.assert_trees_all_close(u(mean), mean, rtol=0, atol=1e-15)
    chex.assert_trees_all_close(u(nyquist), nyquist, rtol=0, atol=1e-15)
    free = conv_exp(w, (8,))
    for mode in (mean.astype(complex), nyquist.astype(complex)):
        assert jnp.max(jnp.abs(free(mode) - mode)) > 0.1


def test_complex_kernel_reaches_the_one_site_shift():
    """The shift on an even ring, out of reach for real kernels, is e^A for complex."""
    omega = -2 * np.pi * np.fft.fftfreq(8)  # the shift's Û is e^{-2πik/8}
    a = np.roll(np.fft.ifft(1j * omega), 4)  # offset 0 at index 4
    z = jnp.array(np.arange(8) + 1j * np.arange(8) ** 2)
    chex.assert_trees_all_close(
        conv_exp(a, (8,))(z), jnp.roll(z, 1), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("case", [c for c in CASES if not c[3]], ids=str)
def test_real_kernels_act_on_complex_fields_by_parts(case):
    """The half spectrum gives what the full one gives; real fields stay real."""
    lattice = case[0]
    w, z = weights_of(case), fields_of(case, is_complex=True)
    half, full = conv_exp(w, lattice), conv_exp(w + 0j, lattice)
    assert half(z.real).dtype == jnp.float64
    chex.assert_trees_all_close(half(z), full(z), rtol=0, atol=1e-13)


def test_derivative_formulas_of_tied_coefficients():
    """∂U/∂a = U(·-y) - U(·+y), ∂U/∂b = i(U(·-y) + U(·+y)), ∂U/∂Im A(0) = iU."""
    n, y = 16, 2

    def kernel(a, b, c):  # A(±y) = ±a + ib, A(0) = ic; offset 0 at index 2
        w = jnp.array([-a + 1j * b, 0, 1j * c, 0, a + 1j * b])
        return conv_exp(w, (n,)).kernel()

    at = (0.3, -0.2, 0.5)
    u = kernel(*at)
    forth, back = jnp.roll(u, y), jnp.roll(u, -y)
    derivative = lambda *t: jax.jvp(kernel, at, t)[1]
    for got, expected in [
        (derivative(1.0, 0.0, 0.0), forth - back),
        (derivative(0.0, 1.0, 0.0), 1j * (forth + back)),
        (derivative(0.0, 0.0, 1.0), 1j * u),
    ]:
        chex.assert_trees_all_close(got, expected, rtol=0, atol=1e-14)


def test_reverse_formula_of_a_single_channel():
    """Ā = F⁻¹{conj(Û) F{Ū}}, projected to (Ā - Ā†)/2."""
    n = 12
    w = jnp.array(np.random.default_rng(0).normal(size=n))
    u_bar = np.random.default_rng(1).normal(size=n)
    kernel = lambda w: conv_exp(w, (n,)).kernel()
    (got,) = jax.vjp(kernel, w)[1](jnp.array(u_bar))
    u_hat = np.fft.fft(kernel(w))
    a_bar = np.fft.ifft(u_hat.conj() * np.fft.fft(u_bar)).real
    a_bar = (a_bar - np.roll(a_bar[::-1], 1)) / 2
    chex.assert_trees_all_close(
        got, jnp.array(np.roll(a_bar, n // 2)), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize(
    ("case", "scale", "method"),
    [
        pytest.param(CASES[2], 0.0, "taylor", marks=pytest.mark.full),
        pytest.param(CASES[2], 1.0, "taylor"),
        pytest.param(CASES[6], 0.0, "taylor", marks=pytest.mark.full),
        pytest.param(CASES[6], 1.0, "taylor", marks=pytest.mark.full),
        pytest.param(CASES[2], 1.0, "cayley", marks=pytest.mark.full),
        pytest.param(CASES[6], 0.0, "cayley", marks=pytest.mark.full),
        pytest.param(CASES[7], 1.0, "cayley", marks=pytest.mark.full),
    ],
    ids=str,
)
def test_gradients_against_finite_differences(case, scale, method):
    """Both modes, to second order, at A = 0 too; never NaN."""
    lattice = case[0]
    w, z = scale * weights_of(case), fields_of(case)
    parts = (jnp.array(w.real), jnp.array(w.imag))

    @jax.jit
    def f(parts):
        w = jax.lax.complex(*parts) if case[3] else parts[0]
        out = conv_exp(w, lattice, method=method)(z)
        return jnp.sum(jnp.sin(out.real) + jnp.cos(2 * out.imag))

    check_grads(f, (parts,), order=2, modes=("fwd", "rev"), rtol=1e-5, atol=1e-5)
    chex.assert_tree_all_finite(jax.grad(f)(parts))


def test_vmap_over_fields_and_over_weights():
    """A batch of fields, and a batch of kernels, give what single calls give."""
    case = CASES[6]
    w = jnp.stack([weights_of(case, s) for s in range(3)])
    z = fields_of(case, number=3)
    both = jax.vmap(lambda w, z: conv_exp(w, case[0])(z))(w, z)
    for i in range(3):
        one = conv_exp(w[i], case[0])(z[i])
        chex.assert_trees_all_close(both[i], one, rtol=0, atol=1e-14)


def test_single_precision_stays_unitary():
    """float32: dtype kept, norm kept to a few roundings."""
    case = CASES[7]
    u = conv_exp(weights_of(case).astype(np.complex64), case[0])
    z = fields_of(case).astype(jnp.complex64)
    assert u(z).dtype == jnp.complex64
    ratio = jnp.linalg.norm(u(z).ravel()) / jnp.linalg.norm(z.ravel())
    chex.assert_trees_all_close(ratio, jnp.ones((), jnp.float32), rtol=0, atol=2e-6)


def test_zero_padding_is_no_isometry():
    """Negative control: the same kernel U on a zero-padded lattice loses norm."""
    case = ((8, 8), (3, 3), 4, False)
    w, z = 0.6 * weights_of(case), fields_of(case)
    kernel = np.roll(conv_exp(w, (8, 8)).kernel(), (4, 4), (0, 1))
    pad = jnp.pad(z, [(8, 8), (8, 8), (0, 0)])
    padded = fourier_kernel(jnp.array(kernel), (24, 24))(pad)[8:16, 8:16]
    ratio = jnp.linalg.norm(padded.ravel()) / jnp.linalg.norm(z.ravel())
    assert ratio < 0.95
    periodic = conv_exp(w, (8, 8))(z).ravel()
    periodic = jnp.linalg.norm(periodic) / jnp.linalg.norm(z.ravel())
    chex.assert_trees_all_close(periodic, jnp.ones(()), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("weights", "lattice", "message"),
    [
        (np.zeros(5), (4,), r"no window axis may exceed .*\(5,\)"),
        (np.zeros((3, 2, 3)), (4,), r"\[\*window, C, C\]"),
        (np.zeros((3, 2)), (4,), r"\[\*window, C, C\]"),
        (np.zeros(3), (4, 4), "2 window axes"),
        (np.zeros(3), (0,), "positive Python ints"),
        (np.zeros((3,) * 4), (4,) * 4, "one to three"),
        (np.zeros(3, int), (4,), "floating point"),
    ],
)
def test_bad_kernels_are_refused(weights, lattice, message):
    """What does not fit is named at trace time."""
    with pytest.raises(ValueError, match=message):
        conv_exp(weights, lattice)


def test_bad_fields_are_refused():
    """Shape and precision of the field must be the kernel's."""
    u = conv_exp(np.zeros((3, 2, 2)), (4,))
    with pytest.raises(ValueError, match=r"shape \(4, 2\); got \(2, 4\)"):
        u(jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="same precision"):
        u(jnp.zeros((4, 2), jnp.float32))


@pytest.mark.parametrize("lattice", [(9,), (8,), (4, 4, 4), (6, 5), (5, 6), (1, 2)])
@pytest.mark.parametrize("channels", [None, 2, 3, 5])
@pytest.mark.parametrize(
    "method", ["taylor", pytest.param("cayley", marks=pytest.mark.full)]
)
def test_real_kernels_are_orthogonal_at_any_norm(lattice, channels, method):
    """float32 weights up to 1e8: no phase error at k = -k leaks into the norm.

    Before, the norm of a field was off by 2e-3 a step at 1e6 with three channels.
    """
    square = () if channels is None else (channels, channels)
    window = tuple(min(3, n) for n in lattice)
    keys = jax.random.split(jax.random.key(1))
    unit = jax.random.normal(keys[0], window + square, jnp.float32)
    z = jax.random.normal(keys[1], lattice + square[:1], jnp.float32)
    length = lambda a: jnp.linalg.norm(a.ravel())

    @jax.jit
    def errors(norm):
        u = conv_exp(norm * unit, lattice, method=method)
        return length(u(z)) / length(z) - 1, length(u.adjoint()(u(z)) - z) / length(z)

    for norm in (0.0, 1e-20, 1.0, 1e4, 1e6, 1e8):
        # Ten roundings of ε = 1.2e-7, of FFTs and products.
        assert max(map(abs, errors(jnp.float32(norm)))) < 2e-6, norm


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_weights_that_are_not_finite_are_seen(bad, place):
    """Also at offset 0 of a single real channel, where A has no entry."""
    weights = jnp.zeros(3).at[place].set(bad)
    assert not np.isfinite(conv_exp(weights, (8,)).hat).any()


def test_what_is_no_kernel_or_field_is_named():
    """Lists, lattices, integers: said before JAX fails on them."""
    u = conv_exp(jnp.zeros(3), (8,))
    for call, words in (
        (
            lambda: unitary.conv_exp([0.0, 1.0, 0.0], (8,)),
            "a kernel must be an array; got list",
        ),
        (lambda: unitary.conv_exp(jnp.zeros(3), 8), "`lattice` must be"),
        (lambda: unitary.conv_exp(jnp.zeros(3), (True,)), "`lattice` must be"),
        (lambda: u(jnp.zeros(8, int)), "`field` must be a floating-point.*int64"),
        (lambda: u([0.0] * 8), "`field` must be a floating-point.*list"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
