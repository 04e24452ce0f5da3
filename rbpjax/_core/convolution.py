"""Convolutions with the channels last, the order in which loops run them fast.

XLA for CPU brings a convolution to the order of its fast routine (images as batch,
space, channels; kernels as space, inputs, outputs), but not inside loops: there any
other order falls back to scalar code, 12 to 57 times slower. The product with Jᵀ of
a convolution is one with inputs and outputs of its kernel exchanged, and so always in
another order. Here the exchange is written out: of the kernel once, outside the loop,
of the image in each step. Everything else is left as it is.

Loops that are themselves differentiated have two more convolutions in every step: the
cotangent with the kernel, and the image with the cotangent, which is the gradient of
the kernel. JAX derives both from the tangent of the convolution, which is given here in
the order in which they come out with the channels last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

from rbpjax.types import PyTree

Known = Callable[[], jax.Array] | None
"""How to compute a value that the state does not reach, once; None if it does."""


def channels_last(
    f: Callable[[PyTree], PyTree], like: PyTree, *, differentiated: bool = False
) -> Callable[[PyTree], PyTree]:
    """``f`` for use in a loop, its convolutions with the channels last.

    ``like`` is an argument of f. The same values but for the order of sums inside a
    convolution; f itself, where it has no convolution to reorder. Convolutions are
    found in f and in what it calls under ``jit``; those inside its loops, conditionals
    and custom derivatives are left alone. Costs one trace of f.
    """
    closed, out = jax.make_jaxpr(f, return_shape=True)(like)
    chosen = _is_plain if differentiated else _is_slow
    if not any(map(chosen, _equations(closed.jaxpr))):
        return f
    kernels: list[jax.Array | None] = []
    consts = [lambda c=c: c for c in closed.consts]
    arguments = [None] * len(closed.jaxpr.invars)
    _order_kernels(closed.jaxpr, consts, arguments, kernels, chosen)
    convolve = _convolve_differentiably if differentiated else _convolve_if_known

    def reordered(x: PyTree) -> PyTree:
        values = jax.tree.leaves(x)
        each = lambda equation, inputs, kernels=iter(kernels): (
            [convolve(equation, inputs, next(kernels))]
            if chosen(equation)
            else _run(equation, inputs)
        )
        made = _evaluate(closed.jaxpr, closed.consts, values, each)
        return jax.tree.unflatten(jax.tree.structure(out), made)

    return reordered


def _equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """All equations, those of plain jits in their place."""
    for equation in jaxpr.eqns:
        if (inner := _inlined(equation)) is not None:
            yield from _equations(inner.jaxpr)
        else:
            yield equation


def _inlined(equation: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The function of a jit without shardings of its own, else None."""
    if equation.primitive.name not in ("jit", "pjit"):
        return None
    shardings = (*equation.params["in_shardings"], *equation.params["out_shardings"])
    plain = all(type(s).__name__ == "UnspecifiedValue" for s in shardings)
    return equation.params["jaxpr"] if plain else None


def _is_plain(equation: core.JaxprEqn) -> bool:
    """Whether the equation is a convolution, not one of groups of the batch."""
    name = equation.primitive.name
    return name == "conv_general_dilated" and equation.params["batch_group_count"] == 1


def _is_slow(equation: core.JaxprEqn) -> bool:
    """Whether the equation is a convolution with its channels elsewhere."""
    if not _is_plain(equation):
        return False
    numbers = tuple(equation.params["dimension_numbers"])
    return numbers != tuple(_numbers(len(numbers[0])))


def _numbers(rank: int) -> lax.ConvDimensionNumbers:
    """Images as (batch, *space, channel), kernels as (*space, input, output)."""
    space = tuple(range(1, rank - 1))
    images = (0, rank - 1, *space)
    kernels = (rank - 1, rank - 2, *range(rank - 2))
    return lax.ConvDimensionNumbers(images, kernels, images)


def _order_kernels(
    jaxpr: core.Jaxpr,
    consts: Sequence[Known],
    arguments: Sequence[Known],
    kernels: list[jax.Array | None],
    chosen: Callable[[core.JaxprEqn], bool],
) -> list[Known]:
    """Appends each chosen convolution's ordered kernel, None if the state reaches it.

    Returns what is known of the outputs. Only what leads to a kernel is computed.
    """
    scope = dict(zip(jaxpr.constvars, consts, strict=True))
    scope.update(zip(jaxpr.invars, arguments, strict=True))
    look = lambda atom: (
        (lambda: atom.val) if isinstance(atom, core.Literal) else scope[atom]
    )
    for equation in jaxpr.eqns:
        inputs = [look(atom) for atom in equation.invars]
        inner = _inlined(equation)
        if inner is not None:
            given = [lambda c=c: c for c in inner.consts]
            outputs = _order_kernels(inner.jaxpr, given, inputs, kernels, chosen)
        elif all(known is not None for known in inputs):
            run = cache(partial(_run_known, equation, inputs))
            outputs = [
                lambda n=n, run=run: run()[n] for n in range(len(equation.outvars))
            ]
        else:
            outputs = [None] * len(equation.outvars)
        if chosen(equation):
            known = inputs[1]
            kernels.append(None if known is None else _ordered(equation, known()))
        scope.update(zip(equation.outvars, outputs, strict=True))
    return [look(atom) for atom in jaxpr.outvars]


