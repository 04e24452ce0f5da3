"""Cells whose units do not see each other, and stacks of them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rbpjax._core.strategy import function, option, strategy
from rbpjax.types import PyTree


@strategy
class ElementwiseCell:
    """A recurrent cell whose units go their own ways: h'ᵢ = activate(ownᵢ, zᵢ, hᵢ).

    With a gates and z = W φ, φ = features(x), unit i sees its own numbers
    (such as a decay), its own pre-activations zᵢ and its own state, and no other
    unit's. Linear recurrent units, minGRU and QRNN have this form. The instance *is*
    the step function: it can be called, and given to any estimator but those that ask
    for a ``PreactivationCell``; ``diagonal_rtrl`` is exact for it at O(P).

    Cost and memory of a call are those of its functions and one product of W and φ.
    All AD modes.

    Attributes:
      kernel: ``kernel(params)``: W, ``[a, n, k]``; any differentiable function of the
        parameters, so that the readout or separate matrices may live in ``params``.
      own: ``own(params)``: what belongs to the units, a pytree with a leading axis of
        n in every leaf, such as decays ``[n]``; ``()`` for nothing.
      features: ``features(x)``: φ, ``[k]``, such as x and a 1 for the bias. They do
        not see the state.
      activate: ``activate(own, z, h)`` for **one** unit: own without its leading axis,
        z is ``[a]``, h the state's pytree with scalars for leaves; returns the new
        state of the unit.

    States are pytrees of vectors of length n, real or complex. W, ``own`` and φ are
    real: give a complex W as two gates.

    Raises:
      ValueError: a function is not callable; when called, if the shapes of kernel,
        features, ``own`` and state do not fit, or one of the first three is not real.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> cell = online.ElementwiseCell(  # leaks that are learnt
      ...     kernel=lambda params: params["W"][None],
      ...     own=lambda params: jax.nn.sigmoid(params["leak"]),
      ...     features=lambda x: x,
      ...     activate=lambda leak, z, h: (1 - leak) * h + leak * jnp.tanh(z[0]),
      ... )
      >>> params = {"W": jnp.ones((2, 3)), "leak": jnp.zeros(2)}
      >>> h = cell(params, jnp.ones(3), jnp.array([0.0, 1.0]))
      >>> [round(float(unit), 4) for unit in h]
      [0.4975, 0.9975]

    References:
      Irie, Gopalakrishnan, Schmidhuber, "Exploring the Promise and Limits of Real-Time
      Recurrent Learning", https://arxiv.org/abs/2305.19044, section 3.
    """

    kernel: Callable[[PyTree], jax.Array] = function(
        meaning="a callable", call="kernel(params) -> [gates, units, features]"
    )
    own: Callable[[PyTree], PyTree] = function(
        default=lambda params: (), meaning="a callable", call="own(params)"
    )
    features: Callable[[PyTree], jax.Array] = function(
        meaning="a callable", call="features(x) -> [features]"
    )
    activate: Callable[[PyTree, jax.Array, PyTree], PyTree] = function(
        meaning="a callable", call="activate(own, z, h), for one unit"
    )

    def __call__(self, params: PyTree, x: PyTree, h: PyTree) -> PyTree:
        """One step, as every step function."""
        kernel, own = self.kernel(params), self.own(params)
        features = self.features(x)
        check_shapes_of_units(kernel, own, features, h)
        return jax.vmap(self.activate, (0, 1, 0))(own, kernel @ features, h)


def check_shapes_of_units(
    kernel: jax.Array, own: PyTree, features: jax.Array, h: PyTree
) -> None:
    """Raises ValueError unless they are of the same units, and all but h real."""
    states = {jnp.shape(leaf) for leaf in jax.tree.leaves(h)}
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(own)}
    if (
        jnp.ndim(kernel) != 3
        or kernel.shape[2:] != jnp.shape(features)
        or states != {(kernel.shape[1],)}
        or not sizes <= states
    ):
        raise ValueError(
            "`kernel(params)` must be [gates, units, features] for states that are "
            "vectors of `units`, leaves of `own(params)` with a leading axis of "
            f"`units`, and a vector of `features`; got {jnp.shape(kernel)} with state "
            f"leaves {sorted(states)}, leading axes {sorted(sizes)} of `own` and "
            f"features {jnp.shape(features)}. Add the gate axis, kernel[None], if "
            "there is one gate."
        )
    for leaf in jax.tree.leaves((kernel, own, features)):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                "`kernel(params)`, `own(params)` and `features(x)` must be real "
                f"floating-point arrays; got {jnp.result_type(leaf)}"
                f"{list(jnp.shape(leaf))}. Give the real and the imaginary part of a "
                "complex matrix as two gates, and join them in `activate`."
            )


def _are_cells(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) > 0
        and all(isinstance(cell, ElementwiseCell) for cell in value)
    )


def _are_functions(value: object) -> bool:
    return isinstance(value, tuple) and all(map(callable, value))


@strategy
class LayeredCell:
    """Element-wise cells on top of each other, as one step function.

    Layer l takes one step on its input, and ``between`` makes of it the input of the
    next:

        h'ₗ = cellₗ(params, xₗ, hₗ),    xₗ₊₁ = betweenₗ(params, xₗ, h'ₗ).

    The state is the tuple of the layers' states. Give it to ``diagonal_rtrl``, or to
    any estimator that takes a step function.

    Cost and memory of a call are those of its parts. All AD modes.

    Attributes:
      cells: the layers, a tuple of ``ElementwiseCell``; each is given all parameters.
      between: a tuple of one function less, ``between(params, x, h)``: from a layer's
        input and new state to the input of the next layer.

    Raises:
      ValueError: ``cells`` is no tuple of cells, or ``between`` no tuple of one
        function less; when called, as the cells do.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> sums = lambda name: online.ElementwiseCell(
      ...     kernel=lambda params: params[name][None],
      ...     features=lambda x: x,
      ...     activate=lambda own, z, h: h + z[0],
      ... )
      >>> cell = online.LayeredCell(
      ...     cells=(sums("low"), sums("high")),
      ...     between=(lambda params, x, h: jnp.tanh(h),),
      ... )
      >>> params = {"low": jnp.ones((2, 1)), "high": jnp.ones((3, 2))}
      >>> low, high = cell(params, jnp.zeros(1), (jnp.zeros(2), jnp.ones(3)))
      >>> low.tolist(), high.tolist()
      ([0.0, 0.0], [1.0, 1.0, 1.0])

    References:
      Zucchet, Meier, Schug, Mujika, Sacramento, "Online learning of long-range
      dependencies", https://arxiv.org/abs/2305.15947, section 3.
    """

    cells: tuple[ElementwiseCell, ...] = option(
        check=_are_cells, meaning="a tuple of ElementwiseCells"
    )
    between: tuple[Callable[[PyTree, PyTree, PyTree], PyTree], ...] = option(
        check=_are_functions,
        meaning="a tuple of callables, called as between(params, x, h)",
    )

    def __post_init__(self) -> None:
        if len(self.between) != len(self.cells) - 1:
            raise ValueError(
                "LayeredCell: `between` must have one function less than there are "
                f"layers; got {len(self.between)} for {len(self.cells)} layers."
            )

    def __call__(self, params: PyTree, x: PyTree, h: PyTree) -> tuple:
        """One step, as every step function."""
        return tuple(new for _, new in self.layer_steps(params, x, h))

    def layer_steps(
        self, params: PyTree, x: PyTree, h: PyTree
    ) -> list[tuple[PyTree, PyTree]]:
        """Each layer's input and its new state."""
        if not isinstance(h, tuple) or len(h) != len(self.cells):
            raise ValueError(
                f"`h` must be a tuple of the states of {len(self.cells)} layers; got "
                f"{h!r}."
            )
        steps = []
        for cell, old, read in zip(self.cells, h, (*self.between, None), strict=True):
            new = cell(params, x, old)
            steps.append((x, new))
            x = read(params, x, new) if read else x
        return steps
