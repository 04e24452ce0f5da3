"""Recurrent cells h ← φ(U h + B x) with a dense orthogonal or unitary matrix U."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbpjax._core.strategy import count, function, option, strategy, switch
from rbpjax.unitary.activation import Activation, identity
from rbpjax.unitary.cell import (
    CellWeights,
    check_real,
    draw_weights,
    drive,
    join_weights,
    read_out,
)
from rbpjax.unitary.orthogonal import orthogonal_exp


class DenseParams(NamedTuple):
    """What the step needs: `CellWeights` with their matrix in place of the kernel.

    Made by `DenseCell.prepare`. A pytree, so that a scan can be closed over it.

    Attributes:
      matrix: U, [N, N], orthogonal or unitary.
      encoder: B, [N, inputs], or None: then inputs are states.
      decoder: read-out, [outputs, N], or None.
      bias: [outputs], or None.

    Example:
      >>> import jax
      >>> from rbpjax.unitary import DenseCell
      >>> cell = DenseCell(size=16)
      >>> cell.prepare(cell.init(jax.random.key(0), inputs=3)).matrix.shape
      (16, 16)
    """

    matrix: jax.Array
    encoder: jax.Array | None
    decoder: jax.Array | None
    bias: jax.Array | None


@strategy
class DenseCell:
    """The cell h ← φ(U h + B x) as a step function ``cell(params, inputs, h)``.

    The dense counterpart of `UnitaryCell`: a vector of N units instead of a field.
    `prepare` makes U of the free weights once per update, outside the scan over time.
    With the identity norms of state and gradient are kept exactly, for as many steps as
    one likes.

    Cost of a step: one product with U and one with B. Memory: N². AD modes: all.

    Attributes:
      size: N.
      matrix: ``matrix(weights)``, free weights to U: `orthogonal_exp`,
        `orthogonal_cayley`, `orthogonal_householder`, or one of your own.
      complex_valued: whether state and matrix are complex.
      activation: φ, one of ``rbpjax.unitary.activation``, or an `Activation`.

    Raises:
      ValueError: if a field is not of its kind or range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.unitary import (
      ...     DenseCell, history, orthogonal_cayley, recomputed_scan)
      >>> cell = DenseCell(size=16, matrix=orthogonal_cayley, complex_valued=False)
      >>> weights = cell.init(jax.random.key(0), inputs=3, outputs=2)
      >>> back = history.Inverse(inverse=cell.inverse)
      >>> def loss(weights):
      ...     params, xs = cell.prepare(weights), jnp.ones((500, 3))
      ...     h, _ = recomputed_scan(cell, params, xs, cell.start(), history=back)
      ...     return jnp.sum(cell.readout(params, h) ** 2)
      >>> jax.grad(loss)(weights).kernel.shape
      (16, 16)

    References:
      Arjovsky, Shah and Bengio, "Unitary Evolution Recurrent Neural Networks", ICML
      2016, https://arxiv.org/abs/1511.06464; Lezcano-Casado and Martínez-Rubio, ICML
      2019, https://arxiv.org/abs/1901.08428.
    """

    size: int = count()
    matrix: Callable[[jax.Array], jax.Array] = function(
        default=orthogonal_exp, meaning="a function of free weights that returns U"
    )
    complex_valued: bool = switch(default=True)
    activation: Activation = option(
        default=identity,
        check=lambda value: isinstance(value, Activation),
        meaning="an Activation, such as activation.saturate",
    )

    def start(self) -> jax.Array:
        """The state zero, in JAX's default precision."""
        return jnp.zeros(self.size, complex if self.complex_valued else float)

    def init(
        self,
        key: jax.Array,
        *,
        inputs: int | None = None,
        outputs: int | None = None,
        scale: float = 0.1,
        reflections: int | None = None,
    ) -> CellWeights:
        """Draws weights; with a small ``scale`` U is near the identity.

        Args:
          key: PRNG key.
          inputs: size of the input vectors; None if inputs are states.
          outputs: size of the output vectors; None for no read-out.
          scale: root mean square of the rotation angles in radians; 1/√2 of it for real
            cells. Without effect on `orthogonal_householder`.
          reflections: number of rows of the kernel, for `orthogonal_householder`; None
            for a square one.

        Returns:
          `CellWeights`; encoder and decoder are normalised to keep unit variance.

        Raises:
          ValueError: if ``key`` is no PRNG key.
        """
        kernel = (reflections or self.size, self.size), scale / math.sqrt(self.size)
        return draw_weights(
            key, kernel, (self.size,), inputs, outputs, self.complex_valued
        )

    def prepare(self, weights: CellWeights) -> DenseParams:
        """Weights to parameters of the step: U, made once."""
        joined = join_weights(weights, self.complex_valued)
        matrix = self.matrix(joined.kernel)
        return DenseParams(matrix, joined.encoder, joined.decoder, joined.bias)

    def __call__(
        self, params: DenseParams, inputs: jax.Array | None, h: jax.Array
    ) -> jax.Array:
        """The step φ(U h + B x); ``inputs`` None means no drive.

        Args:
          params: from `prepare`.
          inputs: [inputs] if there is an encoder, else [N], or None.
          h: [N].

        Returns:
          The next state, like ``h``.

        Raises:
          ValueError: if ``params`` is not what `prepare` returns, ``h`` is not of shape
            [N], or ``inputs`` are of another size, or complex for a real cell.
        """
        self._check(params, h)
        return self.activation(params.matrix @ h + self._drive(params, inputs))

    def inverse(
        self, params: DenseParams, inputs: jax.Array | None, h: jax.Array
    ) -> jax.Array:
        """The state before the step: Uᴴ (φ⁻¹(h) - B x), as cheap as the step.

        Raises:
          ValueError: if φ has no inverse.
        """
        self._check(params, h)
        before = self.activation.undo(h) - self._drive(params, inputs)
        return jnp.conj(jnp.conj(before) @ params.matrix)

    def readout(self, params: DenseParams, h: jax.Array) -> jax.Array:
        """Re(C h) + bias, a real vector [outputs].

        Raises:
          ValueError: if the cell was initialized without ``outputs``.
        """
        return read_out(params, h)

    def _drive(self, params: DenseParams, inputs: jax.Array | None) -> jax.Array:
        return drive(params.encoder, inputs, (self.size,), params.matrix.dtype)

    def _check(self, params: DenseParams, h: jax.Array) -> None:
        matrix = params.matrix if isinstance(params, DenseParams) else None
        if matrix is None or matrix.shape != (self.size,) * 2:
            raise ValueError(
                "`params` must be what `prepare(weights)` of this cell returns, with a "
                f"matrix of shape {(self.size,) * 2}; got {type(params).__name__}. "
                "Call it once per update of the weights."
            )
        if not self.complex_valued:
            check_real(h, "h")
        if h.shape != (self.size,) or h.dtype != matrix.dtype:
            raise ValueError(
                f"`h` must have the shape {(self.size,)} and dtype {matrix.dtype} of "
                f"the matrix; got {h.shape} and {h.dtype}. Use jax.vmap for batches."
            )
