"""Convolution kernels that are orthogonal or unitary by construction.

Legend: Λ = Z_N1 × … × Z_Nd is the periodic lattice, d = 1, 2 or 3; C the number of
channels. A *kernel* is an array [*window] (one channel) or [*window, C, C]
(output, input); offset 0 sits at index n // 2 of each window axis. A *field* is an
array [*Λ] or [*Λ, C]. Hats denote discrete Fourier transforms over the lattice axes,
which turn the convolution (A ⊗ z)(x) = Σ_y A(x - y) z(y) into a product, or into a
C × C product, at every frequency.

A boundary that reflects is a ring of 2N sites in each axis, on which the field is even,
z(2N - 1 - x) = z(x), or odd, with a minus sign. A kernel with A(-x) = A(x) in each axis
keeps it so, and its U is unitary on these fields as on all others.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rbpjax.unitary.expm import (
    METHODS,
    adjoint,
    cis,
    expm_skew,
    orthogonalized,
    skew,
)
from rbpjax.unitary.orthogonal import orthogonal_cayley

BOUNDARIES = ("periodic", "even", "odd")
MAPS = (*METHODS, "cayley")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["hat"],
    meta_fields=["lattice", "real", "boundary"],
)
@dataclasses.dataclass(frozen=True)
class FourierKernel:
    """A convolution kept in Fourier form; calling it convolves a field.

    Exact. Cost of a call: two FFTs of the field, O(C N log N + C² N) for N sites; with
    a boundary that reflects, of a field of twice the size in each axis.
    Memory: ``hat``, C² numbers a frequency. AD modes: all. A pytree with the one leaf
    ``hat``, so that it passes through every transformation. A call takes one field; use
    `jax.vmap` for a batch.

    Attributes:
      hat: the transfer function; complex [*frequencies] or [*frequencies, C, C].
      lattice: sizes of the lattice.
      real: whether the kernel is real; then only the half of the spectrum that
        `jnp.fft.rfftn` keeps is stored.
      boundary: "periodic", or "even" or "odd": then ``hat`` is that of a lattice of
        twice the size in each axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.unitary import conv_exp
      >>> u = conv_exp(jnp.array([-0.5, 0.0, 0.5]), (8,))
      >>> u.real, u.hat.shape, u(jnp.ones(8)).shape, u.adjoint().lattice
      (True, (5,), (8,), (8,))

    References:
      Magnasco, https://arxiv.org/abs/2302.07396.
    """

    hat: jax.Array
    lattice: tuple[int, ...]
    real: bool
    boundary: str = "periodic"

    def __call__(self, field: jax.Array) -> jax.Array:
        """The convolution U ⊗ field, of the shape of the field.

        A real kernel keeps the dtype of the field; a complex one returns complex.

        Args:
          field: array [*Λ] or [*Λ, C].

        Raises:
          ValueError: if the field is no floating-point array, or its shape or
            precision is not the kernel's.
        """
        self._check(field)
        if self.real and jnp.iscomplexobj(field):
            return jax.lax.complex(self(field.real), self(field.imag))
        axes = range(len(self.lattice))
        if self.boundary != "periodic":
            field = self._reflected(field)
        if self.real:
            product = self._multiply(jnp.fft.rfftn(field, axes=axes))
            out = jnp.fft.irfftn(product, s=self._ring, axes=axes)
        else:
            product = self._multiply(jnp.fft.fftn(field, axes=axes))
            out = jnp.fft.ifftn(product, axes=axes)
        return out[tuple(map(slice, self.lattice))]

    def adjoint(self) -> FourierKernel:
        """The adjoint convolution, conj(U(-x))ᵀ: the inverse of a unitary kernel."""
        hat = adjoint(self.hat) if self.has_channels else jnp.conj(self.hat)
        return dataclasses.replace(self, hat=hat)

    def kernel(self) -> jax.Array:
        """U itself on the whole lattice, [*Λ] or [*Λ, C, C], offset 0 at index 0.

        Where the boundary reflects, on the lattice of twice the size.
        """
        axes = range(len(self.lattice))
        if self.real:
            return jnp.fft.irfftn(self.hat, s=self._ring, axes=axes)
        return jnp.fft.ifftn(self.hat, axes=axes)

    @property
    def has_channels(self) -> bool:
        """Whether fields have a channel axis."""
        return self.hat.ndim == len(self.lattice) + 2

    @property
    def _ring(self) -> tuple[int, ...]:
        """Sizes of the periodic lattice on which the convolution is done."""
        twice = 1 if self.boundary == "periodic" else 2
        return tuple(twice * n for n in self.lattice)

    def _reflected(self, field: jax.Array) -> jax.Array:
        sign = 1 if self.boundary == "even" else -1
        for axis in range(len(self.lattice)):
            field = jnp.concatenate([field, sign * jnp.flip(field, axis)], axis)
        return field

    def _multiply(self, field_hat: jax.Array) -> jax.Array:
        if self.has_channels:
            return jnp.einsum("...oi,...i->...o", self.hat, field_hat)
        return self.hat * field_hat

    def _check(self, field: jax.Array) -> None:
        floating = hasattr(field, "dtype") and jnp.issubdtype(field.dtype, jnp.inexact)
        if not floating:
            shown = getattr(field, "dtype", type(field).__name__)
            raise ValueError(
                f"`field` must be a floating-point or complex array; got {shown}. "
                "Cast it."
            )
        channels = self.hat.shape[-1:] if self.has_channels else ()
        if field.shape != (*self.lattice, *channels):
            raise ValueError(
                f"`field` must have the kernel's shape {(*self.lattice, *channels)}; "
                f"got {field.shape}. Use jax.vmap for leading batch axes."
            )
        if jnp.finfo(field.dtype).bits != jnp.finfo(self.hat.dtype).bits:
            raise ValueError(
                "`field` and the kernel must have the same precision; got "
                f"{field.dtype} and a kernel in {self.hat.dtype}. Cast one of them."
            )


def fourier_kernel(kernel: jax.Array, lattice: tuple[int, ...]) -> FourierKernel:
    """Fourier form of a kernel, as it is: periodic convolution with ``kernel``.

    Exact. Cost: one FFT of the lattice a channel pair. All AD modes, any order.

    Args:
      kernel: real or complex array [*window] or [*window, C, C], offset 0 at index
        n // 2 of each window axis; no window axis longer than the lattice's.
      lattice: sizes of the periodic lattice, one to three of them.

    Returns:
      A `FourierKernel`, half-spectrum if ``kernel`` is real.

    Raises:
      ValueError: if lattice and kernel do not fit each other.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.unitary import fourier_kernel
      >>> shift = fourier_kernel(jnp.array([0.0, 0.0, 1.0]), (5,))  # offset +1
      >>> jnp.rint(shift(jnp.arange(1.0, 6.0))).tolist()
      [5.0, 1.0, 2.0, 3.0, 4.0]

    References:
      Magnasco, https://arxiv.org/abs/2302.07396.
    """
    window, real = _check_kernel(kernel, lattice), not jnp.iscomplexobj(kernel)
    pad = [(0, n - w) for n, w in zip(lattice, window, strict=True)]
    axes = tuple(range(len(lattice)))
    full = jnp.pad(kernel, pad + [(0, 0)] * (kernel.ndim - len(lattice)))
    full = jnp.roll(full, [-(w // 2) for w in window], axes)
    hat = jnp.fft.rfftn(full, axes=axes) if real else jnp.fft.fftn(full, axes=axes)
    return FourierKernel(hat, tuple(lattice), real)


def conv_exp(
    weights: jax.Array,
    lattice: tuple[int, ...],
    *,
    method: str = "taylor",
    boundary: str = "periodic",
) -> FourierKernel:
    """The orthogonal or unitary kernel U = δ + A + A⊗A/2! + … of free weights.

    A = (W - W†)/2 with W†(x) = conj(W(-x))ᵀ is the skew part of the weights W. Hence
    Â(k) is skew-Hermitian and Û(k) = exp(Â(k)) unitary at every frequency k, for all
    weights: U preserves the norm of every field, and its inverse is its adjoint.
    Real weights give an orthogonal, complex ones a unitary kernel. U has full support
    and decays factorially away from the window of A.

    Exact, to rounding, and unitary to rounding at any norm. Cost: one FFT of the
    lattice a channel pair and, for C > 1, some ten C × C products a frequency, and one
    for each doubling of ‖Â‖ beyond 1; compute it once per update of the weights and
    close the scan over the result. Forward and reverse mode, every order; right at
    A = 0 and at degenerate eigenvalues (second derivatives with C > 1: for
    ‖Â‖ ≤ 2¹⁶, and else NaN, as in `expm_skew`). The derivative is the Fréchet
    derivative: for one channel ∂U(x)/∂A(y) = U(x - y).

    A single real channel cannot rotate the spatial mean (nor the Nyquist modes of even
    sizes): Û = 1 there. Use complex weights or C ≥ 2 where that matters. ω is
    determined up to 2π only: keep max|Â| < π for a parametrisation without folds.

    ``method="cayley"`` is another map than the exponential: the rational function
    Û(k) = (1 - Â(k)/2)⁻¹ (1 + Â(k)/2), equal to it up to the second order in A. It is
    unitary for all weights all the same, and one-to-one, without folds; an eigenvalue
    -1 is out of its reach, and U decays away from the window exponentially, not
    factorially. It costs one solve and five products a frequency at any ‖Â‖, its
    derivative two products; every order.

    With ``boundary`` "even" or "odd" fields are reflected at the edges instead of going
    on at the other side; the norm is kept all the same. W is then averaged over the
    reflections of each axis, W(-x) = W(x), before its skew part is taken: Â(k) of real
    weights is a real skew matrix, and that of a single real channel zero. The
    exponential is taken at N + 1 frequencies an axis.

    Args:
      weights: real or complex array [*window] or [*window, C, C]. Complex weights are
        best built from real leaves inside the loss, because `jax.grad` returns the
        conjugate of the descent direction for a complex leaf.
      lattice: sizes of the lattice.
      method: how `expm_skew` takes the exponentials of several channels: "taylor",
        "pade" or "eigh"; or "cayley", another map, for any number of channels.
      boundary: "periodic"; "even", as a cosine transform has it (no flow through the
        edges); or "odd", as a sine transform has it (zero half a site beyond them).

    Returns:
      A `FourierKernel` whose `adjoint` is its inverse.

    Raises:
      ValueError: if lattice and weights do not fit each other, ``method`` or
        ``boundary`` is none, or a single real channel is to be reflected.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.unitary import conv_exp
      >>> u = conv_exp(0.8 * jnp.array([-1.0, 0.0, 1.0]), (32,))  # A = a(δ₁ - δ₋₁)
      >>> [round(float(x), 4) for x in u.kernel()[:3]]  # Bessel functions J_x(2a)
      [0.4554, 0.5699, 0.257]
      >>> z = jnp.sin(jnp.arange(32.0))
      >>> bool(jnp.max(jnp.abs(u.adjoint()(u(z)) - z)) < 1e-5)
      True

    References:
      Magnasco, "Convolutional unitary or orthogonal recurrent neural networks",
      https://arxiv.org/abs/2302.07396 (U = e_⊗^A by FFT). Several channels follow
      Hoogeboom et al., "The Convolution Exponential and Generalized Sylvester
      Flows", NeurIPS 2020, with the exponential taken exactly at each frequency. The
      Cayley transform at each frequency: Trockman and Kolter, "Orthogonalizing
      Convolutional Layers with the Cayley Transform", ICLR 2021,
      https://arxiv.org/abs/2104.07167; there its inverse, (1 + A)⁻¹ (1 - A).
    """
    if method not in MAPS:
        raise ValueError(
            f"`method` must be one of {', '.join(map(repr, MAPS))}; got {method!r}."
        )
    if boundary != "periodic":
        return _reflecting(weights, lattice, method, boundary)
    a = fourier_kernel(weights, lattice)
    hat = _unitary(a.hat, a.has_channels, method)
    if a.real:
        hat = hat + jax.lax.stop_gradient(_of_real_kernel(hat, lattice) - hat)
    return dataclasses.replace(a, hat=hat)


def _reflecting(
    weights: jax.Array, lattice: tuple[int, ...], method: str, boundary: str
) -> FourierKernel:
    """`conv_exp` with a boundary that reflects: exp at the frequencies 0 … N alone.

    The others are their mirror images, to the last bit: where Û(k) and Û(-k) differ, an
    even field does not stay even, and cropping loses a part of its norm.
    """
    if boundary not in BOUNDARIES:
        raise ValueError(
            f"`boundary` must be one of {', '.join(map(repr, BOUNDARIES))}; got "
            f"{boundary!r}."
        )
    _check_kernel(weights, lattice)
    ring = tuple(2 * n for n in lattice)
    a = fourier_kernel(weights, ring)
    if a.real and not a.has_channels:
        raise ValueError(
            "a single real channel cannot be reflected: its skew kernel, A(-x) = -A(x) "
            "= A(x), is zero. Use complex weights or channels."
        )
    hat, last = a.hat, len(lattice) - 1
    for axis, n in enumerate(lattice[:last] if a.real else lattice):
        at = lambda k, hat=hat, axis=axis: jnp.take(hat, k, axis)
        half = np.arange(n + 1)
        hat = (at(half) + at(-half % (2 * n))) / 2
    if a.real:
        hat = hat.real  # the average over ±k of the last axis, of which k ≥ 0 is stored
    hat = _unitary(hat, a.has_channels, method)
    for axis, n in enumerate(lattice[:last] if a.real else lattice):
        k = np.arange(2 * n)
        hat = jnp.take(hat, np.minimum(k, 2 * n - k), axis)
    return FourierKernel(hat.astype(a.hat.dtype), tuple(lattice), a.real, boundary)


def _unitary(hat: jax.Array, has_channels: bool, method: str) -> jax.Array:
    """Û(k) of the skew part of Ŵ(k), where W† is the adjoint of each block."""
    if has_channels and method == "cayley":
        return orthogonal_cayley(hat)
    if has_channels:
        return expm_skew(skew(hat), method=method)
    # The real part is no part of A, but what is not finite in it must be seen.
    angle = hat.imag + 0 * hat.real
    return cis(2 * jnp.arctan(angle / 2) if method == "cayley" else angle)


def _of_real_kernel(hat: jax.Array, lattice: tuple[int, ...]) -> jax.Array:
    """Unitary matrices Û(k), made those of a real kernel: Û(-k) = conj Û(k).

    The exponential of a large A has phases with errors of ε‖A‖, other ones at -k than
    at k. Where both are stored, which is at the first and the middle entry of the last
    axis, one is the conjugate of the other, and real where k = -k: orthogonalized, as
    the real part of a unitary matrix is not orthogonal.
    """
    *lead, last = lattice
    matrices = hat.shape[len(lattice) :] or (1, 1)
    places = np.arange(math.prod(lead)).reshape(lead)
    there = places[np.ix_(*(-np.arange(n) % n for n in lead))] if lead else places
    here, there = places.ravel(), there.ravel()
    alone, second = here[here == there], here[here > there]
    for index in {0, last // 2} if last % 2 == 0 else {0}:
        at = (*(slice(None) for _ in lead), index)
        plane = hat[at].reshape(len(here), *matrices)
        real = orthogonalized(plane[alone].real)
        plane = plane.at[alone].set(real.astype(plane.dtype))
        plane = plane.at[second].set(jnp.conj(plane[there[second]]))
        hat = hat.at[at].set(plane.reshape(hat[at].shape))
    return hat


def _check_kernel(kernel: jax.Array, lattice: tuple[int, ...]) -> tuple[int, ...]:
    sizes = isinstance(lattice, (tuple, list)) and all(
        isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in lattice
    )
    if not sizes or not 1 <= len(lattice) <= 3:
        raise ValueError(
            f"`lattice` must be one to three positive Python ints; got {lattice!r}."
        )
    if not hasattr(kernel, "shape") or not hasattr(kernel, "dtype"):
        raise ValueError(
            f"a kernel must be an array; got {type(kernel).__name__}. Use jnp.asarray."
        )
    d = len(lattice)
    window, channels = kernel.shape[:d], kernel.shape[d:]
    if len(window) < d or len(channels) not in (0, 2) or len(set(channels)) > 1:
        raise ValueError(
            f"a kernel on the lattice {lattice} must have shape [*window] or "
            f"[*window, C, C] with {d} window axes; got {kernel.shape}."
        )
    if any(w > n for w, n in zip(window, lattice, strict=True)):
        raise ValueError(
            f"no window axis may exceed the lattice {lattice}; got {window}. "
            "Crop the kernel or enlarge the lattice."
        )
    if not jnp.issubdtype(kernel.dtype, jnp.inexact):
        raise ValueError(
            f"a kernel must be of floating point or complex dtype; got {kernel.dtype}."
        )
    return window
