"""What depends on what in a cell, read off its program: examples, and parameters.

Both questions are asked while tracing, of shapes alone. Where the program does not
show the answer, it is no.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from rbpjax.types import PyTree

MIXED = -1
"""The axis of a value whose rows depend on several examples, or may do so."""

Axis = int | None
"""Where a value's axis of examples is; None if it depends on no example at all."""

_ELEMENTWISE = frozenset(
    (
        "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp "
        "complex conj convert_element_type copy copy_p cos cosh digamma div eq erf "
        "erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma "
        "log log1p logistic lt max min mul name ne neg nextafter not or pow real "
        "reduce_precision rem round rsqrt select_n sign sin sinh sqrt square "
        "pcast pvary stop_gradient sub tan tanh xor"
    ).split()
)
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "custom_lin": "call_jaxpr",
}


def rows_stay_apart(
    step: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]], noise: PyTree, h: PyTree
) -> bool:
    """Whether row i of the noise and of the state reach loss i and state row i only.

    ``step(noise, h) -> (losses, h)``; rows are along the first axis. True is a proof;
    False may be a program that is not understood.
    """
    closed = jax.make_jaxpr(step)(noise, h)
    count = len(jax.tree.leaves(noise))
    states: list[Axis] = [None] * len(jax.tree.leaves(h))
    while True:
        losses, *after = _axes(closed.jaxpr, [0] * count + states)
        joined = list(map(_join, states, after))
        if joined == states:
            return losses in (0, None) and all(s in (0, None) for s in states)
        states = joined


def _join(*axes: Axis) -> Axis:
    """The axis of what depends on all of these."""
    found = {axis for axis in axes if axis is not None}
    return None if not found else found.pop() if len(found) == 1 else MIXED


def _axes(jaxpr: core.Jaxpr, inputs: Sequence[Axis]) -> list[Axis]:
    """The axes of a program's outputs, given those of its inputs."""
    scope: dict[Any, Axis] = dict(zip(jaxpr.invars, inputs, strict=True))
    look = lambda atom: None if isinstance(atom, core.Literal) else scope.get(atom)
    for equation in jaxpr.eqns:
        axes = list(map(look, equation.invars))
        out = [None] * len(equation.outvars)
        if any(axis is not None for axis in axes):
            out = [MIXED] * len(out) if MIXED in axes else _rule(equation, axes)
        scope.update(zip(equation.outvars, out, strict=True))
    return list(map(look, jaxpr.outvars))


def _rule(equation: core.JaxprEqn, axes: list[Axis]) -> list[Axis]:
    """The axes of an equation's outputs; ``MIXED`` for what is not understood."""
    name, params = equation.primitive.name, equation.params
    avals: list[Any] = [atom.aval for atom in (*equation.invars, *equation.outvars)]
    shapes = [tuple(aval.shape) for aval in avals[: len(axes)]]
    out = tuple(avals[len(axes)].shape)
    every = lambda axis: [axis] * len(equation.outvars)
    axis, shape = axes[0], shapes[0]
    if name in _CALLS:
        inner = params[_CALLS[name]]
        return _axes(getattr(inner, "jaxpr", inner), axes)
    if name in _ELEMENTWISE:
        return every(_join(*axes))
    if name == "dot_general":
        return [_product(params["dimension_numbers"], shapes, axes)]
    if name == "concatenate":
        joined = _join(*axes)
        return [MIXED if joined == params["dimension"] else joined]
    if name == "scan":
        return _scanned(params, axes)
    if name == "cond":
        branches = [_axes(b.jaxpr, axes[1:]) for b in params["branches"]]
        return [
            MIXED if axis is not None else _join(*b)
            for b in zip(*branches, strict=True)
        ]
    if axis is None or any(a is not None for a in axes[1:]):
        return every(MIXED)
    size = shape[axis]
    if name == "broadcast_in_dim":
        new = params["broadcast_dimensions"][axis]
        return [new if out[new] == size else MIXED]
    if name == "reshape":
        before = math.prod(shape[:axis])
        fits = [i for i, n in enumerate(out) if n == size]
        found = [i for i in fits if math.prod(out[:i]) == before]
        return [found[0] if found else MIXED]
    if name == "transpose":
        return [params["permutation"].index(axis)]
    if name == "squeeze":
        return [axis - sum(d < axis for d in params["dimensions"])]
    if name.startswith("reduce_") or name in ("argmax", "argmin"):
        gone = params["axes"]
        return every(MIXED if axis in gone else axis - sum(d < axis for d in gone))
    if name.startswith("cum"):
        return [MIXED if params["axis"] == axis else axis]
    if name in ("slice", "dynamic_slice", "pad"):
        return [axis if out[axis] == size else MIXED]
    if name == "rev":
        return [MIXED if axis in params["dimensions"] else axis]
    if name == "split":
        return every(MIXED if params["axis"] == axis else axis)
    if name == "sort":
        return every(MIXED if params["dimension"] == axis else axis)
    if name == "conv_general_dilated":
        images, _, results = params["dimension_numbers"]
        alone = params["batch_group_count"] == 1 and images[0] == axis
        return [results[0] if alone else MIXED]
    return every(MIXED)


