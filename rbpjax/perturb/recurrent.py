"""Gradients of recurrent networks from perturbed runs of a cell."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from rbpjax.perturb.activity import ActivityPerturbation
from rbpjax.perturb.cell import Cell, local_pullback
from rbpjax.perturb.node import NodePerturbation
from rbpjax.perturb.samples import (
    mean_over_samples,
    scaled,
    size_of,
    unflatten,
    weighted_sum,
    widest,
)
from rbpjax.perturb.unroll import Run, StepLoss, no_noise, unroll
from rbpjax.perturb.weight import WeightPerturbation, check_params, weight_gradient
from rbpjax.types import PyTree

Rule = WeightPerturbation | NodePerturbation | ActivityPerturbation


class RecurrentValueAndGrad(Protocol):
    """``f(key, params, inputs, h0, targets) -> (value, grads)``."""

    def __call__(
        self,
        key: jax.Array,
        params: PyTree,
        inputs: PyTree,
        h0: PyTree,
        targets: PyTree,
    ) -> tuple[jax.Array, PyTree]:
        """Returns the loss of a sequence and the estimate of its gradient."""
        ...


def recurrent_value_and_grad(
    cell: Cell, loss: StepLoss, rule: Rule
) -> RecurrentValueAndGrad:
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
    ``scan``; not made to be differentiated. A loss that is not finite makes the
    gradient not finite.

    Args:
      cell: ``cell(params, inputs, h, noise) -> (h, out, nodes)``; see ``Nodes``.
      loss: ``loss(out, target)`` of one step: a scalar, or ``[examples]``.
      rule: ``NodePerturbation``, ``ActivityPerturbation`` or ``WeightPerturbation``.

    Returns:
      ``f(key, params, inputs, h0, targets) -> (value, grads)``; ``inputs`` and
      ``targets`` have leaves ``[T, …]``; grads have the structure, shapes and dtypes of
      ``params``. The starting state is a constant.

    Raises:
      ValueError: ``rule`` is none of those; when called, if the cell or the loss does
        not keep to its contract, or a leaf of ``params`` is not floating-point.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> cell = perturb.DenseCell()
      >>> params = cell.init(jax.random.key(0), inputs=1, units=4, outputs=1)
      >>> loss = lambda out, target: jnp.mean((out - target) ** 2, axis=-1)
      >>> rule = perturb.NodePerturbation(num_samples=16)
      >>> f = perturb.recurrent_value_and_grad(cell, loss, rule)
      >>> inputs = jnp.ones((9, 5, 1))  # 9 steps, 5 examples
      >>> targets, h0 = jnp.zeros((9, 5, 1)), jnp.zeros((5, 4))
      >>> value, grads = jax.jit(f)(jax.random.key(1), params, inputs, h0, targets)
      >>> grads["recurrent"].shape
      (4, 4)

    References:
      García Fernández, Keemink, van Gerven, "Gradient-Free Training of Recurrent
      Neural Networks using Random Perturbations", https://arxiv.org/abs/2405.08967.
    """
    if not isinstance(rule, Rule):
        raise ValueError(
            "`rule` must be a NodePerturbation, ActivityPerturbation or "
            f"WeightPerturbation; got {rule!r}."
        )

    def estimate(
        key: jax.Array, params: PyTree, inputs: PyTree, h0: PyTree, targets: PyTree
    ) -> tuple[jax.Array, PyTree]:
        params = check_params(params)
        h0 = jax.tree.map(jnp.asarray, h0)
        zeros = no_noise(cell, params, inputs, h0)
        run = Run(cell, loss, inputs, h0, targets, zeros)
        examples = _count_examples(run, params)
        if not isinstance(rule, WeightPerturbation):
            return _node_estimate(rule, run, key, params, examples)
        if rule.every_step:
            return _fresh_weights(rule, run, key, params)
        # Differences a step and an example, then sums: float32 needs the order.
        losses = lambda p: run.losses(p, 0.0, zeros)[0] / (examples or 1)
        clean = losses(params)
        return jnp.sum(clean), weight_gradient(rule, key, params, losses, clean)

    return estimate


