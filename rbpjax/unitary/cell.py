"""Recurrent cells Z ← φ(U ⊗ Z + B x) with a unitary convolution U."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbpjax.types import check_count, strategy
from rbpjax.unitary.kernel import FourierKernel, conv_exp


@strategy
class Activation:
    """A nonlinearity of fields and, where it exists, its inverse.

    Attributes:
      apply: field to field, same shape and dtype.
      inverse: the inverse map, or None if there is none.
    """

    apply: Callable[[jax.Array], jax.Array]
    inverse: Callable[[jax.Array], jax.Array] | None = None

    def __call__(self, field: jax.Array) -> jax.Array:
        """Applies the nonlinearity."""
        return self.apply(field)


def _squared_modulus(z: jax.Array) -> jax.Array:
    return z.real**2 + z.imag**2


def _saturate(z: jax.Array) -> jax.Array:
    return z * jax.lax.rsqrt(1 + _squared_modulus(z)).astype(z.dtype)


def _desaturate(z: jax.Array) -> jax.Array:
    return z * jax.lax.rsqrt(1 - _squared_modulus(z)).astype(z.dtype)


def _modulus(z: jax.Array) -> jax.Array:
    # Componentwise, also on complex fields, where |z| alone would lose N more reals.
    if jnp.iscomplexobj(z):
        return jax.lax.complex(jnp.abs(z.real), jnp.abs(z.imag))
    return jnp.abs(z)


def _max_min(z: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(z):
        return jax.lax.complex(_max_min(z.real), _max_min(z.imag))
    if z.shape[-1] % 2:
        raise ValueError(
            "max_min sorts pairs along the last axis (the channels), which must be "
            f"even; got a field of shape {z.shape}."
        )
    pairs = z.reshape(*z.shape[:-1], -1, 2)
    return jnp.stack([pairs.max(-1), pairs.min(-1)], -1).reshape(z.shape)


identity = Activation(lambda z: z, lambda z: z)
"""φ(z) = z: the linear cell. Norm and gradient are preserved exactly."""

saturate = Activation(_saturate, _desaturate)
"""φ(z) = z/√(1+|z|²), the phase-preserving sigmoid of the paper (|φ| < 1).