def _product(numbers: Any, shapes: Sequence[tuple], axes: Sequence[Axis]) -> Axis:
    """Where the examples are in a product of two arrays."""
    contracted, batched = numbers
    found: list[Axis] = []
    for side, axis in enumerate(axes):
        if axis is None:
            continue
        if axis in contracted[side]:
            return MIXED
        if axis in batched[side]:
            found.append(list(batched[side]).index(axis))
            continue
        taken = (*contracted[side], *batched[side])
        free = [d for d in range(len(shapes[side])) if d not in taken]
        left = len(shapes[0]) - len(contracted[0]) if side else len(batched[0])
        found.append(left + free.index(axis))
    return _join(*found)


def _scanned(params: dict[str, Any], axes: list[Axis]) -> list[Axis]:
    """Through a scan: its carry until nothing changes, time ahead of the stacked."""
    consts, carries = params["num_consts"], params["num_carry"]
    fixed, carry = axes[:consts], axes[consts : consts + carries]
    inner = lambda a: None if a is None else MIXED if a == 0 else a - 1
    steps = list(map(inner, axes[consts + carries :]))
    while True:
        out = _axes(params["jaxpr"].jaxpr, [*fixed, *carry, *steps])
        joined = list(map(_join, carry, out[:carries]))
        if joined == carry:
            stacked = (a if a in (None, MIXED) else a + 1 for a in out[carries:])
            return [*carry, *stacked]
        carry = joined


def beside_nodes(
    cell: Callable, params: PyTree, inputs: PyTree, h: PyTree, nodes: PyTree
) -> list[str]:
    """The paths of the parameters that reach state or output without any node.

    A way is cut where noise is added, and at the nodes themselves.
    """
    call = lambda p, n, x, h: cell(p, x, h, n)
    traced = jax.make_jaxpr(call, return_shape=True)(params, nodes, inputs, h)
    closed, shape = traced
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(params)]
    shown = len(jax.tree.leaves(shape[2]))
    rest = len(closed.jaxpr.invars) - len(paths) - len(jax.tree.leaves(nodes))
    marks = [frozenset({path}) for path in paths]
    marks += [_NOISE] * len(jax.tree.leaves(nodes)) + [frozenset()] * rest
    ends = closed.jaxpr.outvars
    out = _ways(closed.jaxpr, marks, set(map(id, ends[len(ends) - shown :])))
    return sorted(frozenset().union(*out[: len(out) - shown]) - _NOISE)


_NOISE = frozenset({""})
"""The mark of noise that nothing was done with yet."""


def _ways(jaxpr: core.Jaxpr, marks: list[frozenset], cut: set[int]) -> list[frozenset]:
    """Which parameters reach each output, past no variable in ``cut``."""
    scope = dict(zip(jaxpr.invars, marks, strict=True))
    look = lambda atom: (
        frozenset() if isinstance(atom, core.Literal) else scope.get(atom, frozenset())
    )
    for equation in jaxpr.eqns:
        ins, name = list(map(look, equation.invars)), equation.primitive.name
        if name in _CALLS:
            inner = equation.params[_CALLS[name]]
            inner = getattr(inner, "jaxpr", inner)
            pairs = zip(equation.outvars, inner.outvars, strict=True)
            inside = {id(v) for outer, v in pairs if id(outer) in cut}
            out = _ways(inner, ins, inside)
        else:
            same = name in ("convert_element_type", "reshape", "copy", "pcast", "pvary")
            added = _NOISE in ins and not same
            lost = added or name == "stop_gradient"
            found = frozenset() if lost else frozenset().union(*ins)
            out = [found] * len(equation.outvars)
        kept = (
            frozenset() if id(v) in cut else mark
            for v, mark in zip(equation.outvars, out, strict=True)
        )
        scope.update(zip(equation.outvars, kept, strict=True))
    return list(map(look, jaxpr.outvars))
