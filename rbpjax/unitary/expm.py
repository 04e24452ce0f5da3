"""Exponential of skew-Hermitian matrices, with the derivative in its stable form.

With S = V (i diag θ) Vᴴ the exponential is V diag(e^{iθ}) Vᴴ and its Fréchet
derivative, the derivative at S in the direction E, is

    L(S, E) = ∫₀¹ e^{sS} E e^{(1-s)S} ds = V (Φ ∘ (Vᴴ E V)) Vᴴ,
    Φ_jk = e^{i(θ_j + θ_k)/2} sinc((θ_j - θ_k)/2),   sinc(x) = sin(x)/x.

No difference of eigenvalues is divided by, so it is right at S = 0 and at every
degenerate eigenvalue, where the derivative of `eigh` itself is NaN. Two facts make
it a primitive instead of a second `custom_jvp`:

* L is linear in E with transpose ct ↦ L(Sᵀ, ct), which is L again;
* inside reverse mode JAX drops the rule of a `custom_jvp` whose argument is a
  tangent and would then differentiate `eigh` for the second derivative. A primitive
  keeps its rule: ∂L/∂S is that of a plain Taylor series with scaling and squaring,
  which JAX differentiates as often as it likes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_SQUARINGS = 18


def cis(angle: jax.Array) -> jax.Array:
    """e^{i·angle}, of modulus one to rounding for every real angle."""
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))


@jax.custom_jvp
def expm_skew(s: jax.Array) -> jax.Array:
    """Exponential of skew-Hermitian matrices: unitary to rounding, whatever the norm.

    Exact. Cost: one `eigh` a matrix. Derivatives: forward and reverse mode to every
    order, the first by the formula above (one more `eigh`, four products), higher ones
    by scaling and squaring: some 40 products each, and NaN for ‖S‖ > 2¹⁶.

    Args:
      s: complex array [..., C, C] with sᴴ = -s; only one triangle is read, so project
        first when in doubt.

    Returns:
      A complex array like ``s``. Other matrices are not refused: see ``s``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.unitary import expm_skew
      >>> s = jnp.array([[0, -1], [1, 0]], complex)
      >>> (jnp.rint(expm_skew(s * jnp.pi / 2).real) + 0.0).tolist()  # a quarter turn
      [[0.0, -1.0], [1.0, 0.0]]
      >>> zero = jnp.zeros((2, 2), complex)  # all eigenvalues equal
      >>> (jnp.rint(jax.jvp(expm_skew, (zero,), (s,))[1].real) + 0.0).tolist()
      [[0.0, -1.0], [1.0, 0.0]]

    References:
      Najfeld and Havel, "Derivatives of the Matrix Exponential and Their
      Computation", Advances in Applied Mathematics 16, 1995 (Fréchet derivative in
      the eigenbasis). The sinc form is its skew-Hermitian case.
    """
    theta, v = jnp.linalg.eigh(-1j * s)
    one = jnp.broadcast_to(jnp.eye(s.shape[-1], dtype=s.dtype), s.shape)
    u = (v * cis(theta)[..., None, :]) @ adjoint(v)
    # One Newton step towards the nearest unitary matrix. In float32 the eigenvectors
    # are orthonormal to 1e-6 only, and a thousand steps with U would add that up.
    return u - u @ (adjoint(u) @ u - one) / 2


@expm_skew.defjvp
def _expm_skew_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (s,), (e,) = primals, tangents
    # θ and V are data for the primitive; how they move with S is its own business.
    theta, v = jnp.linalg.eigh(-1j * jax.lax.stop_gradient(s))
    return expm_skew(s), _frechet_p.bind(s, theta, v, e)


def adjoint(m: jax.Array) -> jax.Array:
    """Conjugate transpose of the last two axes."""
    return jnp.conj(jnp.swapaxes(m, -1, -2))


def _frechet(s: jax.Array, theta: jax.Array, v: jax.Array, e: jax.Array) -> jax.Array:
    mean = (theta[..., :, None] + theta[..., None, :]) / 2
    half = (theta[..., :, None] - theta[..., None, :]) / 2
    sinc = jnp.sinc(half / jnp.pi)  # jnp.sinc(x) is sin(πx)/(πx)
    phi = cis(mean) * jax.lax.complex(sinc, jnp.zeros_like(sinc))
    return v @ (phi * (adjoint(v) @ e @ v)) @ adjoint(v)


def _expm_by_squaring(s: jax.Array) -> jax.Array:
    """(Σ_n (S/2^k)^n / n!)^(2^k) with ‖S‖/2^k < 1/2; for second derivatives only.

    `jax.scipy.linalg.expm` would do, but takes ten times as long to compile.
    """
    norm = jnp.max(jnp.sum(jnp.abs(jax.lax.stop_gradient(s)), -2), -1)
    k = jnp.maximum(0, jnp.floor(jnp.log2(norm)) + 2)[..., None, None]
    one = jnp.broadcast_to(jnp.eye(s.shape[-1], dtype=s.dtype), s.shape)
    small = s * jnp.where(k > _SQUARINGS, jnp.nan, 2.0**-k).astype(s.dtype)
    # 2⁻ⁿ/n! < 1e-17 for n = 14.
    horner = lambda u, n: (one + small @ u / n, None)
    u, _ = jax.lax.scan(horner, one, jnp.arange(14, 0, -1).astype(s.dtype))
    square = lambda u, i: (jnp.where(i < k, u @ u, u), None)
    return jax.lax.scan(square, u, jnp.arange(_SQUARINGS).astype(norm.dtype))[0]


def _frechet_jvp(primals: Any, tangents: Any) -> Any:
    s, theta, v, e = primals
    s_dot, _, _, e_dot = tangents
    out = _frechet_p.bind(s, theta, v, e)
    parts = []
    if not isinstance(e_dot, ad.Zero):
        parts.append(_frechet_p.bind(s, theta, v, e_dot))
    if not isinstance(s_dot, ad.Zero):
        derivative = lambda s: jax.jvp(_expm_by_squaring, (s,), (e,))[1]
        parts.append(jax.jvp(derivative, (s,), (s_dot,))[1])
    return out, sum(parts, jnp.zeros_like(out))


def _frechet_transpose(
    cotangent: Any, s: jax.Array, theta: jax.Array, v: jax.Array, e: Any
) -> tuple[None, None, None, jax.Array]:
    # Sᵀ is skew-Hermitian with eigenvectors conj(V) and the same θ.
    s_t = jnp.swapaxes(s, -1, -2)
    return None, None, None, _frechet_p.bind(s_t, theta, jnp.conj(v), cotangent)


def _frechet_batch(args: Any, axes: Any) -> tuple[jax.Array, int]:
    size = next(
        x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None
    )
    front = (
        jnp.broadcast_to(x, (size, *x.shape))
        if axis is None
        else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(args, axes, strict=True)
    )
    return _frechet_p.bind(*front), 0


_frechet_p = Primitive("expm_skew_frechet")
_frechet_p.def_impl(jax.jit(_frechet))
_frechet_p.def_abstract_eval(lambda s, theta, v, e: e)
mlir.register_lowering(_frechet_p, mlir.lower_fun(_frechet, multiple_results=False))
ad.primitive_jvps[_frechet_p] = _frechet_jvp
ad.primitive_transposes[_frechet_p] = _frechet_transpose
batching.primitive_batchers[_frechet_p] = _frechet_batch