Not an isometry: as a map of the plane its singular values are (1+r²)^(-1/2) along
the phase and (1+r²)^(-3/2) along the radius r = |z|. Without input it forgets as
1/√n, not exponentially. Its inverse z/√(1-|z|²) is ill-conditioned near |z| = 1.
"""

modulus = Activation(_modulus)
"""Componentwise |·| (of real and imaginary parts): keeps the norm, has no inverse."""

max_min = Activation(_max_min)
"""(max, min) of each pair of channels (GroupSort): keeps the norm, no inverse."""


class CellWeights(NamedTuple):
    """The free parameters of a cell: real leaves, whatever the field.

    Those of a complex cell have a last axis (real part, imaginary part).

    Attributes:
      kernel: free weights of the kernel, see `conv_exp`.
      encoder: B, [*Λ(, C), inputs], or None: then inputs are fields.
      decoder: read-out, [outputs, *Λ(, C)], or None.
      bias: [outputs], or None.
    """

    kernel: jax.Array
    encoder: jax.Array | None
    decoder: jax.Array | None
    bias: jax.Array | None


class CellParams(NamedTuple):
    """What the step function needs: `CellWeights` with the kernel in Fourier form."""

    kernel: FourierKernel
    encoder: jax.Array | None
    decoder: jax.Array | None
    bias: jax.Array | None


@strategy
class UnitaryCell:
    """The cell Z ← φ(U ⊗ Z + B x) as a step function ``cell(params, inputs, h)``.

    The object holds what is static; parameters are explicit. `prepare` takes the
    exponential once per update of the weights, outside the scan over time. The cell
    with the identity preserves the norm of state and gradient exactly, for as many
    steps as one likes; `modulus` and `max_min` keep both norms too (almost
    everywhere); `saturate` contracts in proportion to the amplitude.

    Recurrent back-propagation does not apply to it: the Jacobian of the linear cell
    is unitary, ρ(J) = 1, and there is no fixed point to converge to. Use
    `recomputed_scan`.

    Attributes:
      lattice: sizes of the periodic lattice.
      channels: number of channels, or None for fields without a channel axis.
      complex_valued: whether the fields and the kernel are complex.
      activation: φ.

    Raises:
      ValueError: when made with a lattice or a channel number that is none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.unitary import UnitaryCell, identity
      >>> cell = UnitaryCell((32,), activation=identity)
      >>> weights = cell.init(jax.random.key(0), radius=2, inputs=3, outputs=1)
      >>> params, h = cell.prepare(weights), cell.start()
      >>> h = cell(params, jnp.array([1.0, 0.0, 2.0]), h)  # a kick, then 1,000 steps
      >>> later = jax.lax.fori_loop(0, 1000, lambda _, h: cell(params, None, h), h)
      >>> print((jnp.linalg.norm(later) / jnp.linalg.norm(h)).round(12))
      1.0

    References:
      Magnasco, https://arxiv.org/abs/2302.07396; φ and its dynamics: Chandra and
      Magnasco, https://arxiv.org/abs/2405.13854.
    """

    lattice: tuple[int, ...]
    channels: int | None = None
    complex_valued: bool = True
    activation: Activation = saturate

    def __post_init__(self) -> None:
        """Validates the static fields."""
        if not isinstance(self.lattice, tuple) or not 1 <= len(self.lattice) <= 3:
            raise ValueError(
                "UnitaryCell: `lattice` must be a tuple of one to three ints; "
                f"got {self.lattice!r}."
            )
        for size in self.lattice:
            check_count(self, "lattice", size, 1)
        if self.channels is not None:
            check_count(self, "channels", self.channels, 1)

    @property
    def field_shape(self) -> tuple[int, ...]:
        """Shape of the state, [*Λ] or [*Λ, C]."""
        return self.lattice + (() if self.channels is None else (self.channels,))

    def start(self) -> jax.Array:
        """The state zero, in JAX's default precision."""
        return jnp.zeros(self.field_shape, complex if self.complex_valued else float)

    def init(
        self,
        key: jax.Array,
        *,
        radius: int,
        inputs: int | None = None,
        outputs: int | None = None,
        scale: float = 0.1,
    ) -> CellWeights:
        """Draws weights; with a small ``scale`` U is near the identity.

        Args:
          key: PRNG key.
          radius: the window reaches this far, 2·radius + 1 sites an axis, cropped to
            the lattice.
          inputs: size of the input vectors; None if inputs are fields.
          outputs: size of the output vectors; None for no read-out.
          scale: root mean square of the rotation angles ω (the eigenvalues of Â) in
            radians; 1/√2 of it for real cells.

        Returns:
          `CellWeights`; encoder and decoder are normalised to keep unit variance.
        """
        check_count(self, "radius", radius, 0)
        window = tuple(min(2 * radius + 1, n) for n in self.lattice)
        square = () if self.channels is None else (self.channels,) * 2
        size = math.prod(self.field_shape)
        pair = (2,) if self.complex_valued else ()
        keys = jax.random.split(key, 3)
        draw = lambda k, shape, std: std * jax.random.normal(k, (*shape, *pair))
        fan = math.prod(window) * (self.channels or 1)
        return CellWeights(
            kernel=draw(keys[0], window + square, scale / math.sqrt(fan)),
            encoder=None
            if inputs is None
            else draw(keys[1], (*self.field_shape, inputs), 1 / math.sqrt(size)),
            decoder=None
            if outputs is None
            else draw(keys[2], (outputs, *self.field_shape), 1 / math.sqrt(size)),
            bias=None if outputs is None else jnp.zeros(outputs),
        )

    def prepare(self, weights: CellWeights) -> CellParams:
        """Weights to parameters of the step: the exponential, taken once.

        Differentiable in every AD mode; the gradient reaches the real leaves.
        """
        join = _as_complex if self.complex_valued else lambda w: w
        optional = lambda w: None if w is None else join(w)
        return CellParams(
            kernel=conv_exp(join(weights.kernel), self.lattice),
            encoder=optional(weights.encoder),
            decoder=optional(weights.decoder),
            bias=weights.bias,
        )

    def __call__(
        self, params: CellParams, inputs: jax.Array | None, h: jax.Array
    ) -> jax.Array:
        """The step φ(U ⊗ h + B x); ``inputs`` None means no drive.

        Args:
          params: from `prepare`.
          inputs: [inputs] if there is an encoder, else a field, or None.
          h: the field, [*Λ] or [*Λ, C].
        """
        return self.activation(params.kernel(h) + self._drive(params, inputs))

    def inverse(
        self, params: CellParams, inputs: jax.Array | None, h: jax.Array
    ) -> jax.Array:
        """The state before the step: U† ⊗ (φ⁻¹(h) - B x), as cheap as the step.

        Raises:
          ValueError: if φ has no inverse.
        """
        if self.activation.inverse is None:
            raise ValueError(
                f"{self.activation!r} has no inverse, so the states cannot be "
                "recomputed backwards; use `recomputed_scan` with Replay(slots)."
            )
        before = self.activation.inverse(h) - self._drive(params, inputs)
        return params.kernel.adjoint()(before)

    def readout(self, params: CellParams, h: jax.Array) -> jax.Array:
        """Re(C Z) + bias, a real vector [outputs]."""
        if params.decoder is None or params.bias is None:
            raise ValueError("the cell has no read-out; call init(…, outputs=…).")
        # Re(cz) without the imaginary part of the product.
        dot = lambda c, z: jnp.tensordot(c, z, z.ndim)
        out = dot(params.decoder.real, h.real)
        if self.complex_valued:
            out = out - dot(params.decoder.imag, h.imag)
        return out + params.bias

    def _drive(self, params: CellParams, inputs: jax.Array | None) -> jax.Array:
        dtype = params.kernel.hat.real.dtype
        if inputs is None:
            drive = jnp.zeros((), dtype)
        elif params.encoder is None:
            drive = inputs
        else:
            drive = params.encoder @ inputs.astype(params.encoder.dtype)
        return drive.astype(params.kernel.hat.dtype if self.complex_valued else dtype)


def _as_complex(pair: jax.Array) -> jax.Array:
    return jax.lax.complex(pair[..., 0], pair[..., 1])
