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
  keeps its rule: ∂L/∂S is that of `jax.scipy.linalg.expm`, differentiated twice.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.scipy.linalg import expm


def cis(angle: jax.Array) -> jax.Array:
    """e^{i·angle}, of modulus one to rounding for every real angle."""
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))


@jax.custom_jvp
def expm_skew(s: jax.Array) -> jax.Array:
    """Exponential of skew-Hermitian matrices: unitary to rounding, whatever the norm.

    Exact. Cost: one `eigh` a matrix. Derivatives: forward and reverse mode to every
    order, the first by the formula above (one more `eigh`, six products), higher ones
    through `jax.scipy.linalg.expm`, which costs several times that.

    Args:
      s: complex array [..., C, C] with sᴴ = -s; only one triangle is read, so project
        first when in doubt.

    Returns:
      A complex array like ``s``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.unitary.expm import expm_skew
      >>> s = jnp.array([[0, -1], [1, 0]], complex)
      >>> print(expm_skew(s * jnp.pi / 2).real.round(12) + 0.0)
      [[ 0. -1.]
       [ 1.  0.]]
      >>> zero = jnp.zeros((2, 2), complex)  # all eigenvalues equal
      >>> print(jax.jvp(expm_skew, (zero,), (s,))[1].real)
      [[ 0. -1.]
       [ 1.  0.]]

    References:
      Najfeld and Havel, "Derivatives of the Matrix Exponential and Their
      Computation", Advances in Applied Mathematics 16, 1995 (Fréchet derivative in
      the eigenbasis). The sinc form is its skew-Hermitian case.
    """
    theta, v = jnp.linalg.eigh(-1j * s)
    return (v * cis(theta)[..., None, :]) @ adjoint(v)


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


def _frechet_jvp(primals: Any, tangents: Any) -> Any:
    s, theta, v, e = primals
    s_dot, _, _, e_dot = tangents
    out = _frechet_p.bind(s, theta, v, e)
    parts = []
    if not isinstance(e_dot, ad.Zero):
        parts.append(_frechet_p.bind(s, theta, v, e_dot))
    if not isinstance(s_dot, ad.Zero):
        derivative = lambda s: jax.jvp(expm, (s,), (e,))[1]
        parts.append(jax.jvp(derivative, (s,), (s_dot,))[1])
    return out, sum(parts[1:], parts[0]) if parts else ad.Zero.from_primal_value(out)


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
