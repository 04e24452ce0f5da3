"""Products with Jacobians, also of functions that have reverse mode alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.extend import core

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
    if not _reverse_alone(f, x):
        return jax.jvp(f, (x,), (x_dot,))
    y, vjp = jax.vjp(f, x)
    _, back = jax.vjp(lambda u: vjp(u)[0], jax.tree.map(jnp.zeros_like, y))
    like = lambda u, v: jnp.asarray(v, jnp.result_type(u))
    return y, back(jax.tree.map(like, x, x_dot))[0]


def _reverse_alone(f: Callable[[PyTree], PyTree], x: PyTree) -> bool:
    """Whether there is a ``custom_vjp`` in f."""
    jaxpr = jax.make_jaxpr(lambda x: f(x))(x).jaxpr
    return any("custom_vjp" in equation.primitive.name for equation in _all(jaxpr))


def _all(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """All equations, those of functions inside them too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda v: isinstance(v, core.Jaxpr | core.ClosedJaxpr),
        ):
            if isinstance(value, core.ClosedJaxpr):
                value = value.jaxpr
            if isinstance(value, core.Jaxpr):
                yield from _all(value)
