"""Gradients of recurrent networks from perturbed runs of a cell."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from rbpjax._core.keys import check_key
from rbpjax._core.step import check_like
from rbpjax.perturb.activity import ActivityPerturbation
from rbpjax.perturb.cell import Cell, local_pullback
from rbpjax.perturb.dependence import beside_nodes, rows_stay_apart
from rbpjax.perturb.difference import sized, slopes
from rbpjax.perturb.node import NodePerturbation, credited_with
from rbpjax.perturb.samples import (
    draw,
    joined,
    mean_over_samples,
    scaled,
    size_of,
    spread,
    unflatten,
    weighted_sum,
    widest,
)
from rbpjax.perturb.unroll import Run, StepLoss, check_length, no_noise, unroll
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
    cell: Cell, loss: StepLoss, rule: Rule, *, examples: int | None = None
) -> RecurrentValueAndGrad:
    """Makes a function that returns the loss of a sequence and its gradient.

    Runs the cell clean and perturbed, credits the perturbations, and turns node errors
    into weight gradients by derivatives within single steps; no derivative is ever
    taken through time (nor at all for a cell with a ``pullback`` of its own, such as
    ``DenseCell``). See the rule for what is estimated.

    The value is Σ_t mean(loss_t). Two kinds of loss change what is credited:

    * one loss an example, ``[examples]``: each example's noise answers for its own
      loss; every node and every state that depends on noise then has a leading axis of
      examples, whose rows do not mix. The better one. That a vector is one loss an
      example, and not one an output, is read off the program of cell and loss.
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
      examples: their number, where the loss returns one for each but the program does
        not show that they stay apart: a promise that row i of the nodes reaches loss i
        only. None: what is shown.

    Returns:
      ``f(key, params, inputs, h0, targets) -> (value, grads)``; ``inputs`` and
      ``targets`` have leaves ``[T, …]``; grads have the structure, shapes and dtypes of
      ``params``. The starting state is a constant.

    Raises:
      ValueError: ``rule`` or ``examples`` is none of those; when called, if ``key`` is
        no PRNG key, cell, loss or a callable of the rule does not keep to its contract,
        there is no step, a leaf of ``params`` is not floating-point, or (node rules) a
        parameter acts beside the nodes: its gradient would be wrong.

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
    counted = isinstance(examples, int) and not isinstance(examples, bool)
    if examples is not None and (not counted or examples < 1):
        raise ValueError(
            f"`examples` must be None or a Python int of at least 1; got {examples!r}."
        )

    def estimate(
        key: jax.Array, params: PyTree, inputs: PyTree, h0: PyTree, targets: PyTree
    ) -> tuple[jax.Array, PyTree]:
        check_key(key)
        params = check_params(params)
        inputs, h0, targets = jax.tree.map(jnp.asarray, (inputs, h0, targets))
        check_length(inputs, targets)
        data = spread(rule, (params, inputs, h0, targets))
        return joined(rule, estimate_here(key, *data))

    def estimate_here(
        key: jax.Array, params: PyTree, inputs: PyTree, h0: PyTree, targets: PyTree
    ) -> tuple[jax.Array, PyTree]:
        zeros = no_noise(cell, params, inputs, h0)
        run = Run(cell, loss, inputs, h0, targets, zeros)
        count = _count_losses(run, params)
        if examples not in (None, count):
            raise ValueError(
                f"`examples` = {examples} asks for as many losses a step; `loss` "
                f"returns {'a scalar' if count is None else count}."
            )
        if not isinstance(rule, WeightPerturbation):
            _check_nodes(run, params)
            if count is not None:
                _check_examples(run, params, count, examples is not None)
            return _node_estimate(rule, run, key, params, count)
        if rule.every_step:
            return _fresh_weights(rule, run, key, params)
        # Differences a step and an example, then sums: float32 needs the order.
        losses = lambda p: run.losses(p, 0.0, zeros)[0] / (count or 1)
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
    difference = sized(rule.difference, nodes)

    def chunk(indices: jax.Array) -> PyTree:
        vectors = draw(rule.noise, key, indices, size, dtype)
        # Samples come second, after time, in all that follows: what a scan over them
        # takes and gives is never transposed.
        directions = jax.vmap(lambda v: unflatten(v, zeros), out_axes=1)(vectors)

        def derivative(keep: bool) -> tuple[jax.Array, PyTree]:
            """Of the losses, and of the nodes if they are kept, by the amount."""
            still = nodes if keep else ()
            none = jax.tree.map(jnp.zeros_like, still)  # clean nodes from clean

            def one(direction: PyTree) -> tuple[jax.Array, PyTree]:
                passes = lambda amount: run.losses(params, amount, direction, still)
                return slopes(difference, passes, (clean, none))

            return jax.vmap(one, 1, 1)(directions)

        errors = rule.errors(derivative, directions, nodes, examples is not None)
        return jax.tree.map(lambda e: jnp.sum(e, axis=1), errors)

    errors = mean_over_samples(chunk, rule, size)
    errors = jax.tree.map(lambda e: e / (examples or 1), errors)
    shift = lambda a, s: jnp.concatenate([a[None], s[:-1]])
    before = jax.tree.map(shift, run.h0, states)
    if hasattr(cell, "pullback"):
        grads = cell.pullback(params, run.inputs, before, states, errors)
        remedy = "It returns the gradient of every parameter."
        check_like(grads, params, "`cell.pullback`'s result", "`params`", remedy)
    else:
        grads = local_pullback(cell, params, run.inputs, before, zeros, errors)
    return jnp.sum(clean) / (examples or 1), grads


