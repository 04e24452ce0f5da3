"""The contract of the room: what an estimator is, and what it carries.

Legend: J = ∂f/∂h and F = ∂f/∂θ at the present step, δ = ∂loss/∂h at the new state,
G = ∂h/∂θ the influence, which obeys the affine recursion

    G ← J G + F.

Each estimator carries G, an unbiased estimate of it, or a truncation of it, and turns
it into the gradient of the present loss,

    ∂loss/∂θ (direct) + δ F + δ J G.

The last step, δ F, is exact in every estimator of this room.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rbpjax.types import PyTree, StepFn

LossFn = Callable[[PyTree, PyTree, PyTree], jax.Array]
"""``loss(params, h, y) -> scalar``, at the state *after* the step."""


class Carry(NamedTuple):
    """What an estimator carries from step to step: data of constant size.

    Attributes:
      h: the state; same pytree as ``h0``.
      influence: the estimate of G = ∂h/∂θ in the form of the estimator.
      metric: running statistics that are no influence; ``()`` except for
        ``kalman_nobacktrack``.
    """

    h: PyTree
    influence: PyTree
    metric: PyTree = ()


class OnlineOutput(NamedTuple):
    """What a step tells.

    Attributes:
      loss: the loss after the step, a scalar.
      grads: the gradient of ``loss`` in ``params``; same pytree as ``params``, where
        leaves that are not floating-point are None.
    """

    loss: jax.Array
    grads: PyTree


class Estimator(NamedTuple):
    """A gradient estimator: three pure functions, in optax's habit.

    All of them run under ``jit``, ``vmap`` and ``lax.scan``. Noise is data, so that a
    run is reproducible and all sign patterns can be enumerated with ``vmap``.

    Attributes:
      init: ``init(params, h0) -> Carry``, with zero influence.
      noise: ``noise(key, carry)``: the random signs of one step; ``()`` for a
        deterministic estimator.
      step: ``step(params, carry, x, y, noise) -> (Carry, OnlineOutput)``.
    """

    init: Callable[[PyTree, PyTree], Carry]
    noise: Callable[[jax.Array, Carry], PyTree]
    step: Callable[[PyTree, Carry, PyTree, PyTree, PyTree], tuple[Carry, OnlineOutput]]


def no_noise(key: jax.Array, carry: Carry) -> tuple[()]:
    """The noise of a deterministic estimator: none."""
    del key, carry
    return ()


def floats(tree: PyTree) -> PyTree:
    """``tree`` with None in place of the leaves that cannot be differentiated."""
    return jax.tree.map(
        lambda x: x if jnp.issubdtype(jnp.result_type(x), jnp.floating) else None, tree
    )


def merge(floating: PyTree, tree: PyTree) -> PyTree:
    """Puts the leaves of ``floating`` in their places in ``tree``."""
    return jax.tree.map(
        lambda a, b: b if a is None else a,
        floating,
        tree,
        is_leaf=lambda x: x is None,
    )


class Step(NamedTuple):
    """One step and its loss as functions of the floating-point leaves alone.

    Attributes:
      h_next: the new state, all its leaves.
      f: ``f(params, h) -> h``.
      params: the floating-point leaves of the parameters.
      h: the floating-point leaves of the old state.
      loss: the value of the loss at ``h_next``.
      direct: ∂loss/∂θ at fixed state.
      delta: δ = ∂loss/∂h at ``h_next``.
    """

    h_next: PyTree
    f: Callable[[PyTree, PyTree], PyTree]
    params: PyTree
    h: PyTree
    loss: jax.Array
    direct: PyTree
    delta: PyTree


def observe(
    f: StepFn, loss: LossFn, params: PyTree, h: PyTree, x: PyTree, y: PyTree
) -> Step:
    """Takes one step of ``f`` and differentiates the loss at its result.

    The state is advanced outside of any transformation, so that it stays unbatched
    when many estimates run beside one state (see ``average``).
    """
    check_state(f, params, h, x)
    h_next = f(params, x, h)

    def float_f(p, s):
        return floats(f(merge(p, params), x, merge(s, h)))

    def float_loss(p, s):
        return loss(merge(p, params), merge(s, h_next), y)

    p, s = floats(params), floats(h_next)
    value = jax.eval_shape(float_loss, p, s)
    if getattr(value, "shape", None) != ():
        raise ValueError(
            f"`loss(params, h, y)` must return a scalar; got {value}. Take the mean, "
            "or select the loss if it returns (loss, auxiliary)."
        )
    value, (direct, delta) = jax.value_and_grad(float_loss, argnums=(0, 1))(p, s)
    return Step(h_next, float_f, p, floats(h), value, direct, delta)


def check_state(f: StepFn, params: PyTree, h: PyTree, x: PyTree) -> None:
    """Raises ValueError unless ``f`` maps states to states of the same kind."""

    def kind(tree):
        return jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a).name), tree)

    for name, tree in (("params", params), ("h", h)):
        for leaf in jax.tree.leaves(tree):
            if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
                raise ValueError(
                    f"`{name}` holds a complex leaf of shape {jnp.shape(leaf)}; online "
                    "estimators are real. Carry its real and imaginary part instead."
                )
    was, new = kind(h), kind(jax.eval_shape(f, params, x, h))
    if was != new:
        raise ValueError(
            "`f` must return the same pytree, shapes and dtypes as its state `h`; got "
            f"{new} for {was}. Does `f` return (h, output)? Select h."
        )
