"""Associative memories as cells: the continuous network, and the softmax form."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from rbpjax.regularizers import spectral_normalize


class HopfieldCell(nnx.Module):
    """h ← φ(h) W + bias at free units, and the given values at clamped ones.

    W is symmetric without self-loops, and brought to ‖W‖₂ ≤ ``gain`` if there is one.

    Contraction: with |φ′| ≤ 1 and ``gain`` below 1 the cell contracts by ``gain``, so
    that there is one fixed point for each set of clamped values, whatever training does
    to W. Such a memory answers with what the clamped units call for. With ``gain=None``
    there may be many fixed points, and the one that is found depends on the start. For
    an increasing φ the eigenvalues of J are real, as W is symmetric.

    Cost of a step: one product with W; its singular values once a solve. AD modes: all.

    Args:
      units: visible, hidden and output units together.
      gain: bound on ‖W‖₂, positive, or None for none.
      activation: φ, with a slope of 0 to 1.
      rngs: random streams; ``rngs.params`` is used.

    Raises:
      ValueError: if ``gain`` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from rbpjax.nn import FixedPoint, HopfieldCell
      >>> layer = FixedPoint(HopfieldCell(8, gain=0.9, rngs=nnx.Rngs(0)))
      >>> values = jnp.ones((2, 8), jnp.float32)
      >>> free = jnp.arange(8) >= 4  # the first four are clamped
      >>> h = layer((values, free), jnp.zeros_like(values)).value
      >>> h[0, :4].tolist()
      [1.0, 1.0, 1.0, 1.0]

    References:
      Hopfield, "Neurons with graded response have collective computational properties
      like those of two-state neurons", PNAS 1984; clamping and training at the fixed
      point: Liao et al. 2018, section 5.1.
    """

    def __init__(
        self,
        units: int,
        *,
        gain: float | None = 0.9,
        activation: Callable[[jax.Array], jax.Array] = jnp.tanh,
        rngs: nnx.Rngs,
    ) -> None:
        if gain is not None and not gain > 0:
            raise ValueError(
                f"HopfieldCell: `gain` must be positive, or None for no bound; got "
                f"{gain}."
            )
        self.gain = gain
        self.activation = activation
        init = nnx.initializers.normal(0.5 / units**0.5)
        self.kernel = nnx.Param(init(rngs.params(), (units, units), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(units, jnp.float32))

    def weight(self) -> jax.Array:
        """W, ``[unit, unit]``: the kernel's symmetric part, without its diagonal."""
        kernel = self.kernel[...]
        both = (kernel + kernel.T) / 2
        both = both - jnp.diag(jnp.diag(both))
        return both if self.gain is None else spectral_normalize(both, self.gain)

    def __call__(self, inputs: tuple[jax.Array, jax.Array], h: jax.Array) -> jax.Array:
        """One step: the next state.

        Args:
          inputs: ``(values, free)``: like the state, and a mask that broadcasts to it,
            true where a unit is free.
          h: the state, ``[..., unit]``.
        """
        values, free = inputs
        image = self.activation(h) @ self.weight()
        bias = jnp.broadcast_to(self.bias[...], image.shape)
        return jnp.where(free, image + bias, values)


class SoftmaxHopfieldCell(nnx.Module):
    """h ← softmax(β h Mᵀ) M + drive: the modern Hopfield network, a step of attention.

    M are patterns, one a row, that are learnt. Without a drive the fixed points are
    memories, and the start decides which is found: give the query as h0, and note that
    no gradient goes through h0. With a drive the answer is a function of it.

    Contraction: J = β Mᵀ (diag p - p pᵀ) M, and the rows of the matrix in the middle
    sum to 2 pᵢ (1 - pᵢ) ≤ 1/2 in magnitude, so that ‖J‖₂ ≤ β σ(M)² / 2. With ``gain``
    below 1, σ(M) is kept at √(2 gain / β) or less: one fixed point for each drive,
    whatever training does to M. With ``gain=None`` there are many.

    Cost of a step: two products with M. AD modes: all.

    Args:
      patterns: how many are stored.
      units: size of a pattern, and of the state.
      beta: β, positive: the larger, the nearer to the nearest pattern.
      gain: bound on ‖J‖₂, positive, or None for none.
      rngs: random streams; ``rngs.params`` is used.

    Raises:
      ValueError: if ``beta`` or ``gain`` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from rbpjax.nn import FixedPoint, SoftmaxHopfieldCell
      >>> cell = SoftmaxHopfieldCell(2, 4, beta=4.0, gain=None, rngs=nnx.Rngs(0))
      >>> cell.memory = nnx.Param(2.0 * jnp.eye(2, 4, dtype=jnp.float32))
      >>> query = jnp.array([0.5, 1.5, 0.3, -0.4], jnp.float32)
      >>> FixedPoint(cell)(jnp.zeros_like(query), query).value.round(3).tolist()
      [0.0, 2.0, 0.0, 0.0]

    References:
      Ramsauer et al., "Hopfield Networks is All You Need", ICLR 2021, equation 3,
      https://arxiv.org/abs/2008.02217.
    """

    def __init__(
        self,
        patterns: int,
        units: int,
        *,
        beta: float,
        gain: float | None = 0.9,
        rngs: nnx.Rngs,
    ) -> None:
        for name, value in (("beta", beta), ("gain", gain)):
            if value is not None and not value > 0:
                raise ValueError(
                    f"SoftmaxHopfieldCell: `{name}` must be positive; got {value}."
                )
        self.beta, self.gain = beta, gain
        init = nnx.initializers.normal(1.0)
        self.memory = nnx.Param(init(rngs.params(), (patterns, units), jnp.float32))

    def __call__(self, drive: jax.Array, h: jax.Array) -> jax.Array:
        """One step: the next state.

        Args:
          drive: like the state; zeros for a memory alone.
          h: the state, ``[..., unit]``.
        """
        memory = self.memory[...]
        if self.gain is not None:
            memory = spectral_normalize(memory, (2 * self.gain / self.beta) ** 0.5)
        beta = jnp.asarray(self.beta, memory.dtype)
        return jax.nn.softmax(beta * (h @ memory.T)) @ memory + drive
