"""Estimators from estimators: averages, batches, and a bound on the influence."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rbpjax._core.norm import plain
from rbpjax._core.step import check_like
from rbpjax._core.tree import scale
from rbpjax.online.estimator import (
    Axes,
    Carry,
    Estimator,
    LossFn,
    OnlineOutput,
    check_count,
    check_positive,
    checked,
)
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

    def init(params: PyTree, h0: PyTree) -> Carry:
        carry = estimator.init(params, h0)
        many = lambda x: jnp.broadcast_to(x, (copies, *x.shape))
        influence, metric = jax.tree.map(many, (carry.influence, carry.metric))
        return _outside("copies", Carry(carry.h, influence, metric, carry.axes))

    def noise(key: jax.Array, carry: Carry) -> PyTree:
        carry = _inside(carry)
        keys = jax.random.split(key, copies)
        return jax.vmap(estimator.noise, (0, Carry(None, 0, 0, carry.axes)))(
            keys, carry
        )

    def step(
        params: PyTree, carry: Carry, x: PyTree, y: PyTree, noise: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        carry = _inside(carry)
        axes = Carry(None, 0, 0, carry.axes)
        many = jax.vmap(
            estimator.step,
            in_axes=(None, axes, None, None, 0),
            out_axes=(axes, OnlineOutput._make((None, 0))),
            axis_size=copies,  # where nothing is carried but the state
        )
        carry, out = many(params, carry, x, y, noise)
        return _outside("copies", carry), out._replace(grads=_mean(out.grads))

    return checked(init, noise, step)


def per_sequence(estimator: Estimator) -> Estimator:
    """Runs an estimator on each sequence of a batch, with an influence of its own.

    States, inputs and targets get a leading batch axis; losses and gradients are
    means over it. Against the shared parameter part of ``over_batch`` this has less
    variance, and needs a parameter tree for each sequence. A sequence that is not
    finite makes the means not finite, and no other sequence's carry: ``reset`` it.

    Exact, unbiased or truncated as ``estimator``. Cost and memory: ``estimator``'s,
    times the batch. Transformations and AD modes as ``estimator``.

    Args:
      estimator: an estimator for one sequence.

    Returns:
      An ``Estimator`` for a batch; every leaf of its carry has a leading batch axis.

    Raises:
      ValueError: the leaves of states, inputs and targets differ in their leading axis.

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
        _batch_size(h0=h0)
        carry = jax.vmap(estimator.init, (None, 0))(params, h0)
        return _outside("sequences", carry)

    def noise(key: jax.Array, carry: Carry) -> PyTree:
        keys = jax.random.split(key, _batch_size(h0=carry.h))
        return jax.vmap(estimator.noise)(keys, _inside(carry))

    def step(
        params: PyTree, carry: Carry, x: PyTree, y: PyTree, noise: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        _batch_size(h=carry.h, x=x, y=y)
        many = jax.vmap(estimator.step, (None, 0, 0, 0, 0))
        carry, out = many(params, _inside(carry), x, y, noise)
        return _outside("sequences", carry), OnlineOutput(*_mean(tuple(out)))

    return checked(init, noise, step)


def over_batch(f: StepFn, loss: LossFn) -> tuple[StepFn, LossFn]:
    """Makes one system of a batch of sequences, with the mean of their losses.

    ``uoro(*over_batch(f, loss))`` is the minibatch of the authors' code: v has a
    batch axis and the parameter part w is shared, so that memory is one parameter
    tree for the whole batch, at the price of cross terms between sequences (more
    variance, no bias). ``rtrl`` and ``nobacktrack`` take it too, the latter with one
    row for each unit of each sequence. What is shared is shared for better and worse:
    one sequence that is not finite spoils w for all. Where that may happen, use
    ``per_sequence``.

    Exact. Cost: f and loss once for each sequence. All AD modes.

    Args:
      f: step function for one sequence.
      loss: loss for one sequence.

    Returns:
      ``(f, loss)`` for states, inputs and targets with a leading batch axis.

    Raises:
      ValueError: the leaves of states, inputs and targets differ in their leading axis.

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

    def many(params: PyTree, x: PyTree, h: PyTree) -> PyTree:
        _batch_size(h=h, x=x)
        return jax.vmap(f, (None, 0, 0))(params, x, h)

    def mean_loss(params: PyTree, h: PyTree, y: PyTree) -> jax.Array:
        _batch_size(h=h, y=y)
        return jnp.mean(jax.vmap(loss, (None, 0, 0))(params, h, y))

    return many, mean_loss


def reset(carry: PyTree, fresh: PyTree, ended: jax.Array) -> PyTree:
    """Starts anew where a sequence has ended.

    With ``fresh = est.init(params, h0)`` the influence is forgotten exactly as if the
    run had begun there. A vector ``ended`` selects the sequences of ``per_sequence``,
    wherever their axis is: the carry knows, also under ``average``. Of a pytree that is
    no ``Carry`` it selects along the leading axis of every leaf. Where w is shared by a
    batch (``over_batch``), there is no carry a sequence: reset ``carry.h`` and
    ``carry.influence.v``, as parts; a zero row of v forgets its sequence.

    Exact. Cost: one selection a leaf. All AD modes.

    Args:
      carry: the carry of an estimator, or a part of it.
      fresh: same pytree as ``carry``.
      ended: a bool scalar, or one bool for each sequence.

    Returns:
      Same pytree as ``carry``.

    Raises:
      ValueError: the two pytrees differ, ``ended`` is not made of bools, it has not the
        shape of the sequences of all leaves, or ``carry`` has no sequences.

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
    if not jnp.issubdtype(jnp.result_type(ended), jnp.bool_):
        raise ValueError(
            f"`ended` must be bools, one for each sequence; got {jnp.asarray(ended)!r}."
        )
    remedy = "With est.init(params, h0) it has them."
    check_like(fresh, carry, "`fresh`", "`carry`", remedy)
    rank = jnp.ndim(ended)
    if not isinstance(carry, Carry):
        return jax.tree.map(
            lambda a, b: _select(a, b, ended, range(rank)), carry, fresh
        )
    names = carry.axes.names
    places = [i for i, name in enumerate(names) if name == "sequences"][:rank]
    if len(places) < rank:
        raise ValueError(
            f"`ended` of shape {jnp.shape(ended)} asks for {rank} axes of sequences; "
            f"the carry has {len(places)} (its axes: {names}). Make it with "
            "`per_sequence`; of a system made by `over_batch`, reset carry.h and "
            "carry.influence.v by themselves."
        )
    at = lambda places: lambda old, new: _select(old, new, ended, places)
    lead = carry.influence, carry.metric
    fresh_lead = fresh.influence, fresh.metric
    influence, metric = jax.tree.map(at(places), lead, fresh_lead)
    h = jax.tree.map(at(range(rank)), carry.h, fresh.h)
    return Carry(h, influence, metric, carry.axes)


def _select(
    old: jax.Array, new: jax.Array, ended: jax.Array, places: Sequence[int]
) -> jax.Array:
    """``new`` where ``ended``, whose axes are those of the leaf at ``places``."""
    shape = jnp.shape(old)
    found = tuple(shape[i] for i in places if i < len(shape))
    if found != jnp.shape(ended):
        raise ValueError(
            f"`ended` must have one bool for each sequence; got shape "
            f"{jnp.shape(ended)} for a leaf of shape {shape}, with sequences at axes "
            f"{list(places)}."
        )
    mask = [shape[i] if i in places else 1 for i in range(len(shape))]
    return jnp.where(jnp.reshape(ended, mask), new, old)


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
        pair v, w of equal norms that is √(2 ‖v wᵀ‖). Of each influence by itself,
        where ``estimator`` has one for each copy or sequence.

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
    # So that the squares of what is near the bound are representable.
    unit = 1.0 if 1e-9 < max_norm < 1e9 else max_norm
    near = lambda tree: tree if unit == 1 else scale(1 / unit, tree)

    def step(
        params: PyTree, carry: Carry, x: PyTree, y: PyTree, noise: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        carry, out = estimator.step(params, carry, x, y, noise)

        def bounded(influence: PyTree) -> PyTree:
            excess = plain(near(influence)) * unit / max_norm
            # What has grown out of all bounds in one step is lost, and must say so.
            excess = jnp.where(jnp.isinf(excess), jnp.nan, excess)
            size = jnp.maximum(excess, 1) * max_norm
            return scale(max_norm / size, influence)

        for _ in carry.axes.names:
            bounded = jax.vmap(bounded)
        return carry._replace(influence=bounded(carry.influence)), out

    return checked(estimator.init, estimator.noise, step)


def _outside(name: str, carry: Carry) -> Carry:
    """The carry with one more leading axis than its estimator knows of."""
    return carry._replace(axes=Axes((name, *carry.axes.names)))


def _inside(carry: Carry) -> Carry:
    """The carry as the estimator that is mapped over its first axis sees it."""
    return carry._replace(axes=Axes(carry.axes.names[1:]))


def _batch_size(**trees: PyTree) -> int:
    """The length of all leading axes; ValueError unless there is one."""
    shapes = {
        name: [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
        for name, tree in trees.items()
    }
    sizes = {shape[:1] for found in shapes.values() for shape in found}
    if len(sizes) != 1 or sizes == {()}:
        names = ", ".join(f"`{name}`" for name in trees)
        raise ValueError(
            f"{names} must have one leading axis, over the sequences, in all of their "
            f"leaves; got shapes {shapes}."
        )
    ((size,),) = sizes
    return size


def _mean(tree: PyTree) -> PyTree:
    """The mean over the leading axis of each leaf."""
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), tree)
