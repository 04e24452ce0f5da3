"""Training as a fixed point: one optimizer update as a step function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

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
