"""The unitary cell as a flax nnx module."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from rbpjax.unitary import CellWeights, UnitaryCell, recomputed_scan
from rbpjax.unitary.history import Inverse, Replay


class UnitaryRNN(nnx.Module):
    """Runs a `UnitaryCell` over a sequence: Z ← φ(U ⊗ Z + B x), o = Re(C Z) + bias.

    The exponential of the kernel is taken once a call, not once a step. Parameters are
    real, so that any optax optimizer serves.

    Exact gradients. With ``history`` None the states are stored, as in any RNN; with
    `Inverse` or `Replay` the memory of the gradient does not grow with the sequence.
    Cost of a step: that of `UnitaryCell`. AD modes: reverse; with ``history`` None all.

    Args:
      cell: lattice, channels, dtype and φ.
      radius: reach of the kernel, see `UnitaryCell.init`.
      inputs: size of the input vectors, or None if inputs are fields.
      outputs: size of the output vectors, or None for no read-out.
      scale: root mean square of the initial rotation angles.
      history: how the backward pass gets its states; `None`, or one of
        ``rbpjax.unitary.history``.
      rngs: random streams; ``rngs.params`` is used.

    Raises:
      ValueError: if ``radius`` is no Python int of at least 0; by a call, if inputs and
        cell do not fit each other.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from rbpjax.nn import UnitaryRNN
      >>> from rbpjax.unitary import UnitaryCell, history
      >>> cell = UnitaryCell(lattice=(32,))
      >>> model = UnitaryRNN(cell, radius=2, inputs=3, outputs=1,
      ...                    history=history.Replay(slots=8), rngs=nnx.Rngs(0))
      >>> h, outputs = model(jnp.ones((100, 3)))
      >>> h.shape, outputs.shape
      ((32,), (100, 1))
      >>> grads = nnx.grad(lambda m: m(jnp.ones((100, 3)))[1].sum())(model)
      >>> grads["kernel"].shape  # real and imaginary parts
      (5, 2)

    References:
      Magnasco, "Convolutional unitary or orthogonal recurrent neural networks",
      https://arxiv.org/abs/2302.07396.
    """

    def __init__(
        self,
        cell: UnitaryCell,
        *,
        radius: int,
        inputs: int | None,
        outputs: int | None,
        scale: float = 0.1,
        history: Inverse | Replay | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        weights = cell.init(
            rngs.params(), radius=radius, inputs=inputs, outputs=outputs, scale=scale
        )
        param = lambda w: None if w is None else nnx.Param(w)
        self.cell = cell
        self.history = history
        self.kernel = nnx.Param(weights.kernel)
        self.encoder = nnx.data(param(weights.encoder))
        self.decoder = nnx.data(param(weights.decoder))
        self.bias = nnx.data(param(weights.bias))

    def weights(self) -> CellWeights:
        """The parameters as the functional `UnitaryCell` takes them."""
        value = lambda p: None if p is None else p[...]
        return CellWeights(
            self.kernel[...],
            value(self.encoder),
            value(self.decoder),
            value(self.bias),
        )

    def __call__(
        self, inputs: jax.Array, h0: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Runs over one sequence; use `jax.vmap` or `nnx.vmap` for a batch.

        Args:
          inputs: [T, inputs], or [T, *field] without an encoder.
          h0: first state; zero if None.

        Returns:
          The last state, and the outputs [T, outputs] or None.

        Raises:
          ValueError: if ``inputs`` are no sequence of what the cell takes, or ``h0`` is
            no state of it.
        """
        params = self.cell.prepare(self.weights())
        encoder = params.encoder
        want = self.cell.field_shape if encoder is None else encoder.shape[-1:]
        if jnp.shape(inputs)[1:] != want or jnp.shape(inputs)[:1] in ((), (0,)):
            raise ValueError(
                f"UnitaryRNN: `inputs` must be one sequence, [T, {str(want)[1:-1]}] "
                f"with at least one step; got shape {jnp.shape(inputs)}. Use jax.vmap "
                "or nnx.vmap for a batch."
            )
        start = self.cell.start()
        h0 = start if h0 is None else h0
        kinds = [(jnp.shape(h), jnp.iscomplexobj(h)) for h in (h0, start)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"UnitaryRNN: `h0` must be a {start.dtype} field {start.shape}; got "
                f"{jnp.result_type(h0)}{list(jnp.shape(h0))}."
            )
        emit = None
        if self.decoder is not None:
            emit = lambda params, _, h: self.cell.readout(params, h)
        if self.history is not None:
            return recomputed_scan(
                self.cell, params, inputs, h0, history=self.history, emit=emit
            )

        def body(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
            h = self.cell(params, x, h)
            return h, None if emit is None else emit(params, x, h)

        return jax.lax.scan(body, h0, inputs)
