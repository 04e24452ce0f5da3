"""Backpropagation through time over a sequence: the baseline that stores history."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from rbpjax._core.step import floats, merge
from rbpjax.online.estimator import (
    Carry,
    Estimator,
    LossFn,
    OnlineOutput,
    check_count,
    check_functions,
    checked,
    no_noise,
    start,
)
from rbpjax.types import PyTree, StepFn


def bptt(f: StepFn, loss: LossFn, *, truncation: int | None = None) -> Estimator:
    """Backpropagates through a whole sequence at once, or window by window.

    One ``step`` consumes a sequence: ``x`` and ``y`` have a leading time axis. It
    returns the sum of the losses and its gradient, the state at the sequence's start
    taken as constant, and carries the state at its end.

    Exact for that sequence. With ``truncation``, the history is cut every so many
    steps, and the gradients of the windows, all at the same parameters, are summed.
    This is the window-summed variant: each loss of a window counts, and reaches back to
    the window's start. It is truncated (biased): dependencies across a cut are lost,
    and the sign of the gradient may be wrong. For an update after each window, feed
    the windows one by one instead.

    Cost: one step and one VJP a time step; memory the states of the whole sequence, or
    of one window of ``truncation`` states. Works under ``jit``, ``vmap`` and ``scan``,
    and can be differentiated in forward and reverse mode.

    Args:
      f: step function ``f(params, x, h) -> h``; any pytrees.
      loss: ``loss(params, h, y) -> scalar``, at the state after each step.
      truncation: steps between cuts; divides the length of every sequence. None cuts
        nowhere.

    Returns:
      An ``Estimator`` over sequences, without influence or noise.

    Raises:
      ValueError: ``truncation`` is no positive int; from ``step``, if it does not
        divide the length of the sequence, or ``x`` and ``y`` have no common one; also
        as in ``Estimator``.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> f, loss = lambda a, x, h: a * h + x, lambda a, h, y: h
      >>> a, x = jnp.array(0.5), jnp.ones(3)  # h is 1, a + 1, a² + a + 1
      >>> est = online.bptt(f, loss)
      >>> _, out = est.step(a, est.init(a, jnp.array(0.0)), x, None, ())
      >>> float(out.loss), float(out.grads)  # the sum, and its derivative 2 a + 2
      (4.25, 3.0)
      >>> est = online.bptt(f, loss, truncation=1)
      >>> _, out = est.step(a, est.init(a, jnp.array(0.0)), x, None, ())
      >>> float(out.loss), float(out.grads)  # each step blind to the one before
      (4.25, 2.5)

    References:
      Werbos, "Backpropagation through time: what it does and how to do it",
      Proceedings of the IEEE 78, 1990. Truncated: Williams, Peng, "An Efficient
      Gradient-Based Algorithm for On-Line Training of Recurrent Network
      Trajectories", Neural Computation 2, 1990.
    """
    if truncation is not None:
        check_count("truncation", truncation)

    def window(
        params: PyTree, carry: Carry, x: PyTree, y: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        def total(p: PyTree) -> tuple[jax.Array, PyTree]:
            theta = merge(p, params)

            def body(h: PyTree, xy: tuple[PyTree, PyTree]) -> tuple[PyTree, jax.Array]:
                h = f(theta, xy[0], h)
                return h, loss(theta, h, xy[1])

            h, losses = jax.lax.scan(body, carry.h, (x, y))
            return jnp.sum(losses), h

        gradient = jax.value_and_grad(total, has_aux=True)
        (value, h), grads = gradient(floats(params))
        return Carry(h, ()), OnlineOutput(value, grads)

    def step(
        params: PyTree, carry: Carry, x: PyTree, y: PyTree, noise: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        del noise
        length = _length(x, y)
        first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
        check_functions(f, loss, params, first(x), carry.h, first(y))
        if truncation is None:
            return window(params, carry, x, y)
        if length % truncation:
            raise ValueError(
                f"`truncation` = {truncation} must divide the length of the sequence, "
                f"{length}. Cut or pad the sequence."
            )
        xs, ys = jax.tree.map(
            lambda a: a.reshape(length // truncation, truncation, *a.shape[1:]), (x, y)
        )
        _, shapes = jax.eval_shape(window, params, carry, first(xs), first(ys))

        def body(
            state: tuple[Carry, OnlineOutput], xy: tuple[PyTree, PyTree]
        ) -> tuple[tuple[Carry, OnlineOutput], None]:
            carry, total = state
            carry, out = window(params, carry, *xy)
            return (carry, optax.tree.add(total, out)), None

        zeros = optax.tree.zeros_like(shapes)
        (carry, out), _ = jax.lax.scan(body, (carry, zeros), (xs, ys))
        return carry, out

    return checked(_init, no_noise, step)


def _init(params: PyTree, h0: PyTree) -> Carry:
    return Carry(start(params, h0), ())


def _length(x: PyTree, y: PyTree) -> int:
    """The length of the sequence; ValueError unless all leaves have the same."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves((x, y))]
    lengths = {shape[:1] for shape in shapes}
    if len(lengths) != 1 or lengths == {()} or lengths == {(0,)}:
        raise ValueError(
            "`x` and `y` must be sequences, with one leading time axis for all of "
            f"their leaves and at least one step; got leaves of shapes {shapes}. For "
            "a single step, add the axis: x[None], y[None]."
        )
    return shapes[0][0]