def _evaluate(
    jaxpr: core.Jaxpr,
    consts: Sequence[jax.Array],
    arguments: Sequence[jax.Array],
    each: Callable[[core.JaxprEqn, list[jax.Array]], list[jax.Array]],
) -> list[jax.Array]:
    """Runs the program, with ``each`` for its equations and those of plain jits."""
    scope = dict(zip(jaxpr.constvars, consts, strict=True))
    scope.update(zip(jaxpr.invars, arguments, strict=True))
    look = lambda atom: atom.val if isinstance(atom, core.Literal) else scope[atom]
    for equation in jaxpr.eqns:
        inputs = [look(atom) for atom in equation.invars]
        inner = _inlined(equation)
        if inner is not None:
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs, each)
        else:
            outputs = each(equation, inputs)
        scope.update(zip(equation.outvars, outputs, strict=True))
    return [look(atom) for atom in jaxpr.outvars]


def _run_known(equation: core.JaxprEqn, inputs: Sequence[Known]) -> list[jax.Array]:
    """The outputs of one equation, of inputs that are computed when asked for."""
    return _run(equation, [known() for known in inputs if known is not None])


def _ordered(equation: core.JaxprEqn, kernel: jax.Array) -> jax.Array:
    """The kernel as (*space, input, output)."""
    outputs, inputs, *space = equation.params["dimension_numbers"][1]
    return lax.transpose(kernel, (*space, inputs, outputs))


def _convolve_if_known(
    equation: core.JaxprEqn, inputs: list[jax.Array], kernel: jax.Array | None
) -> jax.Array:
    """The convolution of an image in its own order with an ordered kernel, if any."""
    if kernel is None:
        return _run(equation, inputs)[0]
    return _convolve(equation, lax.conv_general_dilated, inputs[0], kernel)


def _convolve_differentiably(
    equation: core.JaxprEqn, inputs: list[jax.Array], kernel: jax.Array | None
) -> jax.Array:
    """The same, whose derivatives in reverse mode have the channels last, too."""
    if kernel is None:
        kernel = _ordered(equation, inputs[1])
    return _convolve(equation, _differentiable, inputs[0], kernel)


def _convolve(
    equation: core.JaxprEqn,
    convolve: Callable[..., jax.Array],
    image: jax.Array,
    kernel: jax.Array,
) -> jax.Array:
    """``convolve`` of an image in the equation's order with an ordered kernel."""
    lhs, _, out = equation.params["dimension_numbers"]  # (batch, channel, *space)
    last = lambda batch, channel, *space: (batch, *space, channel)
    params = equation.params | {"dimension_numbers": _numbers(len(lhs))}
    made = convolve(lax.transpose(image, last(*lhs)), kernel, **params)
    return lax.transpose(made, tuple(np.argsort(last(*out)).tolist()))


def _differentiable(image: jax.Array, kernel: jax.Array, **params: Any) -> jax.Array:
    """The convolution with the channels last, its tangents in orders of their own.

    The transpose of a convolution exchanges inputs and outputs of the kernel, that with
    respect to the kernel batch and channels of the image: exchanged beforehand, they
    come out as (batch, *space, channel) and (*space, input, output).
    """
    plain = partial(lax.conv_general_dilated, **params)
    convolve = jax.custom_jvp(plain)
    rank = image.ndim
    images, kernels, _ = _numbers(rank)
    swap = lambda first, second, *space: (second, first, *space)
    of_images = lax.ConvDimensionNumbers(images, swap(*kernels), images)
    of_kernels = lax.ConvDimensionNumbers(swap(*images), swap(*images), swap(*kernels))
    exchange = (rank - 1, *range(1, rank - 1), 0)  # of batch and channels
    first = (rank - 2, *range(rank - 2), rank - 1)  # inputs, or the batch, to the front

    def rule(primals: tuple, tangents: tuple) -> tuple:
        """The convolution and its tangent."""
        (image, kernel), (dimage, dkernel) = primals, tangents
        made = convolve(image, kernel)
        total = jnp.zeros_like(made)
        if not isinstance(dimage, SymbolicZero):
            swapped = jnp.swapaxes(kernel, -1, -2)
            total = plain(dimage, swapped, dimension_numbers=of_images)
        if not isinstance(dkernel, SymbolicZero):
            image, dkernel = image.transpose(exchange), dkernel.transpose(first)
            change = plain(image, dkernel, dimension_numbers=of_kernels)
            total = total + change.transpose(first)
        return made, total

    convolve.defjvp(rule, symbolic_zeros=True)
    return convolve(image, kernel)


def _run(equation: core.JaxprEqn, inputs: Sequence[jax.Array]) -> list[jax.Array]:
    """The outputs of one equation."""
    params = equation.primitive.get_bind_params(equation.params)
    # JAX up to 0.9 gives the functions inside the equation apart from the rest.
    functions, params = params if isinstance(params, tuple) else ((), params)
    made = equation.primitive.bind(*functions, *inputs, **params)
    return list(made) if equation.primitive.multiple_results else [made]
