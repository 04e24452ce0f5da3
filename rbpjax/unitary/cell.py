"""Recurrent cells Z ← φ(U ⊗ Z + B x) with a unitary convolution U."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbpjax._core.keys import check_key
from rbpjax._core.strategy import REQUIRED, count, option, strategy, switch
from rbpjax.unitary.activation import Activation, saturate
from rbpjax.unitary.kernel import BOUNDARIES, MAPS, FourierKernel, conv_exp


def _is_lattice(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and 1 <= len(value) <= 3
        and all(_is_size(size) for size in value)
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class CellWeights(NamedTuple):
    """The free parameters of a cell: real leaves, whatever the field.

    Those of a complex cell have a last axis (real part, imaginary part).

    Attributes:
      kernel: free weights of the kernel, see `conv_exp`.
      encoder: B, [*Λ(, C), inputs], or None: then inputs are fields.
      decoder: read-out, [outputs, *Λ(, C)], or None.
      bias: [outputs], or None.

    Example:
      >>> import jax
      >>> from rbpjax.unitary import UnitaryCell
      >>> cell = UnitaryCell(lattice=(32,), channels=2)
      >>> weights = cell.init(jax.random.key(0), radius=1, inputs=3, outputs=4)
      >>> weights.kernel.shape, weights.encoder.shape, weights.decoder.shape
      ((3, 2, 2, 2), (32, 2, 3, 2), (4, 32, 2, 2))
    """

    kernel: jax.Array
    encoder: jax.Array | None
    decoder: jax.Array | None
    bias: jax.Array | None


class CellParams(NamedTuple):
    """What the step function needs: `CellWeights` with the kernel in Fourier form.

    Made by `UnitaryCell.prepare`. A pytree, so that a scan can be closed over it.

    Attributes:
      kernel: U = e^A, see `conv_exp`.
      encoder: B, [*Λ(, C), inputs], complex in a complex cell, or None.
      decoder: read-out, [outputs, *Λ(, C)], or None.
      bias: [outputs], or None.

    Example:
      >>> import jax
      >>> from rbpjax.unitary import UnitaryCell
      >>> cell = UnitaryCell(lattice=(32,))
      >>> params = cell.prepare(cell.init(jax.random.key(0), radius=1, inputs=3))
      >>> params.kernel.hat.shape, params.encoder.shape, params.decoder
      ((32,), (32, 3), None)
    """

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

    Cost of a step: two FFTs of the field, a product [C, C] a frequency for C channels,
    one product with the encoder. AD modes: all.

    Attributes:
      lattice: sizes of the lattice, one to three of them.
      channels: number of channels, or None for fields without a channel axis.
      complex_valued: whether the fields and the kernel are complex.
      activation: φ, one of ``rbpjax.unitary.activation``, or an `Activation`.
      boundary: "periodic", or "even" or "odd" for a lattice that reflects at its edges,
        see `conv_exp`.
      method: how U is made of the weights, see `conv_exp`: "taylor", "pade" and "eigh"
        are the exponential, "cayley" is another map.

    Raises:
      ValueError: when made with a lattice, a channel number, a boundary or a method
        that is none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.unitary import UnitaryCell, activation
      >>> cell = UnitaryCell(lattice=(32,), activation=activation.identity)
      >>> weights = cell.init(jax.random.key(0), radius=2, inputs=3, outputs=1)
      >>> params, h = cell.prepare(weights), cell.start()
      >>> h = cell(params, jnp.array([1.0, 0.0, 2.0]), h)  # a kick, then 1,000 steps
      >>> later = jax.lax.fori_loop(0, 1000, lambda _, h: cell(params, None, h), h)
      >>> bool(abs(jnp.linalg.norm(later) / jnp.linalg.norm(h) - 1) < 1e-4)
      True

    References:
      Magnasco, https://arxiv.org/abs/2302.07396; φ and its dynamics: Chandra and
      Magnasco, https://arxiv.org/abs/2405.13854.
    """

    lattice: tuple[int, ...] = option(
        default=REQUIRED,
        check=_is_lattice,
        meaning="a tuple of one to three Python ints of at least 1",
    )
    channels: int | None = count(default=None)
    complex_valued: bool = switch(default=True)
    activation: Activation = option(
        default=saturate,
        check=lambda value: isinstance(value, Activation),
        meaning="an Activation, such as activation.saturate",
    )
    boundary: str = option(
        default="periodic",
        check=lambda value: value in BOUNDARIES,
        meaning=f"one of {', '.join(map(repr, BOUNDARIES))}",
    )
    method: str = option(
        default="taylor",
        check=lambda value: value in MAPS,
        meaning=f"one of {', '.join(map(repr, MAPS))}",
    )

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
            radians; 1/√2 of it for real cells, and about 1/√2 an axis where the
            boundary reflects.

        Returns:
          `CellWeights`; encoder and decoder are normalised to keep unit variance.

        Raises:
          ValueError: if ``radius`` is no Python int of at least 0, or ``key`` no PRNG
            key.
        """
        if isinstance(radius, bool) or not isinstance(radius, int) or radius < 0:
            raise ValueError(
                f"`radius` must be a Python int of at least 0; got {radius!r}."
            )
        window = tuple(min(2 * radius + 1, n) for n in self.lattice)
        square = () if self.channels is None else (self.channels,) * 2
        fan = math.prod(window) * (self.channels or 1)
        kernel = window + square, scale / math.sqrt(fan)
        return draw_weights(
            key, kernel, self.field_shape, inputs, outputs, self.complex_valued
        )

    def prepare(self, weights: CellWeights) -> CellParams:
        """Weights to parameters of the step: the exponential, taken once.

        Differentiable in every AD mode; the gradient reaches the real leaves.
        """
        joined = join_weights(weights, self.complex_valued)
        kernel = conv_exp(
            joined.kernel, self.lattice, method=self.method, boundary=self.boundary
        )
        return CellParams(kernel, joined.encoder, joined.decoder, joined.bias)

    def __call__(
        self, params: CellParams, inputs: jax.Array | None, h: jax.Array
    ) -> jax.Array:
        """The step φ(U ⊗ h + B x); ``inputs`` None means no drive.

        Args:
          params: from `prepare`.
          inputs: [inputs] if there is an encoder, else a field, or None.
          h: the field, [*Λ] or [*Λ, C].

        Returns:
          The next field, like ``h``.

        Raises:
          ValueError: if ``params`` is not what `prepare` returns, the shape or the
            precision of ``h`` is not the kernel's, ``inputs`` are neither of the
            encoder's size nor a field (of the cell's own shape), or complex for a real
            cell.
        """
        self._check(params, h)
        return self.activation(params.kernel(h) + self._drive(params, inputs))

    def inverse(
        self, params: CellParams, inputs: jax.Array | None, h: jax.Array
    ) -> jax.Array:
        """The state before the step: U† ⊗ (φ⁻¹(h) - B x), as cheap as the step.

        Raises:
          ValueError: if φ has no inverse.
        """
        self._check(params, h)
        before = self.activation.undo(h) - self._drive(params, inputs)
        return params.kernel.adjoint()(before)

    def readout(self, params: CellParams, h: jax.Array) -> jax.Array:
        """Re(C Z) + bias, a real vector [outputs].

        Raises:
          ValueError: if the cell was initialized without ``outputs``.
        """
        return read_out(params, h)

    def _drive(self, params: CellParams, inputs: jax.Array | None) -> jax.Array:
        dtype = params.kernel.hat.dtype
        dtype = dtype if self.complex_valued else params.kernel.hat.real.dtype
        return drive(params.encoder, inputs, self.field_shape, dtype)

    def _check(self, params: CellParams, h: jax.Array) -> None:
        """Raises ValueError for parameters or a state of another kind of cell."""
        kernel = getattr(params, "kernel", None)
        if not isinstance(kernel, FourierKernel):
            raise ValueError(
                "`params` must be what `prepare(weights)` returns; got "
                f"{type(params).__name__}. Call it once per update of the weights."
            )
        if kernel.real == self.complex_valued:
            word = "complex" if self.complex_valued else "real"
            raise ValueError(
                f"`params` must be of a {word} cell, as this one is; got those of "
                "another. Prepare the weights with this cell."
            )
        if kernel.boundary != self.boundary:
            raise ValueError(
                f"`params` must be of a cell whose boundary is {self.boundary!r}; got "
                f"{kernel.boundary!r}. Prepare the weights with this cell."
            )
        if not self.complex_valued:
            check_real(h, "h")


def draw_weights(
    key: jax.Array,
    kernel: tuple[tuple[int, ...], float],
    field: tuple[int, ...],
    inputs: int | None,
    outputs: int | None,
    complex_valued: bool,
) -> CellWeights:
    """Free weights; ``kernel`` is the shape of its part and its standard deviation."""
    check_key(key)
    pair = (2,) if complex_valued else ()
    keys = jax.random.split(key, 3)
    draw = lambda k, shape, std: std * jax.random.normal(k, (*shape, *pair))
    unit = 1 / math.sqrt(math.prod(field))
    return CellWeights(
        kernel=draw(keys[0], *kernel),
        encoder=None if inputs is None else draw(keys[1], (*field, inputs), unit),
        decoder=None if outputs is None else draw(keys[2], (outputs, *field), unit),
        bias=None if outputs is None else jnp.zeros(outputs),
    )


def join_weights(weights: CellWeights, complex_valued: bool) -> CellWeights:
    """Weights with the pairs of real numbers of a complex cell joined."""
    join = _as_complex if complex_valued else lambda w: w
    optional = lambda w: None if w is None else join(w)
    return CellWeights(
        join(weights.kernel),
        optional(weights.encoder),
        optional(weights.decoder),
        weights.bias,
    )


def drive(
    encoder: jax.Array | None,
    inputs: jax.Array | None,
    field: tuple[int, ...],
    dtype: jnp.dtype,
) -> jax.Array:
    """B x, or x itself if there is no encoder, or zero if there are no inputs."""
    if inputs is None:
        return jnp.zeros((), dtype)
    inputs = jnp.asarray(inputs)
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        check_real(inputs, "inputs")
    want, kind = field, "a field"
    if encoder is not None:
        want, kind = encoder.shape[-1:], "what the encoder takes"
    if inputs.shape != want:
        raise ValueError(
            f"`inputs` must have shape {want}, {kind}; got {inputs.shape}. Use "
            "jax.vmap for leading batch axes."
        )
    driven = inputs if encoder is None else encoder @ inputs.astype(encoder.dtype)
    return driven.astype(dtype)


def read_out(params: NamedTuple, h: jax.Array) -> jax.Array:
    """Re(C Z) + bias, without the imaginary part of the product."""
    decoder, bias = getattr(params, "decoder", None), getattr(params, "bias", None)
    if decoder is None or bias is None:
        raise ValueError("the cell has no read-out; call init(…, outputs=…).")
    dot = lambda c, z: jnp.tensordot(c, z, z.ndim)
    out = dot(decoder.real, h.real)
    if jnp.iscomplexobj(h):
        out = out - dot(decoder.imag, h.imag)
    return out + bias


def check_real(x: jax.Array, name: str) -> None:
    """Raises ValueError for a complex array."""
    if jnp.iscomplexobj(x):
        raise ValueError(
            f"`{name}` must be real in a cell that is not complex_valued; got "
            f"{x.dtype}. Take its real part, or make a complex cell."
        )


def _as_complex(pair: jax.Array) -> jax.Array:
    return jax.lax.complex(pair[..., 0], pair[..., 1])
