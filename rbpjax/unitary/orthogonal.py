"""Dense orthogonal and unitary matrices of free weights, for `DenseCell` and others.

Real weights give orthogonal, complex ones unitary matrices, to rounding: whatever the
weights are and however large.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching

from rbpjax._core.tree import power_of_two
from rbpjax.unitary.expm import (
    adjoint,
    angles,
    cis,
    expm_skew,
    one_like,
    orthogonalized,
    polished,
    primitive,
    skew,
)


def orthogonal_exp(weights: jax.Array, *, method: str = "taylor") -> jax.Array:
    """e^S of the skew part S = (W - Wᴴ)/2 of free weights, as in expRNN.

    Exact. Reaches every rotation and every unitary matrix, not the reflections.
    Angles are determined up to 2π only: keep ‖S‖ < π for a parametrisation without
    folds. Cost: about ten N × N products, see `expm_skew`. Orthogonal to rounding at
    any norm. AD modes: all, every order (from the second on for ‖S‖ ≤ 2¹⁶).

    Args:
      weights: real or complex array [..., N, N].
      method: "taylor", "pade" or "eigh", see `expm_skew`.

    Returns:
      An array like ``weights``.

    Raises:
      ValueError: if ``weights`` is no floating-point array of square matrices, or
        ``method`` is none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.unitary import orthogonal_exp
      >>> u = orthogonal_exp(100 * jax.random.normal(jax.random.key(0), (8, 8)))
      >>> bool(jnp.max(jnp.abs(u.T @ u - jnp.eye(8))) < 1e-5)
      True

    References:
      Lezcano-Casado and Martínez-Rubio, "Cheap Orthogonal Constraints in Neural
      Networks", ICML 2019, https://arxiv.org/abs/1901.08428.
    """
    _check(weights, square=True)
    return expm_skew(skew(weights), method=method)


def orthogonal_cayley(weights: jax.Array) -> jax.Array:
    """The Cayley transform (1 - S/2)⁻¹ (1 + S/2) of the skew part S of free weights.

    Exact. Equal to e^S up to the second order, and one-to-one: no folds. Does not reach
    the eigenvalue -1, to which large weights come near. Cost: one solve and five
    products; where the solve loses the orthogonality, near ‖S‖ = ε^(-3/4), one `eigh`
    of the batch instead. Orthogonal to rounding at any norm. AD modes: all, every
    order; the first derivative is dU = ¼ (1 + U) dS (1 + U), two products.

    Args:
      weights: real or complex array [..., N, N], S = (W - Wᴴ)/2.

    Returns:
      An array like ``weights``.

    Raises:
      ValueError: if ``weights`` is no floating-point array of square matrices.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.unitary import orthogonal_cayley
      >>> quarter_turn = orthogonal_cayley(jnp.array([[0.0, -4.0], [0.0, 0.0]]))
      >>> (jnp.rint(quarter_turn) + 0.0).tolist()  # 2 atan(2/2) is a quarter turn
      [[0.0, -1.0], [1.0, 0.0]]

    References:
      Helfrich, Willmott and Ye, "Orthogonal Recurrent Neural Networks with Scaled
      Cayley Transform", ICML 2018, https://arxiv.org/abs/1707.09520.
    """
    _check(weights, square=True)
    return _cayley_p.bind(skew(weights))


def orthogonal_householder(weights: jax.Array) -> jax.Array:
    """The product H₁ H₂ … H_K of the reflections H = 1 - 2 v vᴴ/‖v‖² at K free vectors.

    Exact. Real: K = N reach every orthogonal matrix of determinant (-1)ᴺ, K = N - 1 the
    others; fewer give a smaller family at a smaller cost. Complex: every unitary matrix
    is such a product times a diagonal one. A vector of zeros is no reflection, H = 1.
    The length of a vector does not matter, and its gradient is as large as 1/‖v‖.

    Computed as 1 - V T Vᴴ with T⁻¹ = ½ + the upper triangle of VᴴV for unit vectors:
    one triangular solve and two products, of cost O(K²N + KN²). An error of T⁻¹ reaches
    the product through V T and T Vᴴ, whose columns and rows have length 2, so that
    ``‖UᴴU - 1‖`` is of the order K²ε at most for all vectors, also parallel ones. AD
    modes: all, every order.

    Args:
      weights: real or complex array [..., K, N], the vectors as rows.

    Returns:
      An array [..., N, N] of the same dtype.

    Raises:
      ValueError: if ``weights`` is no floating-point array [..., K, N].

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.unitary import orthogonal_householder
      >>> swap = orthogonal_householder(jnp.array([[3.0, -3.0]]))
      >>> (jnp.rint(swap) + 0.0).tolist()
      [[0.0, 1.0], [1.0, 0.0]]

    References:
      Mhammedi, Hellicar, Rahman and Bailey, "Efficient Orthogonal Parametrisation of
      Recurrent Neural Networks Using Householder Reflections", ICML 2017; the compact
      form: Joffrain et al., "Accumulating Householder transformations, revisited",
      ACM Transactions on Mathematical Software 32, 2006.
    """
    _check(weights, square=False)
    size = jnp.maximum(jnp.abs(weights.real), jnp.abs(weights.imag))
    top = power_of_two(jax.lax.stop_gradient(jnp.max(size, -1, keepdims=True)))
    v = weights * (1 / top).astype(weights.dtype)
    square = jnp.sum(v.real**2 + v.imag**2, -1, keepdims=True)
    none = square == 0
    length = jnp.sqrt(jnp.where(none, 1, square))
    v = v / length.astype(v.dtype)
    inner = jnp.conj(v) @ jnp.swapaxes(v, -1, -2)
    half = jnp.broadcast_to(jnp.eye(v.shape[-2], dtype=v.dtype) / 2, inner.shape)
    t_v = jax.lax.linalg.triangular_solve(
        half + jnp.triu(inner, 1), jnp.conj(v), left_side=True, lower=False
    )
    one = jnp.broadcast_to(
        jnp.eye(v.shape[-1], dtype=v.dtype), (*v.shape[:-2], *v.shape[-1:] * 2)
    )
    return one - jnp.swapaxes(v, -1, -2) @ t_v


def _cayley(s: jax.Array) -> jax.Array:
    one = one_like(s)
    u = jnp.linalg.solve(one - s / 2, one + s / 2)
    off = jnp.max(jnp.abs(adjoint(u) @ u - one), (-2, -1), keepdims=True, initial=0.0)
    # Two Newton steps bring a distance of ε^¼ below rounding. The solve does not where
    # 1 is little beside S: eigenvectors do. Also of NaN.
    near = off < jnp.finfo(s.dtype).eps ** 0.25

    def by_angles() -> jax.Array:
        theta, v = angles(s)
        w = (v * cis(2 * jnp.arctan(theta / 2))[..., None, :]) @ adjoint(v)
        w = w if jnp.iscomplexobj(s) else orthogonalized(w.real)
        return jnp.where(near, u, w)

    u = jax.lax.cond(jnp.all(near), lambda: u, by_angles)
    return polished(polished(u))


def _cayley_jvp(primals: Any, tangents: Any) -> Any:
    u = _cayley_p.bind(*primals)
    # (1 - S/2)⁻¹ = (1 + U)/2: no solve, and right where that would not be.
    half = (one_like(u) + u) / 2
    return u, half @ ad.instantiate_zeros(tangents[0]) @ half


def _cayley_batch(args: Any, axes: Any) -> tuple[jax.Array, int]:
    return _cayley_p.bind(jnp.moveaxis(args[0], axes[0], 0)), 0


_cayley_p = primitive("cayley", _cayley)
ad.primitive_jvps[_cayley_p] = _cayley_jvp
batching.primitive_batchers[_cayley_p] = _cayley_batch


def _check(weights: jax.Array, *, square: bool) -> None:
    dtype, shape = getattr(weights, "dtype", None), getattr(weights, "shape", ())
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            "`weights` must be a floating-point or complex array; got "
            f"{dtype or type(weights).__name__}. Cast it."
        )
    if len(shape) < 2 or (square and shape[-1] != shape[-2]):
        want = "[..., N, N], square matrices" if square else "[..., K, N], K vectors"
        raise ValueError(f"`weights` must have the shape {want}; got {shape}.")
