"""Gradients of recurrent networks from perturbed runs of a cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rbpjax.perturb.activity import ActivityPerturbation
from rbpjax.perturb.cell import Cell, local_pullback, nodes_like
from rbpjax.perturb.node import NodePerturbation
from rbpjax.perturb.noise import scaled, size_of, unflatten, widest
from rbpjax.perturb.samples import mean_over_samples
from rbpjax.perturb.weight import (
    WeightPerturbation,
    check_params,
    weight_gradient,
    weighted_sum,
)
from rbpjax.types import PyTree

StepLoss = Callable[[PyTree, PyTree], jax.Array]
Rule = WeightPerturbation | NodePerturbation | ActivityPerturbation


class Trajectory(NamedTuple):
    """A run of a cell; all leaves have a leading time axis.

    Attributes:
      states: the state after each step.
      outputs: what the cell gave out.
      nodes: its pre-activations.
    """

    states: PyTree
    outputs: PyTree
    nodes: PyTree


def unroll(
    cell: Cell, params: PyTree, h0: PyTree, xs: PyTree, noise: PyTree | None = None
) -> Trajectory:
    """Runs a cell over a sequence.

    Exact and differentiable in all modes: ``jax.grad`` through it is BPTT, with respect
    to ``noise`` it gives the error of every node.

    Args:
      cell: ``cell(params, x, h, noise) -> (h, out, nodes)``.
      params: its parameters.
      h0: first state.
      xs: inputs, leaves ``[T, …]``.
      noise: added to the nodes, leaves ``[T, …]``; None for none.

    Returns:
      A ``Trajectory``.

    Raises:
      ValueError: the cell does not keep to its contract.

    Example:
      >>> def cell(w, x, h, noise):
      ...     a = w * h + x + noise
      ...     return a, a, a
      >>> unroll(cell, jnp.array(0.5), jnp.array(0.0), jnp.ones(3)).outputs
      Array([1.  , 1.5 , 1.75], dtype=float64)
    """
    if noise is None:
        noise = _zeros(cell, params, h0, xs)

    def body(h, data):
        h, out, nodes = cell(params, data[0], h, data[1])
        return h, Trajectory(h, out, nodes)

    return jax.lax.scan(body, h0, (xs, noise))[1]


def recurrent_value_and_grad(
    cell: Cell, loss: StepLoss, rule: Rule
) -> Callable[..., tuple[jax.Array, PyTree]]:
    """Makes a function that returns the loss of a sequence and its gradient.

    Runs the cell clean and perturbed, credits the perturbations, and turns node errors
    into weight gradients by derivatives within single steps; no derivative is ever
    taken through time (nor at all for a cell with a ``pullback`` of its own, such as
    ``DenseCell``). See the rule for what is estimated.

    The value is Σ_t mean(loss_t). Two kinds of loss change what is credited:

    * one loss an example, ``[examples]``: each example's noise answers for its own
      loss; every node then has a leading axis of examples. The better one.
    * one loss for all, a scalar: all noise answers for all of it, with a variance about
      as many times higher as there are examples.

    Cost: one clean pass, the samples of the rule, and the local derivatives once.
    Memory: T × nodes for each sample of a chunk. Works under ``jit``, ``vmap`` and
    ``scan``. A loss that is not finite makes the gradient not finite.

    Args:
      cell: ``cell(params, x, h, noise) -> (h, out, nodes)``; see ``Nodes``.
      loss: ``loss(out, y)`` of one step: a scalar, or ``[examples]``.
      rule: ``NodePerturbation``, ``ActivityPerturbation`` or ``WeightPerturbation``.

    Returns:
      ``f(key, params, h0, xs, ys) -> (value, grads)``; ``xs`` and ``ys`` have leaves
      ``[T, …]``; grads have the structure, shapes and dtypes of ``params``. The
      starting state is a constant.

    Raises:
      ValueError: ``rule`` is none of those; when called, if the cell or the loss does
        not keep to its contract, or a leaf of ``params`` is not floating-point.

    Example:
      >>> from rbpjax import perturb
      >>> cell = perturb.DenseCell()
      >>> params = cell.init(jax.random.key(0), inputs=1, units=4, outputs=1)
      >>> loss = lambda out, y: jnp.mean((out - y) ** 2, axis=-1)
      >>> f = recurrent_value_and_grad(cell, loss, perturb.NodePerturbation(16))
      >>> xs, ys = jnp.ones((9, 5, 1)), jnp.zeros((9, 5, 1))  # 9 steps, 5 examples
      >>> h0 = jnp.zeros((5, 4))
      >>> value, grads = jax.jit(f)(jax.random.key(1), params, h0, xs, ys)
      >>> grads["recurrent"].shape
      (4, 4)
    """
    if not isinstance(rule, Rule):
        raise ValueError(
            "`rule` must be a NodePerturbation, ActivityPerturbation or "
            f"WeightPerturbation; got {rule!r}."
        )

    def estimate(key, params, h0, xs, ys):
        params = check_params(params)
        h0 = jax.tree.map(jnp.asarray, h0)
        zeros = _zeros(cell, params, h0, xs)
        examples = _count_examples(cell, loss, params, h0, xs, ys, zeros)
        first = jax.tree.map(lambda z: z[0], zeros)

        def run(p, amount, direction, clean=()):
            """Losses with ``amount`` of a direction, and how far nodes are from clean.

            ``clean`` are the nodes to compare with; () compares none.
            """

            # Scaled inside the loop: outside, a float copy of all noise would be made,
            # and its way through memory costs as much as a forward pass.
            def body(h, data):
                x, y, v, still = data
                h, out, nodes = cell(p, x, h, scaled(amount, v, first))
                nodes = nodes if jax.tree.leaves(still) else ()
                return h, (loss(out, y), jax.tree.map(jnp.subtract, nodes, still))

            return jax.lax.scan(body, h0, (xs, ys, direction, clean))[1]

        if isinstance(rule, WeightPerturbation):
            if rule.every_step:
                data = (h0, xs, ys, zeros)
                return _fresh_weights(rule, cell, loss, key, params, data)
            # Differences a step and an example, then sums: float32 needs the order.
            losses = lambda p: run(p, 0.0, zeros)[0] / (examples or 1)
            clean = losses(params)
            return jnp.sum(clean), weight_gradient(rule, key, params, losses, clean)

        states, outputs, nodes = unroll(cell, params, h0, xs, zeros)
        clean = jax.vmap(loss)(outputs, ys)
        size, dtype = size_of(zeros), widest(zeros)

        def chunk(indices):
            vectors = rule.noise(key, indices, size, dtype)
            # Samples come second, after time, in all that follows: what a scan over
            # them takes and gives is never transposed.
            directions = jax.vmap(lambda v: unflatten(v, zeros), out_axes=1)(vectors)

            def derivative(keep):
                """Of the losses, and of the nodes if they are kept, by the amount."""
                still = nodes if keep else ()
                none = jax.tree.map(jnp.zeros_like, still)  # clean nodes from clean

                def one(direction):
                    passes = lambda amount: run(params, amount, direction, still)
                    return rule.difference(passes, (clean, none))

                return jax.vmap(one, 1, 1)(directions)

            errors = rule.errors(derivative, directions, nodes, examples is not None)
            return jax.tree.map(lambda e: jnp.sum(e, axis=1), errors)

        errors = mean_over_samples(chunk, rule.num_samples, rule.chunk)
        errors = jax.tree.map(lambda e: e / (examples or 1), errors)
        before = jax.tree.map(
            lambda a, s: jnp.concatenate([a[None], s[:-1]]), h0, states
        )
        if hasattr(cell, "pullback"):
            grads = cell.pullback(params, xs, before, states, errors)
        else:
            grads = local_pullback(cell, params, xs, before, zeros, errors)
        return jnp.sum(clean) / (examples or 1), grads

    return estimate


def _fresh_weights(rule, cell, loss, key, params, data):
    """Weight perturbation with noise drawn anew at every step, never kept."""
    h0, xs, ys, zeros = data
    size, dtype = size_of(params), widest(params)
    steps = jnp.arange(len(jax.tree.leaves(zeros)[0]))

    def draw(t, indices):
        vectors = rule.noise(jax.random.fold_in(key, t), indices, size, dtype)
        return jax.vmap(lambda v: unflatten(v, params))(vectors)

    def losses(index, amount):
        """Mean losses of all steps with ``amount`` of the noise of one sample."""

        def body(h, inputs):
            t, x, y, n = inputs
            v = jax.tree.map(lambda v: v[0], draw(t, index[None]))
            step = scaled(amount, v, params)
            h, out, _ = cell(jax.tree.map(jnp.add, params, step), x, h, n)
            return h, jnp.mean(loss(out, y))

        return jax.lax.scan(body, h0, (steps, xs, ys, zeros))[1]

    clean = losses(jnp.uint32(0), 0.0)

    def credits(index):
        run = lambda amount: losses(index, amount)
        return rule.credit(rule.scale * rule.difference(run, clean))

    def chunk(indices):
        def body(sums, inputs):
            t, credit = inputs
            new = weighted_sum(credit, draw(t, indices), params)
            return optax.tree.add(sums, new), None

        start = optax.tree.zeros_like(params)
        return jax.lax.scan(body, start, (steps, jax.vmap(credits)(indices).T))[0]

    return jnp.sum(clean), mean_over_samples(chunk, rule.num_samples, rule.chunk)


def _zeros(cell: Cell, params: PyTree, h0: PyTree, xs: PyTree) -> PyTree:
    """No noise, for all steps."""
    leaves = jax.tree.leaves(xs)
    if not leaves:
        raise ValueError("`xs` has no leaves: its leading axis is what counts steps.")
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), xs)
    nodes = nodes_like(cell, params, x, h0)
    return jax.tree.map(lambda n: jnp.zeros((len(leaves[0]), *n.shape), n.dtype), nodes)


def _count_examples(cell, loss, params, h0, xs, ys, zeros) -> int | None:
    """The length of what ``loss`` returns for one step; None for a scalar."""
    first = lambda t: jax.tree.map(lambda a: a[0], t)
    step = lambda p, h, x, y, n: loss(cell(p, first(x), h, first(n))[1], first(y))
    shape = jax.eval_shape(step, params, h0, xs, ys, zeros)
    if not hasattr(shape, "shape") or len(shape.shape) > 1:
        raise ValueError(
            "`loss(out, y)` must return a scalar or a vector with one loss an example; "
            f"got {shape}. Take the mean over the outputs."
        )
    if not shape.shape:
        return None
    (examples,) = shape.shape
    shapes = [leaf.shape[1:] for leaf in jax.tree.leaves(zeros)]
    if any(s[:1] != (examples,) for s in shapes):
        raise ValueError(
            f"`loss` returns {examples} losses, one an example, so that every node "
            f"must have a leading axis of {examples}; got shapes {shapes}. Or return "
            "the mean, a scalar, for one loss."
        )
    return examples
