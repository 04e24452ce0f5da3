"""A user's step function, checked and closed: every array that it uses an argument."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from rbpjax._core import sharding
from rbpjax._core.reuse import Program
from rbpjax.types import PyTree, Solution, StepFn

ClosedStep = Callable[[PyTree, PyTree], PyTree]
"""A step function with its parameters in one pytree: (args, h) -> h."""


class Closed(NamedTuple):
    """A function with all arrays that it closes over as its first argument.

    Attributes:
      call: ``call(consts, *args)``, equivalent to the function of ``args``.
      consts: those arrays, integers and keys included.
      out: what the function returns, as a pytree of shapes and dtypes.
      varies: the ``shard_map`` axes over which what it returns varies.
      program: what ``call`` runs.
    """

    call: Callable[..., PyTree]
    consts: tuple
    out: PyTree
    varies: frozenset
    program: Program


def convert(f: Callable[..., PyTree], *examples: PyTree) -> Closed:
    """Full closure conversion of ``f`` for arguments like ``examples``; traces it once.

    Without it ``custom_vjp`` could not give the arrays that f closes over gradients.
    Leaves that are no arrays (functions, strings) are f's as they are in the examples;
    ``call`` may be given None in their place.
    """
    leaves, treedef = jax.tree.flatten(examples)
    arrays = [leaf for leaf in leaves if is_array(leaf)]

    # A function of its own for each trace: JAX remembers traces by function, and what f
    # reads from outside may have changed since.
    def of_arrays(arrays: list) -> PyTree:
        rest = iter(arrays)
        filled = [next(rest) if is_array(leaf) else leaf for leaf in leaves]
        return f(*jax.tree.unflatten(treedef, filled))

    jaxpr, out = jax.make_jaxpr(of_arrays, return_shape=True)(arrays)

    def call(consts: tuple, *args: PyTree) -> PyTree:
        run = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr.jaxpr, consts))
        values = run(*filter(is_array, jax.tree.leaves(args)))
        return jax.tree.unflatten(jax.tree.structure(out), values)

    varies = sharding.varying_axes(jaxpr.out_avals)
    return Closed(call, tuple(jaxpr.consts), out, varies, Program(jaxpr.jaxpr))


def close(
    f: StepFn, params: PyTree, inputs: PyTree, h: PyTree
) -> tuple[ClosedStep, PyTree, PyTree]:
    """``(step, args, h)`` with f = step(args, ·), all arrays that f uses in ``args``.

    h is checked against f's output, and its leaves made strongly typed arrays. In
    ``args`` None stands for the leaves of params and inputs that are no arrays.
    """
    h = as_state(h)
    closed = convert(f, params, inputs, h)
    _check_step(closed.out, h)
    kinds = list(map(jax.typeof, jax.tree.leaves(h)))
    varies = closed.varies | sharding.varying_axes(kinds)
    if any(varies - sharding.varying_axes([kind]) for kind in kinds):
        # Inside shard_map, f's output varies where h did not, or leaves differ.
        h = sharding.vary(h, varies)
        closed = convert(f, params, inputs, h)

    step = _Step(closed.program, jax.tree.structure(h), closed.call)
    return step, (closed.consts, only_arrays(params), only_arrays(inputs)), h


@dataclasses.dataclass(frozen=True)
class _Step:
    """The step function of a program; equal to those that compute the same.

    Attributes:
      program: what it runs.
      state: the structure of the state.
      call: how it runs it; not compared.
    """

    program: Program
    state: jax.tree_util.PyTreeDef
    call: Callable[..., PyTree] = dataclasses.field(compare=False)

    def __call__(self, args: PyTree, h: PyTree) -> PyTree:
        consts, params, inputs = args
        return sharding.vary_like(self.call(consts, params, inputs, h), h)


def select_state(f: Callable[..., PyTree]) -> StepFn:
    """The step function of an ``f`` that returns (h, aux)."""
    return lambda params, inputs, h: _state_and_aux(f, params, inputs, h)[0]


def with_aux(
    f: Callable[..., PyTree], params: PyTree, inputs: PyTree, solution: Solution
) -> Solution:
    """The solution with aux, of one evaluation more of an ``f`` -> (h, aux)."""
    _, aux = _state_and_aux(f, params, inputs, solution.value)
    return solution._replace(aux=aux)


def _state_and_aux(
    f: Callable[..., PyTree], params: PyTree, inputs: PyTree, h: PyTree
) -> tuple[PyTree, PyTree]:
    """What an ``f`` with ``has_aux`` returns, or ValueError if it is no pair."""
    made = f(params, inputs, h)
    if not (isinstance(made, tuple) and len(made) == 2):
        raise ValueError(
            "`f` must return a pair (h, aux) where has_aux=True; got "
            f"{type(made).__name__}. Return (h, aux), or leave has_aux out."
        )
    return made


def has_products(step: Callable[[PyTree], PyTree], h: PyTree) -> bool:
    """Whether products with the step's J can be had.

    Not where it holds a function with a backward pass of its own. (A callback has none
    either, but may stand where nothing is differentiated: JAX says so itself.)
    """
    names = _primitives(jax.make_jaxpr(lambda h: step(h))(h).jaxpr)
    return not any(map(_has_own_backward, names))


def has_sure_products(step: Callable[[PyTree], PyTree], h: PyTree) -> bool:
    """Whether they can be had for certain: there is no callback either."""
    names = _primitives(jax.make_jaxpr(lambda h: step(h))(h).jaxpr)
    return not any(
        _has_own_backward(name) or name in ("pure_callback", "io_callback")
        for name in names
    )


def _has_own_backward(name: str) -> bool:
    return name.startswith("custom_vjp_call")


def _primitives(jaxpr: core.Jaxpr) -> Iterator[str]:
    """The names of all primitives, also of nested functions."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        if eqn.primitive.name.startswith("custom_jvp_call"):
            continue  # its derivative is given
        for param in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(param, "jaxpr", param)
            if hasattr(inner, "eqns"):
                yield from _primitives(inner)


