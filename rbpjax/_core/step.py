"""A user's step function, checked and closed: every array that it uses an argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from rbpjax._core import tree
from rbpjax.types import BackwardRule, LinearMap, PyTree, Solution, StepFn

ClosedStep = Callable[[PyTree, PyTree], PyTree]
"""A step function with its parameters in one pytree: (args, h) -> h."""


def close(
    f: StepFn, params: PyTree, inputs: PyTree, h: PyTree
) -> tuple[ClosedStep, PyTree, PyTree]:
    """Full closure conversion: ``(step, args, h)`` with f = step(args, ·).

    f is traced once. All arrays that it closes over, integers and keys included, become
    arguments, without which ``custom_vjp`` could not give them gradients. h is checked
    against f's output, and its leaves made strongly typed arrays.
    """
    h = jax.tree.map(_state_leaf, h)
    if not jax.tree.leaves(h):
        raise ValueError(f"`h0` must have at least one array; got {h!r}.")
    trace = jax.make_jaxpr(f, return_shape=True)
    jaxpr, out = trace(params, inputs, h)
    check_like(out, h, "`f`'s output", "`h0`")
    axes = tree.varying_axes(jaxpr.out_avals)
    if axes - tree.varying_axes(map(jax.typeof, jax.tree.leaves(h))):
        h = tree.vary(h, axes)  # inside shard_map, f's output varies where h did not
        jaxpr, _ = trace(params, inputs, h)
    treedef = jax.tree.structure(h)

    def step(args: PyTree, h: PyTree) -> PyTree:
        consts, params, inputs = args
        call = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr.jaxpr, consts))
        image = call(*jax.tree.leaves((params, inputs, h)))
        return tree.vary_like(jax.tree.unflatten(treedef, image), h)

    return step, (tuple(jaxpr.consts), params, inputs), h


def apply_rule(
    rule: BackwardRule, vjp: LinearMap, cotangent: PyTree, start: PyTree | None = None
) -> Solution:
    """``rule(vjp, cotangent)``, checked to be a solution like the cotangent."""
    if start is not None and not takes_start(rule):
        raise ValueError(
            f"the backward rule {rule!r} takes no start: to go on from an earlier "
            "adjoint, as of a probe, it must be callable as rule(vjp, cotangent, "
            "start). Add the argument, or give no adjoint to start from."
        )
    arguments = (vjp, cotangent) if start is None else (vjp, cotangent, start)
    solution = rule(*arguments)
    return check_solution(solution, cotangent, f"the backward rule {rule!r}")


def takes_start(rule: BackwardRule) -> bool:
    """Whether the rule can be called with a start as third argument."""
    try:
        inspect.signature(rule).bind(None, None, None)
    except TypeError:
        return False
    return True


def check_solution(solution: object, like: PyTree, source: str) -> Solution:
    """``solution`` with array fields, or ValueError if it is not one for ``like``."""
    if not isinstance(solution, Solution):
        raise ValueError(
            f"{source} must return rbpjax.Solution(value, num_steps, residual, "
            f"converged); got {type(solution).__name__}."
        )
    check_like(solution.value, like, f"the value returned by {source}", "the start")
    value, *diagnostics = solution
    return Solution(value, *map(jnp.asarray, diagnostics))


def check_like(x: PyTree, like: PyTree, name: str, like_name: str) -> None:
    """Raises ValueError unless both have the same structure, shapes and dtypes."""
    show = lambda t: jax.tree.map(lambda a: jax.typeof(a).str_short(), t)
    describe = lambda t: jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a)), t)
    try:
        same = describe(x) == describe(like)
        shown = show(x)
    except TypeError:  # a leaf that is no array
        same, shown = False, x
    if not same:
        raise ValueError(
            f"{name} must have the structure, shapes and dtypes of {like_name}; got "
            f"{shown} for {show(like)}. A step that returns (h, output) must select h; "
            "one that promotes the dtype must cast its result back."
        )


def _state_leaf(x: object) -> jax.Array:
    """A leaf of the state as a strongly typed array; ValueError if it is not real."""
    try:
        x = jnp.asarray(x)
    except TypeError:
        raise ValueError(
            f"`h0` must be a pytree of arrays; got a leaf of type {type(x).__name__}. "
            "Put what is not an array into f itself."
        ) from None
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ValueError(
            f"`h0` must be made of floating-point or complex arrays; got {x.dtype}"
            f"{list(x.shape)}. Cast it, or move integers and keys into `inputs`."
        )
    return lax.convert_element_type(x, x.dtype) if x.weak_type else x
