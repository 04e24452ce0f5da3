"""A convolutional cell whose kernel is bounded: the first choice on grids."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from rbpjax.regularizers import spectral_normalize


class ConvCell(nnx.Module):
    """h ← φ(K ∗ h + drive) with σ(K) ≤ bound: a convolution that stays near settling.

    K is a kernel with as many taps as ``window`` has, and zero padding; σ is that of
    its matrix [taps · units, units], brought below the bound by
    `rbpjax.regularizers.spectral_normalize`, once a solve. The drive enters in every
    step: make it from the inputs, with its bias, outside of the solve.

    Contraction: as an operator K has a norm of at most √taps · σ (``norm_bound``), and
    |φ′| ≤ 1, so that with a bound below 1/√taps the cell is a contraction whatever
    training does to K, with one fixed point. Such a cell forgets within a few
    positions, which is enough for images, and not for long strings. Above it nothing is
    guaranteed, and watching the residuals and ρ(J) is yours. In the examples 1.4 for 3
    taps settled with every seed, and 0.9 for 3 × 3 taps nearly always
    (docs/results/models.md); 0.33 for 3 × 3 taps is a contraction.

    Cost of a step: one convolution. AD modes: all.

    Args:
      units: channels of the state.
      window: taps along each axis of the grid, such as ``(3,)`` or ``(3, 3)``.
      bound: on σ, positive.
      activation: φ, with a slope of at most 1 in magnitude.
      kernel_init: initializer of K.
      rngs: random streams; ``rngs.params`` is used.

    Raises:
      ValueError: if ``bound`` is not positive or ``window`` is empty; by a call, if the
        state's shape does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from rbpjax.nn import ConvCell, FixedPoint
      >>> cell = ConvCell(8, (3, 3), bound=0.3, rngs=nnx.Rngs(0))
      >>> round(cell.norm_bound, 2)  # a contraction
      0.9
      >>> drive = jnp.ones((2, 7, 7, 8), jnp.float32)
      >>> bool(FixedPoint(cell)(drive, jnp.zeros_like(drive)).converged)
      True

    References:
      Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR
      2018, https://arxiv.org/abs/1802.05957. √taps: Sedghi, Gupta, Long, ICLR 2019,
      https://arxiv.org/abs/1805.10408.
    """

    def __init__(
        self,
        units: int,
        window: tuple[int, ...],
        *,
        bound: float,
        activation: Callable[[jax.Array], jax.Array] = jnp.tanh,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),
        rngs: nnx.Rngs,
    ) -> None:
        if not bound > 0:
            raise ValueError(f"ConvCell: `bound` must be positive; got {bound}.")
        if not window or min(window) < 1:
            raise ValueError(
                "ConvCell: `window` must have at least one tap along each axis, such "
                f"as (3,) or (3, 3); got {window}."
            )
        self.bound = bound
        self.activation = activation
        shape = (*window, units, units)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32))

    @property
    def norm_bound(self) -> float:
        """What ‖J‖₂ cannot exceed: below 1 the cell is a contraction."""
        return self.bound * math.prod(self.kernel.shape[:-2]) ** 0.5

    def __call__(self, drive: jax.Array, h: jax.Array) -> jax.Array:
        """One step: the next state.

        Args:
          drive: like the state.
          h: the state, ``[batch, *grid, unit]``.
        """
        axes = self.kernel.ndim - 2
        if jnp.ndim(h) != axes + 2 or jnp.shape(h)[-1] != self.kernel.shape[-1]:
            raise ValueError(
                f"ConvCell: `h` must be [batch, *grid, {self.kernel.shape[-1]}] with a "
                f"grid of {axes} axes; got shape {jnp.shape(h)}."
            )
        kernel = spectral_normalize(self.kernel[...], self.bound)
        # Channels last, as flax has them: [batch, *grid, unit], [*window, in, out].
        last = (0, axes + 1, *range(1, axes + 1))
        layout = lax.ConvDimensionNumbers(last, (axes + 1, axes, *range(axes)), last)
        image = lax.conv_general_dilated(
            h, kernel, (1,) * axes, "SAME", dimension_numbers=layout
        )
        return self.activation(image + drive)