def as_state(h: PyTree, name: str = "h0", *, mixed: bool = False) -> PyTree:
    """The state with strongly typed arrays for leaves; ValueError if it is none.

    With ``mixed`` integers and keys may stand beside the floating-point leaves.
    """
    h = jax.tree.map(lambda leaf: _state_leaf(leaf, name, mixed), h)
    if not jax.tree.leaves(h):
        raise ValueError(f"`{name}` must have at least one array; got {h!r}.")
    return h


def check_like(
    x: PyTree,
    like: PyTree,
    name: str,
    like_name: str,
    remedy: str = "",
) -> None:
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
            f"{shown} for {show(like)}.{remedy and ' '}{remedy}"
        )


def _check_step(out: PyTree, h: PyTree) -> None:
    """Raises ValueError unless f's output is like the state, with the line to write."""
    remedy = "A step that returns (h, output) must select h, or say has_aux=True."
    if jax.tree.structure(out) == jax.tree.structure(h):
        pairs = list(zip(jax.tree.leaves(out), jax.tree.leaves(h), strict=True))
        if all(a.shape == b.shape for a, b in pairs):  # the dtype alone
            one = jax.tree.structure(h) == jax.tree.structure(0)
            start, back = (
                (f"h0.astype('{out.dtype}')", "return new.astype(h.dtype)")
                if one
                else (
                    "jax.tree.map(lambda a, b: a.astype(b.dtype), h0, "
                    "f(params, inputs, h0))",
                    "return jax.tree.map(lambda a, b: a.astype(b.dtype), new, h)",
                )
            )
            remedy = (
                "f changes the dtype. To solve in that of its output, start from "
                f"`{start}`; to solve in that of h0, cast at the end of f: `{back}`."
            )
    check_like(out, h, "`f`'s output", "`h0`", remedy)


def is_array(x: object) -> bool:
    """Whether JAX takes ``x`` for an array: Python numbers and keys, no functions."""
    try:
        jax.typeof(x)
    except TypeError:
        return False
    return True


def only_arrays(tree: PyTree) -> PyTree:
    """``tree`` with None in place of the leaves that are no arrays."""
    return jax.tree.map(lambda x: x if is_array(x) else None, tree)


def floats(tree: PyTree) -> PyTree:
    """``tree`` with None in place of the leaves that cannot be differentiated."""
    return jax.tree.map(lambda x: x if _is_float(x) else None, tree)


def others(tree: PyTree) -> PyTree:
    """``tree`` with None in place of the leaves that can be differentiated."""
    return jax.tree.map(lambda x: None if _is_float(x) else x, tree)


def merge(floating: PyTree, tree: PyTree) -> PyTree:
    """Puts the leaves of ``floating`` in their places in ``tree``."""
    pick = lambda a, b: b if a is None else a
    return jax.tree.map(pick, floating, tree, is_leaf=lambda x: x is None)


def _is_float(x: object) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _state_leaf(x: object, name: str, mixed: bool) -> jax.Array:
    """A leaf of the state as a strongly typed array; ValueError if it is not real."""
    try:
        x = jnp.asarray(x)
    except TypeError:
        raise ValueError(
            f"`{name}` must be a pytree of arrays; got a leaf of type "
            f"{type(x).__name__}. Put what is not an array into f itself."
        ) from None
    if not mixed and not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ValueError(
            f"`{name}` must be made of floating-point or complex arrays; got {x.dtype}"
            f"{list(x.shape)}. Cast it, or move integers and keys into `inputs`."
        )
    # Keys have no weak type.
    return lax.convert_element_type(x, x.dtype) if getattr(x, "weak_type", 0) else x
