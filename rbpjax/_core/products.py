"""Products with Jacobians, also of functions that have reverse mode alone."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rbpjax._core.step import has_products
from rbpjax.types import PyTree


def jvp(
    f: Callable[[PyTree], PyTree], x: PyTree, x_dot: PyTree
) -> tuple[PyTree, PyTree]:
    """``jax.jvp`` of one argument, and of any f that can be differentiated twice.

    Where f holds a function with a backward pass of its own (``custom_vjp``, as
    ``rbp_solve`` is), the product is the transpose of the transpose: u ↦ uᵀJ is
    linear, and its gradient in u along x_dot is J x_dot, by reverse mode alone. Costs
    one trace of f, and there two VJPs in the place of a JVP.
    """
    if has_products(f, x):
        return jax.jvp(f, (x,), (x_dot,))
    y, vjp = jax.vjp(f, x)
    _, back = jax.vjp(lambda u: vjp(u)[0], jax.tree.map(jnp.zeros_like, y))
    like = lambda u, v: jnp.asarray(v, jnp.result_type(u))
    return y, back(jax.tree.map(like, x, x_dot))[0]
