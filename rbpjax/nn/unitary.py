"""The norm-preserving cells as one flax nnx module."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from rbpjax.types import PyTree
from rbpjax.unitary import (
    CellWeights,
    DenseCell,
    MixedCell,
    MixedWeights,
    UnitaryCell,
    recomputed_scan,
)
from rbpjax.unitary.history import Inverse, Replay


class UnitaryRNN(nnx.Module):
    """Runs a norm-preserving cell over a sequence, with its encoder and read-out.

    The cell says everything else: a `UnitaryCell` its lattice, boundary and method, a
    `DenseCell` its parametrisation, a `MixedCell` its fading units; all of them φ.
    Kernel or matrix U are made once a call, not once a step. Parameters are real, so
    that any optax optimizer serves: ``kernel``, ``encoder``, ``decoder`` and ``bias``,
    and of a `MixedCell` also ``features``, ``fading_bias`` and ``decay``.

    Exact gradients. With ``history`` None the states are stored, as in any RNN; with
    `Inverse` or `Replay` the memory of the gradient does not grow with the sequence.
    Cost of a step: that of the cell. AD modes: reverse; with ``history`` None all.

    Args:
      cell: a `UnitaryCell`, a `DenseCell` or a `MixedCell`.
      inputs: size of the input vectors, or None if inputs are states.
      outputs: size of the output vectors, or None for no read-out.
      history: how the backward pass gets its states; `None`, or one of
        ``rbpjax.unitary.history``.
      rngs: random streams; ``rngs.params`` is used.
      **options: those of the cell's ``init``: ``scale``, the root mean square of the
        initial rotation angles; ``radius``, the reach of a convolution's kernel, which
        has to be given; ``reflections``, of `orthogonal_householder`.

    Raises:
      ValueError: if ``cell`` is none of those, or by its ``init``; by a call, if inputs
        and cell do not fit each other.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from rbpjax.nn import UnitaryRNN
      >>> from rbpjax.unitary import DenseCell, UnitaryCell, history, orthogonal_cayley
      >>> cell = UnitaryCell(lattice=(32,))
      >>> model = UnitaryRNN(cell, radius=2, inputs=3, outputs=1,
      ...                    history=history.Replay(slots=8), rngs=nnx.Rngs(0))
      >>> h, outputs = model(jnp.ones((100, 3)))
      >>> h.shape, outputs.shape
      ((32,), (100, 1))
      >>> grads = nnx.grad(lambda m: m(jnp.ones((100, 3)))[1].sum())(model)
      >>> grads["kernel"].shape  # real and imaginary parts
      (5, 2)
      >>> cell = DenseCell(size=32, matrix=orthogonal_cayley, complex_valued=False)
      >>> model = UnitaryRNN(cell, inputs=3, outputs=1, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((100, 3)))[1].shape
      (100, 1)

    References:
      Magnasco, "Convolutional unitary or orthogonal recurrent neural networks",
      https://arxiv.org/abs/2302.07396; of the other cells: see there.
    """

    def __init__(
        self,
        cell: UnitaryCell | DenseCell | MixedCell,
        *,
        inputs: int | None,
        outputs: int | None,
        history: Inverse | Replay | None = None,
        rngs: nnx.Rngs,
        **options: int | float | None,
    ) -> None:
        if not isinstance(cell, UnitaryCell | DenseCell | MixedCell):
            raise ValueError(
                "UnitaryRNN: `cell` must be a UnitaryCell, a DenseCell or a MixedCell; "
                f"got {cell!r}."
            )
        sizes = {"inputs": inputs, "outputs": outputs}
        weights = cell.init(rngs.params(), **sizes, **options)  # pyrefly: ignore
        named = weights._asdict()
        if isinstance(weights, MixedWeights):
            named |= {"fading_bias": named["bias"]} | named.pop("cell")._asdict()
        self.cell = cell
        self.inputs = inputs
        self.outputs = outputs
        self.history = history
        for name, w in named.items():
            setattr(self, name, nnx.data(None if w is None else nnx.Param(w)))

    def weights(self) -> CellWeights | MixedWeights:
        """The parameters as the functional cell takes them."""

        def value(name: str) -> jax.Array | None:
            param = getattr(self, name)
            return None if param is None else param[...]

        weights = CellWeights(*map(value, CellWeights._fields))  # pyrefly: ignore
        if not isinstance(self.cell, MixedCell):
            return weights
        fading = map(value, ("features", "fading_bias", "decay"))
        return MixedWeights(weights, *fading)  # pyrefly: ignore

    def __call__(
        self, inputs: jax.Array, h0: PyTree = None
    ) -> tuple[PyTree, jax.Array | None]:
        """Runs over one sequence; use `jax.vmap` or `nnx.vmap` for a batch.

        Args:
          inputs: [T, inputs], or [T, *state] without an encoder.
          h0: first state; zero if None.

        Returns:
          The last state, and the outputs [T, outputs] or None.

        Raises:
          ValueError: if ``inputs`` are no sequence of what the cell takes, or ``h0`` is
            no state of it.
        """
        # One of three cells, each with parameters and states of its own.
        cell: Callable[..., PyTree] = self.cell
        params: PyTree = self.cell.prepare(self.weights())  # pyrefly: ignore
        start: PyTree = self.cell.start()
        want = jnp.shape(start) if self.inputs is None else (self.inputs,)
        if jnp.shape(inputs)[1:] != want or jnp.shape(inputs)[:1] in ((), (0,)):
            raise ValueError(
                f"UnitaryRNN: `inputs` must be one sequence, [T, {str(want)[1:-1]}] "
                f"with at least one step; got shape {jnp.shape(inputs)}. Use jax.vmap "
                "or nnx.vmap for a batch."
            )
        h0 = start if h0 is None else h0
        kind = lambda h: jax.tree.map(lambda x: (jnp.shape(x), jnp.iscomplexobj(x)), h)
        if kind(h0) != kind(start):
            shown = lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}"
            raise ValueError(
                "UnitaryRNN: `h0` must be like `cell.start()`, "
                f"{jax.tree.map(shown, start)}; got {jax.tree.map(shown, h0)}."
            )
        emit = None
        if self.outputs is not None:
            emit = lambda params, _, h: self.cell.readout(params, h)
        if self.history is not None:
            return recomputed_scan(
                cell, params, inputs, h0, history=self.history, emit=emit
            )

        def body(h: PyTree, x: jax.Array) -> tuple[PyTree, jax.Array | None]:
            h = cell(params, x, h)
            return h, None if emit is None else emit(params, x, h)

        return jax.lax.scan(body, h0, inputs)
