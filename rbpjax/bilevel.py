"""Training inside training: one update as a step function, or both levels at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from rbpjax.types import PyTree, StepFn

if TYPE_CHECKING:
    import optax

Loss = Callable[[PyTree, PyTree, PyTree], jax.Array]


def optimizer_step(
    loss: Loss, make_optimizer: Callable[[PyTree], optax.GradientTransformation]
) -> StepFn:
    """One optax update as a step function, whose fixed point is the trained network.

    With hyperparameters as ``params``, data as ``inputs`` and ``h = (weights, state)``,

        f(params, inputs, h): weights + update(∇ loss(params, inputs, weights), state),

    so that hyperparameter optimization is ``rbp_solve`` over f, and a hypergradient is
    the gradient of a validation loss at its value. Exact where training has converged.

    What does not move the fixed point has no gradient there: the hypergradient of step
    size and momentum is *zero* at a minimum, whatever the minimum's quality. Weight
    decay, weights of examples, or anything else inside ``loss`` does move it. For an
    unfinished training the gradient of the path is ``bptt(f, num_steps)``.

    Cost: one gradient of the loss a step, one Hessian-vector product a backward step.
    I - J is (for gradient descent) the step size times the Hessian: invertible where
    that is, and as well conditioned. But J is formed, and I - J rounded in units of
    one: with a step size η and a Hessian's eigenvalue λ, ε / ηλ of the gradient is
    lost, all of it at η = 1e-7 in float32. AD modes: all.

    Where hyperparameters enter by the loss alone, differentiate its minimum instead,
    whatever trained it (Adam, small steps, another library):
    ``rbp_root(jax.grad(loss, argnums=2), solver=train)`` with
    ``train(params, inputs, weights) -> weights``. Nothing is lost there.

    Args:
      loss: ``loss(params, inputs, weights) -> scalar``.
      make_optimizer: ``make_optimizer(params)`` is an optax transformation, which may
        depend on traced hyperparameters. Its state must be of floating-point arrays: a
        step counter (Adam's, a schedule's) has no fixed point; see above.

    Returns:
      ``f(params, inputs, h) -> h`` with ``h = (weights, state)``; the start is
      ``(weights, make_optimizer(params).init(weights))``.

    Raises:
      ValueError: by f, while tracing, if h is not such a pair, or the state has leaves
        that are not floating-point arrays.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from rbpjax import optimizer_step, rbp_solve
      >>> loss = lambda p, x, w: 0.5 * jnp.sum((w - x) ** 2 + p["decay"] * w**2)
      >>> make = lambda p: optax.sgd(p["rate"], momentum=0.5)
      >>> f = optimizer_step(loss, make)
      >>> p = {"rate": jnp.array(0.1), "decay": jnp.array(1.0)}
      >>> x, w = jnp.array([2.0]), jnp.zeros(1)  # w* = x / (1 + decay)
      >>> trained = lambda p: rbp_solve(f)(p, x, (w, make(p).init(w))).value[0]
      >>> grads = jax.grad(lambda p: trained(p)[0])(p)
      >>> round(float(grads["decay"]), 3), abs(round(float(grads["rate"]), 3))
      (-0.5, 0.0)

    References:
      Liao et al., "Reviving and Improving Recurrent Back-Propagation", ICML 2018,
      section 5.3; Maclaurin, Duvenaud, Adams, ICML 2015 (the same through the path).
    """
    import optax  # half of a second, which ``import rbpjax`` need not take

    def f(params: PyTree, inputs: PyTree, h: PyTree) -> PyTree:
        if not (isinstance(h, tuple) and len(h) == 2):
            raise ValueError(
                "optimizer_step: `h` must be (weights, state), with state = "
                f"make_optimizer(params).init(weights); got {type(h).__name__}."
            )
        weights, state = h
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                raise ValueError(
                    "optimizer_step: the optimizer's state must be of floating-point "
                    f"arrays; state{jax.tree_util.keystr(path)} is "
                    f"{jnp.result_type(leaf)}. A counter never comes to rest. Train as "
                    "you like and differentiate the minimum itself: rbp_root(jax.grad("
                    "loss, argnums=2), solver=train)(params, inputs, weights), with "
                    "train(params, inputs, weights) -> weights; or take an optimizer "
                    "without one: optax.sgd with a constant step size."
                )
        grads = jax.grad(loss, argnums=2)(params, inputs, weights)
        updates, state = make_optimizer(params).update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    return f


class BilevelState(NamedTuple):
    """Where a single-loop bilevel descent is.

    Attributes:
      params: the outer variable, a pytree of floating-point arrays.
      weights: the inner variable, likewise.
      adjoint: u, a pytree like ``weights``.
      params_state: the optimizer's state for ``params``.
      weights_state: that for ``weights``.
      adjoint_state: that for ``adjoint``.
    """

    params: PyTree
    weights: PyTree
    adjoint: PyTree
    params_state: PyTree
    weights_state: PyTree
    adjoint_state: PyTree


class BilevelDirections(NamedTuple):
    """The three directions of a step: estimates of what must become zero.

    Attributes:
      params: of the outer variable: the hypergradient, once the others are at rest.
      weights: of the inner variable: the gradient of the inner loss.
      adjoint: of the adjoint: the residual of its equation.
    """

    params: PyTree
    weights: PyTree
    adjoint: PyTree


class BilevelDescent(NamedTuple):
    """A single-loop bilevel descent, as ``soba`` makes it; optax's pair, and one more.

    Attributes:
      init: ``init(params, weights) -> BilevelState``, with an adjoint of zeros.
      directions: ``directions(state, inner_inputs, outer_inputs)``, the
        ``BilevelDirections`` there, for an optimizer of one's own.
      update: ``update(state, inner_inputs, outer_inputs) -> BilevelState``: one step of
        each of the three.
    """

    init: Callable[[PyTree, PyTree], BilevelState]
    directions: Callable[[BilevelState, PyTree, PyTree], BilevelDirections]
    update: Callable[[BilevelState, PyTree, PyTree], BilevelState]


def soba(
    inner: Loss,
    outer: Loss,
    *,
    outer_optimizer: optax.GradientTransformation,
    inner_optimizer: optax.GradientTransformation,
    adjoint_optimizer: optax.GradientTransformation | None = None,
    inner_steps: int = 1,
) -> BilevelDescent:
    """Stochastic bilevel descent in a single loop: inner, adjoint and outer together.

    Of ``outer(params, outer_inputs, w*)`` with w* = argmin ``inner(params,
    inner_inputs, w)`` the gradient for params p needs w* and the adjoint u of it,
    ∇²_ww G u = ∇_w F, for the inner loss G and the outer loss F. Neither is solved
    for: each step moves all three at once, by the directions at the same point

        D_w = ∇_w G(p, w),
        D_u = ∇²_ww G(p, w) u - ∇_w F(p, w),
        D_p = ∇_p F(p, w) - ∇²_pw G(p, w) u,

    each handed to its optimizer as a gradient. (The paper's v is -u.) They are linear
    in the losses, and so, for batches drawn at random, unbiased estimates of those of
    the whole losses *at the present point*. There D_p is no hypergradient, but biased
    by how far w and u are behind; it is exact in the limit. For an inner loss that is
    strongly convex and with step sizes that fall, or with whole losses, it converges;
    the outer step should be the slowest. Step sizes of weights and adjoint must suit
    the largest eigenvalue of ∇²_ww G.

    With ``inner_steps`` of K, weights and adjoint take K - 1 steps alone, with the same
    inputs, before the step of all three. The hypergradient is the less behind the more
    of them, and for K → ∞ that of the minimum, for the inputs given (AmIGO, whose inner
    steps draw batches anew, and which moves the weights before the adjoint).

    Cost of a step: the gradients of both losses, and one product with the second
    derivatives of the inner loss, from one linearization of its gradient, times
    ``inner_steps``. Memory:
    weights, adjoint, and the optimizers' states; nothing grows with steps. AD modes:
    those of twice differentiable losses.

    Args:
      inner: ``inner(params, inputs, weights) -> scalar``, the training loss.
      outer: ``outer(params, inputs, weights) -> scalar``, the validation loss.
      outer_optimizer: optax transformation for the outer variable, the params.
      inner_optimizer: that for the inner variable, the weights.
      adjoint_optimizer: that for the adjoint; that of the weights if ``None``, as in
        the paper.
      inner_steps: K, how many steps of weights and adjoint make one of the params.

    Returns:
      A ``BilevelDescent``: ``init``, ``directions`` and ``update``, of pytrees. Inputs
      are what the losses take; draw those of the two anew for each step.

    Raises:
      ValueError: if a loss is not callable, an optimizer no optax transformation, or
        ``inner_steps`` no positive int.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from rbpjax import soba
      >>> inner = lambda p, x, w: jnp.sum(0.5 * w**2 - (x + p) * w)  # w* = x + p
      >>> outer = lambda p, y, w: jnp.sum(0.5 * (w - y) ** 2 + 0.5 * p**2)
      >>> slow, fast = optax.sgd(0.1), optax.sgd(0.5)
      >>> descent = soba(inner, outer, outer_optimizer=slow, inner_optimizer=fast)
      >>> state = descent.init(jnp.zeros(1), jnp.zeros(1))
      >>> x, y = jnp.array([1.0]), jnp.array([4.0])  # p* = (y - x) / 2
      >>> step = lambda state, _: (descent.update(state, x, y), None)
      >>> state, _ = jax.lax.scan(step, state, length=200)
      >>> [round(float(u[0]), 3) for u in (state.params, state.weights, state.adjoint)]
      [1.5, 2.5, -1.5]

    References:
      Dagréou et al., "A framework for bilevel optimization that enables stochastic and
      global variance reduction algorithms", NeurIPS 2022, equations 5 to 8 (SOBA),
      https://arxiv.org/abs/2201.13409. Arbel and Mairal, "Amortized Implicit
      Differentiation for Stochastic Bilevel Optimization", ICLR 2022, algorithm 1
      (AmIGO), https://arxiv.org/abs/2111.14580.
    """
    import optax  # half of a second, which ``import rbpjax`` need not take

    is_count = isinstance(inner_steps, int) and not isinstance(inner_steps, bool)
    if not is_count or inner_steps < 1:
        raise ValueError(
            "soba: `inner_steps` must be a Python int of at least 1, a number of steps "
            f"of the weights for each one of the params; got {inner_steps!r}."
        )
    for name, loss in (("inner", inner), ("outer", outer)):
        if not callable(loss):
            raise ValueError(
                f"soba: `{name}` must be a loss, called as {name}(params, inputs, "
                f"weights) -> scalar; got {loss!r}."
            )
    third = inner_optimizer if adjoint_optimizer is None else adjoint_optimizer
    optimizers = {"params": outer_optimizer, "weights": inner_optimizer}
    optimizers["adjoint"] = third
    names = ("outer_optimizer", "inner_optimizer", "adjoint_optimizer")
    for name, optimizer in zip(names, optimizers.values(), strict=True):
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise ValueError(
                f"soba: `{name}` must be an optax transformation, such as "
                f"optax.sgd(1e-2); got {optimizer!r}."
            )

    def init(params: PyTree, weights: PyTree) -> BilevelState:
        values = {"params": params, "weights": weights, "adjoint": weights}
        values = jax.tree.map(jnp.asarray, values)
        values["adjoint"] = jax.tree.map(jnp.zeros_like, values["weights"])
        states = {
            f"{name}_state": optimizers[name].init(value)
            for name, value in values.items()
        }
        return BilevelState(**values, **states)

    def directions(
        state: BilevelState, inner_inputs: PyTree, outer_inputs: PyTree
    ) -> BilevelDirections:
        p, w, u, *_ = state
        slope = lambda p, w: jax.grad(inner, argnums=2)(p, inner_inputs, w)
        of_w, second = jax.vjp(slope, p, w)
        cross, curved = second(u)
        of_p, g = jax.grad(outer, argnums=(0, 2))(p, outer_inputs, w)
        less = lambda a, b: jax.tree.map(jnp.subtract, a, b)
        return BilevelDirections(less(of_p, cross), of_w, less(curved, g))

    def moved(
        state: BilevelState, inner_inputs: PyTree, outer_inputs: PyTree, *names: str
    ) -> BilevelState:
        """One step of these, all by the directions at the same point."""
        moves = directions(state, inner_inputs, outer_inputs)._asdict()
        made = {}
        for name in names:
            value, kept = getattr(state, name), getattr(state, f"{name}_state")
            step, moments = optimizers[name].update(moves[name], kept, value)
            made |= {name: optax.apply_updates(value, step), f"{name}_state": moments}
        return state._replace(**made)

    def update(
        state: BilevelState, inner_inputs: PyTree, outer_inputs: PyTree
    ) -> BilevelState:
        given = inner_inputs, outer_inputs
        if inner_steps > 1:
            alone = lambda _, state: moved(state, *given, "weights", "adjoint")
            state = jax.lax.fori_loop(0, inner_steps - 1, alone, state)
        return moved(state, *given, *optimizers)

    return BilevelDescent(init, directions, update)
