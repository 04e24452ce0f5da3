"""Local losses: layers that are trained each by a loss of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

from rbpjax._core.keys import check_key
from rbpjax.perturb.cell import Cell
from rbpjax.perturb.recurrent import Rule, recurrent_value_and_grad
from rbpjax.perturb.unroll import StepLoss, unroll
from rbpjax.types import PyTree


class LocalValueAndGrad(Protocol):
    """``f(key, params, inputs, h0, targets) -> (values, grads)``."""

    def __call__(
        self,
        key: jax.Array,
        params: Sequence[PyTree],
        inputs: PyTree,
        h0: Sequence[PyTree],
        targets: PyTree,
    ) -> tuple[jax.Array, tuple[PyTree, ...]]:
        """Returns the loss of each layer and the estimates of their gradients."""
        ...


def local_value_and_grad(
    cells: Sequence[Cell],
    loss: StepLoss | Sequence[StepLoss],
    rule: Rule,
    *,
    examples: int | None = None,
) -> LocalValueAndGrad:
    """Makes a function that returns the losses of all layers and their gradients.

    Layer l is a cell. Its inputs are the states of the layer below, at every step of
    the sequence, and its output goes to a loss of its own. Estimated is the gradient of

        Σ_l L_l,  with the states that one layer hands to the next taken as constants,

    so that each layer learns from its own loss alone. A layer with noise on its nodes
    is a network of one layer: the variance grows with the nodes of that layer, not with
    those of all of them, which is what makes forward gradients of deep networks usable.
    Unbiased for the gradient of that sum where ``rule`` is for one cell: with
    ``NodePerturbation(difference=Exact())`` at any size. It is not the gradient of the
    last loss: what a layer could do for the layers above is not seen.

    A feed-forward network is a sequence of one step: cells that leave their state out
    of account, and return their activity as the new one.

    Cost: for each layer that of ``recurrent_value_and_grad``, and one more clean pass;
    memory that of the largest layer, and the states. Works under ``jit``, ``vmap`` and
    ``scan``; not made to be differentiated. A layer's loss that is not finite makes the
    gradient of that layer not finite, and of no other.

    Args:
      cells: one ``cell(params, inputs, h, noise) -> (h, out, nodes)`` a layer.
      loss: ``loss(out, target)`` of one step: a scalar, or ``[examples]``; one for all
        layers, or one a layer.
      rule: ``NodePerturbation``, ``ActivityPerturbation`` or ``WeightPerturbation``.
      examples: as in ``recurrent_value_and_grad``.

    Returns:
      ``f(key, params, inputs, h0, targets) -> (values, grads)``; ``params`` and ``h0``
      have one entry a layer, ``inputs`` and ``targets`` leaves ``[T, …]``. Values are
      the losses of the layers, ``[layers]``; grads have one entry a layer, like
      ``params``.

    Raises:
      ValueError: there is no cell, or not one loss, one entry of ``params`` and one of
        ``h0`` for each; also as ``recurrent_value_and_grad``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> def cell(params, x, h, noise):  # feed-forward, with a readout of its own
      ...     a = x @ params["w"] + noise["a"]
      ...     h = jnp.tanh(a)
      ...     b = h @ params["out"] + noise["b"]
      ...     return h, b, {"a": a, "b": b}
      >>> loss = lambda out, y: jnp.mean((out - y) ** 2, axis=-1)
      >>> exact = perturb.difference.Exact()
      >>> rule = perturb.NodePerturbation(num_samples=4, difference=exact)
      >>> f = perturb.local_value_and_grad([cell] * 3, loss, rule)
      >>> params = [{"w": 0.5 * jnp.eye(8), "out": jnp.ones((8, 2))}] * 3
      >>> h0 = [jnp.zeros((5, 8))] * 3  # 5 examples, of one step
      >>> xs, ys = jnp.ones((1, 5, 8)), jnp.zeros((1, 5, 2))
      >>> values, grads = f(jax.random.key(0), params, xs, h0, ys)
      >>> values.shape, grads[2]["w"].shape
      ((3,), (8, 8))

    References:
      Ren, Kornblith, Liao, Hinton, "Scaling Forward Gradient With Local Losses", ICLR
      2023, https://arxiv.org/abs/2210.03310: losses for blocks, without their groups
      and patches.
    """
    layers = len(cells)
    losses = [loss] * layers if callable(loss) else list(loss)
    if not layers or len(losses) != layers:
        raise ValueError(
            f"`cells` must have at least one cell, and `loss` be one function or one a "
            f"cell; got {layers} cells and {len(losses)} losses."
        )
    each: list[Callable] = [
        recurrent_value_and_grad(cell, one, rule, examples=examples)
        for cell, one in zip(cells, losses, strict=True)
    ]

    def estimate(
        key: jax.Array,
        params: Sequence[PyTree],
        inputs: PyTree,
        h0: Sequence[PyTree],
        targets: PyTree,
    ) -> tuple[jax.Array, tuple[PyTree, ...]]:
        check_key(key)
        for name, given in (("params", params), ("h0", h0)):
            if not isinstance(given, Sequence) or len(given) != layers:
                raise ValueError(
                    f"`{name}` must be a sequence with an entry for each of the "
                    f"{layers} cells; got {jax.tree.structure(given)}."
                )
        values, grads, below = [], [], inputs
        for place, f in enumerate(each):
            now = jax.random.fold_in(key, place)
            value, found = f(now, params[place], below, h0[place], targets)
            values.append(value)
            grads.append(found)
            if place + 1 < layers:
                below = unroll(cells[place], params[place], below, h0[place]).states
        return jnp.stack(values), tuple(grads)

    return estimate
