"""Estimators from estimators: averages, batches, and a bound on the influence."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rbpjax.online.estimator import (
    Carry,
    Estimator,
    LossFn,
    OnlineOutput,
    check_count,
    check_positive,
)
from rbpjax.online.rank_one import norm
from rbpjax.types import PyTree, StepFn

__all__ = ["average", "over_batch", "per_sequence", "renormalize", "reset"]


def average(estimator: Estimator, copies: int) -> Estimator:
    """Averages independent copies of a random estimator over one state.

    The copies share the state, which is advanced once, and differ in their noise and
    influence. The variance falls as 1 / ``copies``; the bias, if any, stays.

    Cost: ``copies`` times the influence, in time and memory; the step of ``f`` and
    its loss are taken once. Transformations and AD modes as ``estimator``.

    Args:
      estimator: the estimator to copy, such as ``uoro(f, loss)``.
      copies: how many.

    Returns:
      An ``Estimator``; its influence and noise have a leading axis of ``copies``.

    Raises:
      ValueError: ``copies`` is no positive int.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> f, loss = lambda a, x, h: a * h + x, lambda a, h, y: jnp.sum(h)
      >>> est = online.combine.average(online.uoro(f, loss), copies=4)
      >>> carry = est.init(jnp.array(0.5), jnp.zeros(3))
      >>> carry.h.shape, carry.influence.v.shape
      ((3,), (4, 3))

    References:
      Tallec, Ollivier, "Unbiased Online Recurrent Optimization",
      https://arxiv.org/abs/1702.05043, on reducing the variance.
    """
    check_count("copies", copies)
    axes = Carry(None, 0, 0)

    def init(params: PyTree, h0: PyTree) -> Carry:
        carry = estimator.init(params, h0)
        many = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (copies, *x.shape)), carry[1:]
        )
        return Carry(carry.h, *many)

    def noise(key: jax.Array, carry: Carry) -> PyTree:
        keys = jax.random.split(key, copies)
        return jax.vmap(estimator.noise, (0, axes))(keys, carry)

    def step(
        params: PyTree, carry: Carry, x: PyTree, y: PyTree, noise: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        many = jax.vmap(
            estimator.step,
            in_axes=(None, axes, None, None, 0),
            out_axes=(axes, OnlineOutput._make((None, 0))),
        )
        carry, out = many(params, carry, x, y, noise)
        return carry, out._replace(grads=_mean(out.grads))

    return Estimator(init, noise, step)


def per_sequence(estimator: Estimator) -> Estimator:
    """Runs an estimator on each sequence of a batch, with an influence of its own.

    States, inputs and targets get a leading batch axis; losses and gradients are
    means over it. Against the shared parameter part of ``over_batch`` this has less
    variance, and needs a parameter tree for each sequence.

    Exact, unbiased or truncated as ``estimator``. Cost and memory: ``estimator``'s,
    times the batch. Transformations and AD modes as ``estimator``.

    Args:
      estimator: an estimator for one sequence.

    Returns:
      An ``Estimator`` for a batch; every leaf of its carry has a leading batch axis.

    Raises:
      ValueError: from JAX, where the leaves of states, inputs and targets differ in
        their leading axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> f, loss = lambda a, x, h: a * h + x, lambda a, h, y: jnp.sum(h)
      >>> est = online.combine.per_sequence(online.uoro(f, loss))
      >>> carry = est.init(jnp.array(0.5), jnp.zeros((8, 3)))
      >>> carry.influence.v.shape, carry.influence.w.shape
      ((8, 3), (8,))

    References:
      ``jax.vmap`` of the estimator, whose own source stands with it.
    """

    def init(params: PyTree, h0: PyTree) -> Carry:
        return jax.vmap(estimator.init, (None, 0))(params, h0)

    def noise(key: jax.Array, carry: Carry) -> PyTree:
        size = jax.tree.leaves(carry.h)[0].shape[0]
        return jax.vmap(estimator.noise)(jax.random.split(key, size), carry)

    def step(
        params: PyTree, carry: Carry, x: PyTree, y: PyTree, noise: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        many = jax.vmap(estimator.step, (None, 0, 0, 0, 0))
        carry, out = many(params, carry, x, y, noise)
        return carry, OnlineOutput(*_mean(tuple(out)))

    return Estimator(init, noise, step)


def over_batch(f: StepFn, loss: LossFn) -> tuple[StepFn, LossFn]:
    """Makes one system of a batch of sequences, with the mean of their losses.

    ``uoro(*over_batch(f, loss))`` is the minibatch of the authors' code: v has a
    batch axis and the parameter part w is shared, so that memory is one parameter
    tree for the whole batch, at the price of cross terms between sequences (more
    variance, no bias). ``rtrl`` and ``nobacktrack`` take it too, the latter with one
    row for each unit of each sequence.

    Exact. Cost: f and loss once for each sequence. All AD modes.

    Args:
      f: step function for one sequence.
      loss: loss for one sequence.

    Returns:
      ``(f, loss)`` for states, inputs and targets with a leading batch axis.

    Raises:
      ValueError: from JAX, where the leaves of states, inputs and targets differ in
        their leading axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> f, loss = lambda a, x, h: a * h + x, lambda a, h, y: jnp.sum(h)
      >>> est = online.uoro(*online.combine.over_batch(f, loss))
      >>> carry = est.init(jnp.array(0.5), jnp.zeros((8, 3)))
      >>> carry.influence.v.shape, carry.influence.w.shape
      ((8, 3), ())

    References:
      The authors' code of Tallec, Ollivier, "Unbiased Online Recurrent Optimization",
      https://arxiv.org/abs/1702.05043.
    """

    def mean_loss(params: PyTree, h: PyTree, y: PyTree) -> jax.Array:
        return jnp.mean(jax.vmap(loss, (None, 0, 0))(params, h, y))

    return jax.vmap(f, (None, 0, 0)), mean_loss


def reset(carry: PyTree, fresh: PyTree, ended: jax.Array) -> PyTree:
    """Starts anew where a sequence has ended.

    With ``fresh = est.init(params, h0)`` the influence is forgotten exactly as if the
    run had begun there. A vector ``ended`` selects sequences along the leading axis
    of every leaf, as ``per_sequence`` has it. Where w is shared by a batch, reset
    ``carry.h`` and ``carry.influence.v`` only: a zero row of v forgets its sequence.

    Exact. Cost: one selection a leaf. All AD modes.

    Args:
      carry: the carry of an estimator, or a part of it.
      fresh: same pytree as ``carry``.
      ended: a bool scalar, or a bool vector over the leading axis.

    Returns:
      Same pytree as ``carry``.

    Raises:
      ValueError: the two pytrees differ, or a vector ``ended`` has not the length of
        the leading axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> ended = jnp.array([True, False])
      >>> online.combine.reset(jnp.ones((2, 3)), jnp.zeros((2, 3)), ended).tolist()
      [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]

    References:
      The recursion G ← J G + F begins with G = 0; Williams, Zipser, "A Learning
      Algorithm for Continually Running Fully Recurrent Neural Networks", Neural
      Computation 1, 1989.
    """

    def select(old: jax.Array, new: jax.Array) -> jax.Array:
        rank = jnp.ndim(old) - jnp.ndim(ended)
        return jnp.where(jnp.reshape(ended, jnp.shape(ended) + (1,) * rank), new, old)

    return jax.tree.map(select, carry, fresh)


def renormalize(estimator: Estimator, max_norm: float) -> Estimator:
    """Bounds the norm of the influence, for dynamics that do not contract.

    In a chaotic network the true influence grows without bound, and overflows
    float32 after some hundred steps; so does every faithful estimate of it. After
    each step, the influence is scaled down to ``max_norm`` where it is larger.

    Truncated (biased) once the bound acts, and unchanged before. Cost: one norm.
    Transformations and AD modes as ``estimator``.

    Args:
      estimator: any estimator that carries an influence.
      max_norm: bound on the Euclidean norm of all numbers of the influence; for a
        pair v, w of equal norms that is √(2 ‖v wᵀ‖).

    Returns:
      An ``Estimator`` with the same carry.

    Raises:
      ValueError: ``max_norm`` is no positive number.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> est = online.rtrl(lambda a, x, h: a * h, lambda a, h, y: h)
      >>> est = online.combine.renormalize(est, 10.0)
      >>> carry = est.init(jnp.array(2.0), jnp.array(1.0))
      >>> for _ in range(5):  # without the bound, 5 · 2⁴ = 80
      ...     carry, _ = est.step(jnp.array(2.0), carry, None, None, ())
      >>> carry.influence.tolist()
      [10.0]

    References:
      Norm clipping as in Pascanu, Mikolov, Bengio, "On the difficulty of training
      recurrent neural networks", https://arxiv.org/abs/1211.5063, applied to the
      influence in place of the gradient.
    """
    check_positive("max_norm", max_norm)

    def step(
        params: PyTree, carry: Carry, x: PyTree, y: PyTree, noise: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        carry, out = estimator.step(params, carry, x, y, noise)
        scale = max_norm / jnp.maximum(norm(carry.influence), max_norm)
        influence = jax.tree.map(lambda x: x * scale.astype(x.dtype), carry.influence)
        return carry._replace(influence=influence), out

    return Estimator(estimator.init, estimator.noise, step)


def _mean(tree: PyTree) -> PyTree:
    """The mean over the leading axis of each leaf."""
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), tree)
