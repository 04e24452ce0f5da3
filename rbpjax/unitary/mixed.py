"""A norm-preserving cell beside units that forget, each at a rate of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbpjax._core.keys import check_key
from rbpjax._core.strategy import REQUIRED, count, function, option, real, strategy
from rbpjax.types import PyTree
from rbpjax.unitary.cell import CellWeights, UnitaryCell
from rbpjax.unitary.dense import DenseCell


class MixedState(NamedTuple):
    """The two parts of the state.

    Attributes:
      kept: the state of the norm-preserving cell.
      fading: m, [fading], real.

    Example:
      >>> from rbpjax.unitary import DenseCell, MixedCell
      >>> MixedCell(cell=DenseCell(size=16), fading=4).start().fading.shape
      (4,)
    """

    kept: jax.Array
    fading: jax.Array


class MixedWeights(NamedTuple):
    """The free parameters: real leaves.

    Attributes:
      cell: those of the norm-preserving cell, whose inputs are the fading units.
      features: W, [fading, inputs].
      bias: c, [fading].
      decay: d before the sigmoid, [fading].

    Example:
      >>> import jax
      >>> from rbpjax.unitary import DenseCell, MixedCell
      >>> cell = MixedCell(cell=DenseCell(size=16), fading=4)
      >>> weights = cell.init(jax.random.key(0), inputs=3)
      >>> weights.features.shape, weights.cell.encoder.shape
      ((4, 3), (16, 4, 2))
    """

    cell: CellWeights
    features: jax.Array
    bias: jax.Array
    decay: jax.Array


class MixedParams(NamedTuple):
    """What the step needs; made by `MixedCell.prepare`.

    Attributes:
      cell: parameters of the norm-preserving cell, `CellParams` or `DenseParams`.
      features: W, [fading, inputs].
      bias: c, [fading].
      decay: d, [fading], in [floor, 1).

    Example:
      >>> import jax
      >>> from rbpjax.unitary import DenseCell, MixedCell
      >>> cell = MixedCell(cell=DenseCell(size=16), fading=4, floor=0.5)
      >>> params = cell.prepare(cell.init(jax.random.key(0), inputs=3))
      >>> bool((params.decay >= 0.5).all() and (params.decay < 1).all())
      True
    """

    cell: PyTree
    features: jax.Array
    bias: jax.Array
    decay: jax.Array


@strategy
class MixedCell:
    """Fading units m ← d ∘ m + ψ(W x + c) that drive a norm-preserving cell.

    The cell's step is h ← φ(U h + B m), with the new m. What happened lately is in m,
    each unit with a decay d of its own that is learnt; what is to be kept is in h.
    Nothing flows back from h to m, so that the decays take no norm from it. With d = 0
    a unit is a nonlinear feature of the input.

    ``inverse`` takes m ← (m - ψ(W x + c))/d, and so multiplies the rounding of m by 1/d
    a step. It needs ``floor`` > 0, and with K steps between the anchors of
    `rbpjax.unitary.history.Inverse` the error of m is about ε floor⁻ᴷ: K = 26 leaves
    1e-8 in float64 at floor = 1/2. With ``floor`` = 0 it raises: use `Replay`, which is
    exact for all decays.

    Cost of a step: the cell's, and one product with W. AD modes: all.

    Attributes:
      cell: a `DenseCell` or a `UnitaryCell`.
      fading: number of fading units.
      floor: least decay, in [0, 1); d = floor + (1 - floor) σ(free weight).
      feature: ψ, of arrays, with or without an inverse.

    Raises:
      ValueError: if a field is not of its kind or range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.unitary import DenseCell, MixedCell, history, recomputed_scan
      >>> cell = MixedCell(cell=DenseCell(size=16), fading=4)
      >>> weights = cell.init(jax.random.key(0), inputs=3, outputs=1)
      >>> def loss(weights):
      ...     params, xs = cell.prepare(weights), jnp.ones((100, 3))
      ...     h, _ = recomputed_scan(
      ...         cell, params, xs, cell.start(), history=history.Replay(slots=8))
      ...     return jnp.sum(cell.readout(params, h) ** 2)
      >>> jax.grad(loss)(weights).decay.shape
      (4,)

    References:
      Jing et al., "Gated Orthogonal Recurrent Units: On Learning to Forget", Neural
      Computation 31, 2019, https://arxiv.org/abs/1706.02761 (forgetting beside an
      orthogonal memory; there by gates); the decays: Mozer, Kazakov and Lindsey,
      https://arxiv.org/abs/1710.04110.
    """

    cell: DenseCell | UnitaryCell = option(
        default=REQUIRED,
        check=lambda value: isinstance(value, DenseCell | UnitaryCell),
        meaning="a DenseCell or a UnitaryCell",
    )
    fading: int = count()
    floor: float = real(default=0.0, below=1.0)
    feature: Callable[[jax.Array], jax.Array] = function(
        default=jax.nn.relu, meaning="a function of an array"
    )

    def start(self) -> MixedState:
        """The state zero, in JAX's default precision."""
        return MixedState(self.cell.start(), jnp.zeros(self.fading))

    def init(
        self,
        key: jax.Array,
        *,
        inputs: int,
        outputs: int | None = None,
        **options: int | float | None,
    ) -> MixedWeights:
        """Draws weights, and decays evenly between ``floor`` and 1.

        Args:
          key: PRNG key.
          inputs: size of the input vectors.
          outputs: size of the output vectors; None for no read-out.
          **options: those of the cell's ``init``, such as ``scale`` and ``radius``.

        Returns:
          `MixedWeights`.

        Raises:
          ValueError: if ``key`` is no PRNG key, ``inputs`` no positive int, or by the
            cell's ``init``.
        """
        check_key(key)
        if isinstance(inputs, bool) or not isinstance(inputs, int) or inputs < 1:
            raise ValueError(
                f"`inputs` must be a Python int of at least 1; got {inputs!r}. Fading "
                "units are features of an input vector."
            )
        keys = jax.random.split(key, 3)
        wide = {"inputs": self.fading, "outputs": outputs, **options}
        d = jax.random.uniform(keys[2], (self.fading,), minval=0.02, maxval=0.98)
        return MixedWeights(
            cell=self.cell.init(keys[0], **wide),  # pyrefly: ignore
            features=jax.random.normal(keys[1], (self.fading, inputs))
            / math.sqrt(inputs),
            bias=jnp.zeros(self.fading),
            decay=jnp.log(d) - jnp.log1p(-d),
        )

    def prepare(self, weights: MixedWeights) -> MixedParams:
        """Weights to parameters of the step: the cell's, and the decays."""
        decay = self.floor + (1 - self.floor) * jax.nn.sigmoid(weights.decay)
        # In floating point the sigmoid reaches one, where nothing would be forgotten.
        decay = jnp.minimum(decay, 1 - jnp.finfo(decay.dtype).eps)
        cell = self.cell.prepare(weights.cell)
        return MixedParams(cell, weights.features, weights.bias, decay)

    def __call__(
        self, params: MixedParams, inputs: PyTree, h: MixedState
    ) -> MixedState:
        """The step; ``inputs`` are a vector [inputs], or None for no drive.

        Raises:
          ValueError: for inputs of another size, and by the cell.
        """
        fading = params.decay * h.fading + self._feature(params, inputs)
        return MixedState(self.cell(params.cell, fading, h.kept), fading)

    def inverse(self, params: MixedParams, inputs: PyTree, h: MixedState) -> MixedState:
        """The state before the step.

        Raises:
          ValueError: if ``floor`` is zero, or φ has no inverse.
        """
        if self.floor == 0:
            raise ValueError(
                "a unit whose decay is 0 forgets its past in one step, and `floor=0.0` "
                "lets decays come to that: the states cannot be recomputed backwards. "
                "Use `recomputed_scan` with Replay(slots=…), or give a `floor` > 0."
            )
        kept = self.cell.inverse(params.cell, h.fading, h.kept)
        fading = (h.fading - self._feature(params, inputs)) / params.decay
        return MixedState(kept, fading)

    def readout(self, params: MixedParams, h: MixedState) -> jax.Array:
        """The cell's read-out of the part that is kept, [outputs]."""
        return self.cell.readout(params.cell, h.kept)

    def _feature(self, params: MixedParams, inputs: PyTree) -> jax.Array:
        if inputs is None:
            return self.feature(params.bias)
        inputs, want = jnp.asarray(inputs), params.features.shape[-1:]
        if inputs.shape != want or jnp.iscomplexobj(inputs):
            raise ValueError(
                f"`inputs` must be a real array of shape {want}; got "
                f"{inputs.dtype}{inputs.shape}. Use jax.vmap for leading batch axes."
            )
        drive = params.features @ inputs.astype(params.features.dtype)
        return self.feature(drive + params.bias)