def _fresh_weights(
    rule: WeightPerturbation, run: Run, key: jax.Array, params: PyTree
) -> tuple[jax.Array, PyTree]:
    """Weight perturbation with noise drawn anew at every step, never kept."""
    size, dtype = size_of(params), widest(params)
    steps = jnp.arange(len(jax.tree.leaves(run.zeros)[0]))
    difference = sized(rule.difference, params)

    def drawn(t: jax.Array, indices: jax.Array) -> PyTree:
        now = jax.random.fold_in(key, t)
        vectors = draw(rule.noise, now, indices, size, dtype)
        return jax.vmap(lambda v: unflatten(v, params))(vectors)

    def losses(index: jax.Array, amount: jax.typing.ArrayLike) -> jax.Array:
        """Mean losses of all steps with ``amount`` of the noise of one sample."""

        def body(h: PyTree, data: PyTree) -> tuple[PyTree, jax.Array]:
            t, x, target, none = data
            v = jax.tree.map(lambda v: v[0], drawn(t, index[None]))
            noisy = jax.tree.map(jnp.add, params, scaled(amount, v, params))
            h, out, _ = run.cell(noisy, x, h, none)
            return h, jnp.mean(run.loss(out, target))

        data = (steps, run.inputs, run.targets, run.zeros)
        return jax.lax.scan(body, run.h0, data)[1]

    clean = losses(jnp.uint32(0), 0.0)

    def credits(index: jax.Array) -> jax.Array:
        passes = lambda amount: losses(index, amount)
        delta = rule.scale * slopes(difference, passes, clean)
        return credited_with(rule.credit, "credit", delta)

    def chunk(indices: jax.Array) -> PyTree:
        def body(
            sums: PyTree, data: tuple[jax.Array, jax.Array]
        ) -> tuple[PyTree, None]:
            t, credit = data
            new = weighted_sum(credit, drawn(t, indices), params)
            return optax.tree.add(sums, new), None

        start = optax.tree.zeros_like(params)
        return jax.lax.scan(body, start, (steps, jax.vmap(credits)(indices).T))[0]

    return jnp.sum(clean), mean_over_samples(chunk, rule, size)


def _first(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a[0], tree)


def _count_losses(run: Run, params: PyTree) -> int | None:
    """The length of what ``loss`` returns for one step; None for a scalar."""

    def step(p: PyTree, x: PyTree, h: PyTree, target: PyTree, n: PyTree) -> jax.Array:
        return run.loss(run.cell(p, _first(x), h, _first(n))[1], _first(target))

    made = jax.eval_shape(step, params, run.inputs, run.h0, run.targets, run.zeros)
    floating = hasattr(made, "dtype") and jnp.issubdtype(made.dtype, jnp.floating)
    if not floating or len(made.shape) > 1:
        raise ValueError(
            "`loss(out, target)` must return a scalar or a vector with one loss an "
            f"example, in floating point; got {made}. Take the mean over the outputs."
        )
    return made.shape[0] if made.shape else None


def _check_examples(run: Run, params: PyTree, count: int, promised: bool) -> None:
    """Raises ValueError unless the ``count`` losses are those of examples."""
    shapes = [leaf.shape[1:] for leaf in jax.tree.leaves(run.zeros)]
    if any(s[:1] != (count,) for s in shapes):
        raise ValueError(
            f"`loss` returns {count} losses, one an example, so that every node must "
            f"have a leading axis of {count}; got shapes {shapes}. Or return the mean, "
            "a scalar, for one loss."
        )

    def step(noise: PyTree, h: PyTree) -> tuple[jax.Array, PyTree]:
        h, out, _ = run.cell(params, _first(run.inputs), h, noise)
        return run.loss(out, _first(run.targets)), h

    if not promised and not rows_stay_apart(step, _first(run.zeros), run.h0):
        raise ValueError(
            f"`loss` returns {count} losses, and rows of the nodes ({shapes}) reach "
            "more than one of them each, as far as the program of cell and loss shows: "
            "one an output, not one an example. Return their mean, a scalar; or, if "
            f"row i of the nodes reaches loss i only, say examples={count}."
        )


def _check_nodes(run: Run, params: PyTree) -> None:
    """Raises ValueError where a parameter acts beside the nodes."""
    x, noise = _first(run.inputs), _first(run.zeros)
    if found := beside_nodes(run.cell, params, x, run.h0, noise):
        raise ValueError(
            f"`params` at {', '.join(found)} act on the state or the output beside "
            "the nodes, where no noise answers for them: their gradient would be "
            "wrong. Add noise to what they make, as one more leaf of nodes; or use "
            "WeightPerturbation."
        )
