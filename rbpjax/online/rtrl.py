"""Real-time recurrent learning: the exact influence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from rbpjax._core.sharding import vary_like
from rbpjax._core.step import floats
from rbpjax.online.estimator import (
    Carry,
    Estimator,
    LossFn,
    OnlineOutput,
    checked,
    no_noise,
    observe,
    parts,
    start,
)
from rbpjax.types import PyTree, StepFn


def rtrl(f: StepFn, loss: LossFn) -> Estimator:
    """Streams exact gradients by carrying the whole influence matrix.

        G ← J G + F,    gradient = ∂loss/∂θ + δ G

    Exact: at fixed parameters the gradients, summed over time, are those of the
    unrolled loss. While the parameters change, G mixes Jacobians of old and new
    parameters, and the gradient differs from both by O(step size).

    Cost: with n units and P parameters, n VJPs and one n × n by n × P product a step,
    time O(n² P), which is O(n⁴) for a dense recurrent layer, and memory n P = O(n³),
    whatever the length of the run. It is the oracle for small networks, not a method
    for large ones. Works under ``jit``, ``vmap`` and ``scan``. A run can be
    differentiated in forward and reverse mode; reverse mode stores its history.

    Args:
      f: step function ``f(params, x, h) -> h``; any pytrees.
      loss: ``loss(params, h, y) -> scalar`` at the new state. It may share ``params``
        with ``f``; its direct gradient is included.

    Returns:
      An ``Estimator``. Its influence is a pytree like ``params`` whose leaves have a
      leading axis over the units of ``h0``, raveled, complex ones as ``Parts``; it
      needs no noise.

    Raises:
      ValueError: from ``init`` and ``step``; see ``Estimator``.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import online
      >>> f = lambda a, x, h: a * h + x  # h₂ = a + 1 from h₀ = 0, x = 1
      >>> est = online.rtrl(f, lambda a, h, y: h)
      >>> carry = est.init(jnp.array(0.5), jnp.array(0.0))
      >>> for _ in range(2):
      ...     carry, out = est.step(jnp.array(0.5), carry, 1.0, None, ())
      >>> float(carry.h), float(out.grads)
      (1.5, 1.0)

    References:
      Williams, Zipser, "A Learning Algorithm for Continually Running Fully Recurrent
      Neural Networks", Neural Computation 1, 1989. The recursion as in Ollivier,
      Tallec, Charpiat, https://arxiv.org/abs/1507.07680.
    """

    def init(params: PyTree, h0: PyTree) -> Carry:
        h0 = start(params, h0)
        units = ravel_pytree(parts(h0))[0].size
        influence = jax.tree.map(
            lambda p: jnp.zeros((units, *jnp.shape(p)), jnp.result_type(p)),
            floats(params),
        )
        return Carry(h0, influence)

    def step(
        params: PyTree, carry: Carry, x: PyTree, y: PyTree, noise: PyTree
    ) -> tuple[Carry, OnlineOutput]:
        del noise
        here = observe(f, loss, params, carry.h, x, y)
        flat_h, unravel = ravel_pytree(here.h)
        out, vjp = jax.vjp(here.f, here.params, here.h)
        basis = jax.vmap(unravel)(jnp.eye(flat_h.size, dtype=flat_h.dtype))
        basis = vary_like(basis, out)
        immediate, rows = jax.vmap(vjp)(basis)
        jacobian = jax.vmap(lambda row: ravel_pytree(row)[0])(rows)

        influence = jax.tree.map(
            lambda g, new: jnp.tensordot(jacobian, g, 1).astype(g.dtype) + new,
            carry.influence,
            immediate,
        )
        delta, _ = ravel_pytree(here.delta)
        total = jax.tree.map(
            lambda g: jnp.tensordot(delta, g, 1).astype(g.dtype), influence
        )
        out = OnlineOutput(here.loss, optax.tree.add(here.direct, total))
        return Carry(here.h_next, influence), out

    return checked(init, no_noise, step)