def _node_estimate(
    rule: NodePerturbation | ActivityPerturbation,
    run: Run,
    key: jax.Array,
    params: PyTree,
    examples: int | None,
) -> tuple[jax.Array, PyTree]:
    """The estimate from noise on the nodes: their errors, turned into gradients."""
    cell, zeros = run.cell, run.zeros
    states, outputs, nodes = unroll(cell, params, run.inputs, run.h0, zeros)
    clean = jax.vmap(run.loss)(outputs, run.targets)
    size, dtype = size_of(zeros), widest(zeros)

    def chunk(indices: jax.Array) -> PyTree:
        vectors = rule.noise(key, indices, size, dtype)
        # Samples come second, after time, in all that follows: what a scan over them
        # takes and gives is never transposed.
        directions = jax.vmap(lambda v: unflatten(v, zeros), out_axes=1)(vectors)

        def derivative(keep: bool) -> tuple[jax.Array, PyTree]:
            """Of the losses, and of the nodes if they are kept, by the amount."""
            still = nodes if keep else ()
            none = jax.tree.map(jnp.zeros_like, still)  # clean nodes from clean

            def one(direction: PyTree) -> tuple[jax.Array, PyTree]:
                passes = lambda amount: run.losses(params, amount, direction, still)
                return rule.difference(passes, (clean, none))

            return jax.vmap(one, 1, 1)(directions)

        errors = rule.errors(derivative, directions, nodes, examples is not None)
        return jax.tree.map(lambda e: jnp.sum(e, axis=1), errors)

    errors = mean_over_samples(chunk, rule.num_samples, rule.chunk)
    errors = jax.tree.map(lambda e: e / (examples or 1), errors)
    shift = lambda a, s: jnp.concatenate([a[None], s[:-1]])
    before = jax.tree.map(shift, run.h0, states)
    if hasattr(cell, "pullback"):
        grads = cell.pullback(params, run.inputs, before, states, errors)
    else:
        grads = local_pullback(cell, params, run.inputs, before, zeros, errors)
    return jnp.sum(clean) / (examples or 1), grads


def _fresh_weights(
    rule: WeightPerturbation, run: Run, key: jax.Array, params: PyTree
) -> tuple[jax.Array, PyTree]:
    """Weight perturbation with noise drawn anew at every step, never kept."""
    size, dtype = size_of(params), widest(params)
    steps = jnp.arange(len(jax.tree.leaves(run.zeros)[0]))

    def draw(t: jax.Array, indices: jax.Array) -> PyTree:
        vectors = rule.noise(jax.random.fold_in(key, t), indices, size, dtype)
        return jax.vmap(lambda v: unflatten(v, params))(vectors)

    def losses(index: jax.Array, amount: jax.typing.ArrayLike) -> jax.Array:
        """Mean losses of all steps with ``amount`` of the noise of one sample."""

        def body(h: PyTree, data: PyTree) -> tuple[PyTree, jax.Array]:
            t, x, target, none = data
            v = jax.tree.map(lambda v: v[0], draw(t, index[None]))
            noisy = jax.tree.map(jnp.add, params, scaled(amount, v, params))
            h, out, _ = run.cell(noisy, x, h, none)
            return h, jnp.mean(run.loss(out, target))

        data = (steps, run.inputs, run.targets, run.zeros)
        return jax.lax.scan(body, run.h0, data)[1]

    clean = losses(jnp.uint32(0), 0.0)

    def credits(index: jax.Array) -> jax.Array:
        passes = lambda amount: losses(index, amount)
        return rule.credit(rule.scale * rule.difference(passes, clean))

    def chunk(indices: jax.Array) -> PyTree:
        def body(
            sums: PyTree, data: tuple[jax.Array, jax.Array]
        ) -> tuple[PyTree, None]:
            t, credit = data
            new = weighted_sum(credit, draw(t, indices), params)
            return optax.tree.add(sums, new), None

        start = optax.tree.zeros_like(params)
        return jax.lax.scan(body, start, (steps, jax.vmap(credits)(indices).T))[0]

    return jnp.sum(clean), mean_over_samples(chunk, rule.num_samples, rule.chunk)


def _count_examples(run: Run, params: PyTree) -> int | None:
    """The length of what ``loss`` returns for one step; None for a scalar."""
    first = lambda t: jax.tree.map(lambda a: a[0], t)

    def step(p: PyTree, x: PyTree, h: PyTree, target: PyTree, n: PyTree) -> jax.Array:
        return run.loss(run.cell(p, first(x), h, first(n))[1], first(target))

    shape = jax.eval_shape(step, params, run.inputs, run.h0, run.targets, run.zeros)
    if not hasattr(shape, "shape") or len(shape.shape) > 1:
        raise ValueError(
            "`loss(out, target)` must return a scalar or a vector with one loss an "
            f"example; got {shape}. Take the mean over the outputs."
        )
    if not shape.shape:
        return None
    (examples,) = shape.shape
    shapes = [leaf.shape[1:] for leaf in jax.tree.leaves(run.zeros)]
    if any(s[:1] != (examples,) for s in shapes):
        raise ValueError(
            f"`loss` returns {examples} losses, one an example, so that every node "
            f"must have a leading axis of {examples}; got shapes {shapes}. Or return "
            "the mean, a scalar, for one loss."
        )
    return examples
