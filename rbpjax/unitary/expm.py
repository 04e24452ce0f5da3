"""Exponential of skew-Hermitian matrices, unitary to rounding, with its derivative.

e^S = (e^{S/2ᵏ})^(2ᵏ): a polynomial where the norm is small, then k squarings. Each
squaring doubles the distance from the unitary matrices, and one Newton step towards
the nearest of them, U ← U - U (UᴴU - 1)/2, squares it; so it is taken after every
eighth squaring and at the end, and the result is unitary to rounding at any norm.

The derivative at S in the direction E, the Fréchet derivative

    L(S, E) = ∫₀¹ e^{sS} E e^{(1-s)S} ds,

goes along, L ← (U L + L U)/2 in each squaring. With S = V (i diag θ) Vᴴ it is also

    L(S, E) = V (Φ ∘ (Vᴴ E V)) Vᴴ,
    Φ_jk = e^{i(θ_j + θ_k)/2} sinc((θ_j - θ_k)/2),   sinc(x) = sin(x)/x.

No difference of eigenvalues is divided by, so both are right at S = 0 and at every
degenerate eigenvalue, where the derivative of `eigh` itself is NaN. L is linear in E
with transpose ct ↦ L(Sᵀ, ct), which is L again.

Both are primitives: the number of squarings depends on the data, and a loop of that
kind has no reverse mode of its own; and a rule of `custom_jvp` is dropped in reverse
mode where its argument is a tangent. ∂L/∂S is that of a plain Taylor series with
scaling and squaring, which JAX differentiates as often as it likes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from rbpjax._core.tree import power_of_two

METHODS = ("taylor", "pade", "eigh")

_SQUARINGS = 18
_SMALL = 0.75  # the 1-norm up to which the polynomials are exact to rounding
_LOOPED = 4  # up to this size a batch of products on CPU is one loop


def cis(angle: jax.Array) -> jax.Array:
    """e^{i·angle}, of modulus one to rounding for every real angle."""
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))


def expm_skew(s: jax.Array, *, method: str = "taylor") -> jax.Array:
    """Exponential of skew-Hermitian matrices: unitary to rounding, whatever the norm.

    Exact. Cost for ‖S‖ ≤ 2ᵏ: 6 products of matrices (4 in float32) and k + 3, real ones
    for real matrices. Derivatives: forward and reverse mode to every order, the first
    with three times the products, higher ones by plain scaling and squaring: some 40
    products each, and NaN for ‖S‖ > 2¹⁶.

    Phases have errors of ε‖S‖, which is rounding of S itself. ``‖UᴴU - 1‖`` is a few ε
    times √C.

    Args:
      s: array [..., C, C] with sᴴ = -s, real or complex; project first when in doubt.
      method: how the exponential of a small matrix is taken: "taylor", a polynomial,
        products only; "pade", a rational function, one solve and fewer products;
        "eigh", by eigenvectors (complex arithmetic, no squarings, one `eigh` a matrix
        and one for the derivative; only one triangle is read).

    Returns:
      An array like ``s``. Other matrices are not refused: see ``s``.

    Raises:
      ValueError: if ``s`` is no floating-point array of square matrices, or ``method``
        none of these.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.unitary import expm_skew
      >>> s = jnp.array([[0.0, -1.0], [1.0, 0.0]])
      >>> (jnp.rint(expm_skew(s * jnp.pi / 2)) + 0.0).tolist()  # a quarter turn
      [[0.0, -1.0], [1.0, 0.0]]
      >>> zero = jnp.zeros((2, 2))  # all eigenvalues equal
      >>> (jnp.rint(jax.jvp(expm_skew, (zero,), (s,))[1]) + 0.0).tolist()
      [[0.0, -1.0], [1.0, 0.0]]

    References:
      Higham, "The Scaling and Squaring Method for the Matrix Exponential Revisited",
      SIAM J. Matrix Anal. Appl. 26, 2005; Al-Mohy and Higham, "Computing the Fréchet
      Derivative of the Matrix Exponential", 2009; Najfeld and Havel, "Derivatives of
      the Matrix Exponential and Their Computation", Advances in Applied Mathematics
      16, 1995 (the derivative in the eigenbasis; the sinc form is its skew case).
    """
    dtype = getattr(s, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            "`s` must be a floating-point or complex array; got "
            f"{dtype or type(s).__name__}. Cast it."
        )
    if s.ndim < 2 or s.shape[-1] != s.shape[-2]:
        raise ValueError(
            f"`s` must have the shape [..., C, C] of square matrices; got {s.shape}."
        )
    check_method(method)
    return _exp_p.bind(jnp.asarray(s), method=method)


def check_method(method: object) -> None:
    """Raises ValueError for what is no method of `expm_skew`."""
    if method not in METHODS:
        raise ValueError(
            f"`method` must be one of {', '.join(map(repr, METHODS))}; got {method!r}."
        )


def adjoint(m: jax.Array) -> jax.Array:
    """Conjugate transpose of the last two axes."""
    return jnp.conj(jnp.swapaxes(m, -1, -2))


def skew(w: jax.Array) -> jax.Array:
    """(W - Wᴴ)/2, the skew-Hermitian part of the last two axes."""
    return (w - adjoint(w)) / 2


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """The matrix product of the last two axes.

    On CPU many small ones are a loop over sums of outer products, each over the whole
    batch, as XLA would multiply matrix by matrix.
    """
    size = a.shape[-1]
    if size > _LOOPED or a.ndim != b.ndim or a.ndim == 2:
        return a @ b
    at = jax.lax.dynamic_index_in_dim
    outer = lambda j, a, b: at(a, j, a.ndim - 1) * at(b, j, b.ndim - 2)

    def looped(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(
            1, size, lambda j, c: c + outer(j, a, b), outer(0, a, b)
        )

    return jax.lax.platform_dependent(a, b, cpu=looped, default=jnp.matmul)


def polished(u: jax.Array) -> jax.Array:
    """One Newton step to the nearest unitary matrix: a distance d becomes 3d²/8."""
    return u - product(u, product(adjoint(u), u) - one_like(u)) / 2


def orthogonalized(u: jax.Array) -> jax.Array:
    """The real part of a unitary matrix that should be real, made orthogonal.

    Where phases have large errors it is far from orthogonal, and a Newton step would
    not do.
    """
    q, r = jnp.linalg.qr(u)
    signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1)
    # A factorization may have a finite Q, 1 of one entry, for what is not finite.
    poison = 0 * jnp.sum(u, (-2, -1), keepdims=True)
    return q * signs.astype(q.dtype)[..., None, :] + poison


def one_like(s: jax.Array) -> jax.Array:
    """The unit matrix, as often as ``s`` has matrices."""
    return jnp.broadcast_to(jnp.eye(s.shape[-1], dtype=s.dtype), s.shape)


def _wide(s: jax.Array) -> bool:
    """Whether the polynomials must be right to float64."""
    return bool(jnp.finfo(s.dtype).eps < 1e-10)


def _scaled(s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(S/2ᵏ, k), a k for each matrix, with a 1-norm of at most 3/4.

    What is not finite stays so, with some k.
    """
    size = jnp.abs(s.real) + jnp.abs(s.imag) if jnp.iscomplexobj(s) else jnp.abs(s)
    top = power_of_two(jnp.max(size, (-2, -1), keepdims=True, initial=0.0))
    norm = jnp.max(jnp.sum(size / top, -2, keepdims=True), -1, keepdims=True)
    exponent = lambda x: jnp.frexp(x)[1]
    k = jnp.where(norm == 0, 0, exponent(top) - 1 + exponent(norm / _SMALL))
    k = jnp.where(jnp.isfinite(norm), jnp.maximum(k, 0), 0)
    # In two parts: 2⁻ᵏ alone may have no room.
    part = lambda n: jnp.ldexp(jnp.ones((), size.dtype), -n).astype(s.dtype)
    return s * part(k // 2) * part(k - k // 2), k


def _taylor(s: jax.Array) -> jax.Array:
    """Σ Sⁿ/n! up to n = 9 or 16, where the rest is below rounding for ‖S‖ ≤ 3/4.

    As a polynomial in S³ or S⁴ whose coefficients are polynomials (Paterson and
    Stockmeyer): 4 or 6 products.
    """
    width = 4 if _wide(s) else 3
    powers = [one_like(s), s]
    while len(powers) <= width:
        powers.append(product(powers[-1], s))
    inverse = lambda n: 1 / math.factorial(n)
    out = inverse(width**2) * powers[width]
    for block in reversed(range(width)):
        terms = (inverse(block * width + j) * powers[j] for j in range(width))
        out = sum(terms, out)
        out = product(powers[width], out) if block else out
    return out


def _pade(s: jax.Array) -> jax.Array:
    """The diagonal Padé approximant of order 4 or 7, unitary in exact arithmetic.

    q(-S)⁻¹ q(S) with q = Σ cⱼ Sʲ: the even part of q is Hermitian, the odd part skew.
    """
    order = 7 if _wide(s) else 4
    fact = math.factorial
    ratio = fact(order) / fact(2 * order)
    c = [ratio * math.comb(order, j) * fact(2 * order - j) for j in range(order + 1)]
    c = [x / fact(order) for x in c]
    square = product(s, s)
    powers = [one_like(s), square]
    while len(powers) <= order // 2:
        powers.append(product(powers[-1], square))
    zero = jnp.zeros_like(s)
    even = sum((a * p for a, p in zip(c[::2], powers, strict=False)), zero)
    odd = sum((a * p for a, p in zip(c[1::2], powers, strict=False)), zero)
    odd = product(s, odd)
    return jnp.linalg.solve(even - odd, even + odd)


def _exp(s: jax.Array, *, method: str) -> jax.Array:
    if method == "eigh":
        theta, v = angles(s)
        u = product(v * cis(theta)[..., None, :], adjoint(v))
        return polished(u if jnp.iscomplexobj(s) else orthogonalized(u.real))
    small, k = _scaled(s)

    def square(i: jax.Array, u: jax.Array) -> jax.Array:
        return jnp.where(i < k, _now_and_then(i, product(u, u)), u)

    start = _taylor(small) if method == "taylor" else _pade(small)
    return polished(jax.lax.fori_loop(0, jnp.max(k, initial=0), square, start))


def angles(s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(θ, V) with S = V (i diag θ) Vᴴ."""
    rotated = -1j * s if jnp.iscomplexobj(s) else jax.lax.complex(0 * s, -s)
    theta, v = jnp.linalg.eigh(rotated)
    return theta, v


def _now_and_then(i: jax.Array, u: jax.Array) -> jax.Array:
    """A Newton step after every eighth squaring, when a distance of ε is 2⁹ ε."""
    return jax.lax.cond(i % 8 == 7, polished, lambda u: u, u)


def _expm_by_squaring(s: jax.Array) -> jax.Array:
    """(Σ_n (S/2^k)^n / n!)^(2^k) with ‖S‖/2^k < 1/2; for second derivatives only.

    `jax.scipy.linalg.expm` would do, but takes ten times as long to compile.
    """
    norm = jnp.max(jnp.sum(jnp.abs(jax.lax.stop_gradient(s)), -2), -1)
    k = jnp.maximum(0, jnp.floor(jnp.log2(norm)) + 2)[..., None, None]
    one = one_like(s)
    small = s * jnp.where(k > _SQUARINGS, jnp.nan, 2.0**-k).astype(s.dtype)
    # 2⁻ⁿ/n! < 1e-17 for n = 14.
    horner = lambda u, n: (one + small @ u / n, None)
    u, _ = jax.lax.scan(horner, one, jnp.arange(14, 0, -1).astype(s.dtype))
    square = lambda u, i: (jnp.where(i < k, u @ u, u), None)
    return jax.lax.scan(square, u, jnp.arange(_SQUARINGS).astype(norm.dtype))[0]


def _frechet(s: jax.Array, e: jax.Array, *, method: str) -> jax.Array:
    """L(S, E), for any number of leading axes of E that S does not have."""
    if method == "eigh":
        theta, v = angles(s)
        lead = (1,) * (e.ndim - s.ndim)
        theta, v = theta.reshape(lead + theta.shape), v.reshape(lead + v.shape)
        mean = (theta[..., :, None] + theta[..., None, :]) / 2
        half = (theta[..., :, None] - theta[..., None, :]) / 2
        sinc = jnp.sinc(half / jnp.pi)  # jnp.sinc(x) is sin(πx)/(πx)
        phi = cis(mean) * jax.lax.complex(sinc, jnp.zeros_like(sinc))
        inner = phi * product(product(adjoint(v), e.astype(v.dtype)), v)
        out = product(product(v, inner), adjoint(v))
        return out if jnp.iscomplexobj(e) else out.real
    small, k = _scaled(s.reshape((1,) * (e.ndim - s.ndim) + s.shape))
    u = _taylor(small)
    # The same for both methods: they agree to rounding.
    _, l = jax.jvp(_taylor, (jnp.broadcast_to(small, e.shape),), (e,))

    def square(i: jax.Array, both: tuple) -> tuple[jax.Array, jax.Array]:
        u, l = both
        twice = _now_and_then(i, product(u, u)), (product(u, l) + product(l, u)) / 2
        return jax.tree.map(partial(jnp.where, i < k), twice, both)

    return jax.lax.fori_loop(0, jnp.max(k, initial=0), square, (u, l))[1]


def _exp_jvp(primals: Any, tangents: Any, *, method: str) -> Any:
    (s,), (e,) = primals, tangents
    e = ad.instantiate_zeros(e)
    return _exp_p.bind(s, method=method), _frechet_p.bind(s, e, method=method)


def _exp_batch(args: Any, axes: Any, *, method: str) -> tuple[jax.Array, int]:
    return _exp_p.bind(jnp.moveaxis(args[0], axes[0], 0), method=method), 0


def _frechet_jvp(primals: Any, tangents: Any, *, method: str) -> Any:
    (s, e), (s_dot, e_dot) = primals, tangents
    out = _frechet_p.bind(s, e, method=method)
    parts = []
    if not isinstance(e_dot, ad.Zero):
        parts.append(_frechet_p.bind(s, e_dot, method=method))
    if not isinstance(s_dot, ad.Zero):
        s, s_dot = jnp.broadcast_to(s, e.shape), jnp.broadcast_to(s_dot, e.shape)
        derivative = lambda s: jax.jvp(_expm_by_squaring, (s,), (e,))[1]
        parts.append(jax.jvp(derivative, (s,), (s_dot,))[1])
    return out, sum(parts, jnp.zeros_like(out))


def _frechet_transpose(
    cotangent: Any, s: jax.Array, e: Any, *, method: str
) -> tuple[None, jax.Array]:
    # Sᵀ is skew-Hermitian, too.
    s_t = jnp.swapaxes(s, -1, -2)
    return None, _frechet_p.bind(s_t, cotangent, method=method)


def _frechet_batch(args: Any, axes: Any, *, method: str) -> tuple[jax.Array, int]:
    (s, e), (s_axis, e_axis) = args, axes
    if e_axis is None:
        e = jnp.broadcast_to(e, (s.shape[s_axis], *e.shape))
    else:
        e = jnp.moveaxis(e, e_axis, 0)
    if s_axis is not None:
        s = jnp.moveaxis(s, s_axis, 0)
        s = s.reshape(s.shape[0], *(1,) * (e.ndim - s.ndim), *s.shape[1:])
    return _frechet_p.bind(s, e, method=method), 0


def primitive(
    name: str, f: Callable, like: int = 0, static: tuple[str, ...] = ()
) -> Primitive:
    """A primitive for ``f``, whose result is like its argument number ``like``.

    Its rules are the caller's; the keywords ``static`` are static.
    """
    made = Primitive(name)
    made.def_impl(jax.jit(f, static_argnames=static))
    made.def_abstract_eval(lambda *args, **_: args[like])
    mlir.register_lowering(made, mlir.lower_fun(f, multiple_results=False))
    return made


_exp_p = primitive("expm_skew", _exp, static=("method",))
ad.primitive_jvps[_exp_p] = _exp_jvp
batching.primitive_batchers[_exp_p] = _exp_batch

_frechet_p = primitive("expm_skew_frechet", _frechet, 1, ("method",))
ad.primitive_jvps[_frechet_p] = _frechet_jvp
ad.primitive_transposes[_frechet_p] = _frechet_transpose
batching.primitive_batchers[_frechet_p] = _frechet_batch
