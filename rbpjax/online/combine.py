"""Estimators from estimators: averages, batches, and a bound on the influence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from rbpjax.online.estimator import Carry, Estimator, LossFn, OnlineOutput
from rbpjax.types import PyTree, StepFn


def average(estimator: Estimator, copies: int) -> Estimator:
    """Averages independent copies of a random estimator over one state.

    The copies share the state, which is advanced once, and differ in their noise and
    influence. The variance falls as 1 / ``copies``; the bias, if any, stays.

    Cost: ``copies`` times the influence, in time and memory; the step of ``f`` and
    its loss are taken once.

    Args:
      estimator: the estimator to copy, such as ``uoro(f, loss)``.
      copies: how many.

    Returns:
      An ``Estimator``; its influence and noise have a leading axis of ``copies``.

    Raises:
      ValueError: ``copies`` is no positive int.

    Example:
      >>> from rbpjax.online import uoro
      >>> f, loss = lambda a, x, h: a * h + x, lambda a, h, y: jnp.sum(h)
      >>> est = average(uoro(f, loss), copies=4)
      >>> carry = est.init(jnp.array(0.5), jnp.zeros(3))
      >>> carry.h.shape, carry.influence.v.shape
      ((3,), (4, 3))
    """
    if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
        raise ValueError(f"`copies` must be a Python int of at least 1; got {copies!r}")
    axes = Carry(None, 0, 0)

    def init(params, h0):
        carry = estimator.init(params, h0)
        many = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (copies, *x.shape)), carry[1:]
        )
        return Carry(carry.h, *many)

    def noise(key, carry):
        keys = jax.random.split(key, copies)
        return jax.vmap(estimator.noise, (0, axes))(keys, carry)

    def step(params, carry, x, y, noise):
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

    Args:
      estimator: an estimator for one sequence.

    Returns:
      An ``Estimator`` for a batch; every leaf of its carry has a leading batch axis.

    Example:
      >>> from rbpjax.online import uoro
      >>> f, loss = lambda a, x, h: a * h + x, lambda a, h, y: jnp.sum(h)
      >>> est = per_sequence(uoro(f, loss))
      >>> carry = est.init(jnp.array(0.5), jnp.zeros((8, 3)))
      >>> carry.influence.v.shape, carry.influence.w.shape
      ((8, 3), (8,))
    """

    def init(params, h0):
        return jax.vmap(estimator.init, (None, 0))(params, h0)

    def noise(key, carry):
        size = jax.tree.leaves(carry.h)[0].shape[0]
        return jax.vmap(estimator.noise)(jax.random.split(key, size), carry)

    def step(params, carry, x, y, noise):
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

    Args:
      f: step function for one sequence.
      loss: loss for one sequence.

    Returns:
      ``(f, loss)`` for states, inputs and targets with a leading batch axis.

    Example:
      >>> from rbpjax.online import uoro
      >>> f, loss = lambda a, x, h: a * h + x, lambda a, h, y: jnp.sum(h)
      >>> est = uoro(*over_batch(f, loss))
      >>> carry = est.init(jnp.array(0.5), jnp.zeros((8, 3)))
      >>> carry.influence.v.shape, carry.influence.w.shape
      ((8, 3), ())
    """

    def mean_loss(params, h, y):
        return jnp.mean(jax.vmap(loss, (None, 0, 0))(params, h, y))

    return jax.vmap(f, (None, 0, 0)), mean_loss


def reset(carry: PyTree, fresh: PyTree, ended: jax.Array) -> PyTree:
    """Starts anew where a sequence has ended.

    With ``fresh = est.init(params, h0)`` the influence is forgotten exactly as if the
    run had begun there. A vector ``ended`` selects sequences along the leading axis
    of every leaf, as ``per_sequence`` has it. Where w is shared by a batch, reset
    ``carry.h`` and ``carry.influence.v`` only: a zero row of v forgets its sequence.

    Args:
      carry: the carry of an estimator, or a part of it.
      fresh: same pytree as ``carry``.
      ended: a bool scalar, or a bool vector over the leading axis.

    Returns:
      Same pytree as ``carry``.

    Example:
      >>> reset(jnp.ones((2, 3)), jnp.zeros((2, 3)), jnp.array([True, False]))
      Array([[0., 0., 0.],
             [1., 1., 1.]], dtype=float64)
    """

    def select(old, new):
        rank = jnp.ndim(old) - jnp.ndim(ended)
        return jnp.where(jnp.reshape(ended, jnp.shape(ended) + (1,) * rank), new, old)

    return jax.tree.map(select, carry, fresh)


def renormalize(estimator: Estimator, max_norm: float) -> Estimator:
    """Bounds the norm of the influence, for dynamics that do not contract.

    In a chaotic network the true influence grows without bound, and overflows
    float32 after some hundred steps; so does every faithful estimate of it. After
    each step, the influence is scaled down to ``max_norm`` where it is larger.

    Truncated (biased) once the bound acts, and unchanged before. Cost: one norm.

    Args:
      estimator: any estimator that carries an influence.
      max_norm: bound on the Euclidean norm of all numbers of the influence; for a
        pair v, w of equal norms that is √(2 ‖v wᵀ‖).

    Returns:
      An ``Estimator`` with the same carry.

    Raises:
      ValueError: ``max_norm`` is no positive number.

    Example:
      >>> from rbpjax.online import rtrl
      >>> est = renormalize(rtrl(lambda a, x, h: a * h, lambda a, h, y: h), 10.0)
      >>> carry = est.init(jnp.array(2.0), jnp.array(1.0))
      >>> for _ in range(5):  # without the bound, 5 · 2⁴ = 80
      ...     carry, _ = est.step(jnp.array(2.0), carry, None, None, ())
      >>> carry.influence
      Array([10.], dtype=float64)
    """
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)):
        raise ValueError(f"`max_norm` must be a Python number; got {max_norm!r}.")
    if not max_norm > 0:
        raise ValueError(f"`max_norm` must be positive; got {max_norm}.")

    def step(params, carry, x, y, noise):
        carry, out = estimator.step(params, carry, x, y, noise)
        norm = optax.tree.norm(carry.influence)
        scale = max_norm / jnp.maximum(norm, max_norm)
        influence = jax.tree.map(lambda x: x * scale.astype(x.dtype), carry.influence)
        return carry._replace(influence=influence), out

    return Estimator(estimator.init, estimator.noise, step)


def _mean(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), tree)
