"""What a step computes without the state is computed once, outside the loops.

A step function written for a reader symmetrizes its weights, divides them by their
norm, draws its dropout mask or multiplies its inputs by a matrix each time it is
called. None of this depends on h. XLA repeats it in every step of a loop, at
the cost of a singular value decomposition a step, say. Here the traced step is split in
two: the operations that h does not reach, evaluated once, and the rest, which takes
their results as arguments. Gradients flow through both, by ordinary differentiation of
the first part. Convolutions are brought to the order that loops run fast (layout.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
from jax.extend import core

from rbpjax._core import sharding
from rbpjax._core.convolution import channels_last
from rbpjax._core.step import ClosedStep
from rbpjax.types import LinearMap, PyTree

# Moved out, these would only be larger to keep and to read than they are to repeat.
_FREE = frozenset(
    {
        "broadcast_in_dim",
        "copy",
        "expand_dims",
        "iota",
        "pcast",
        "pvary",
        "reshape",
        "slice",
        "squeeze",
        "transpose",
    }
)


class _Operation(NamedTuple):
    """A function of arrays, which are named by numbers unique in the program."""

    run: Callable[..., Sequence[jax.Array]]
    inputs: tuple[int | core.Literal, ...]
    outputs: tuple[int, ...]
    free: bool = False
    pure: bool = True


def hoist(step: ClosedStep, args: PyTree, h: PyTree) -> tuple[ClosedStep, PyTree]:
    """``(step, args)``, equivalent, with all that h does not reach moved into args.

    What has a side effect stays where it is, and so does what is free in a loop, such
    as a broadcast or a transposition. Nested ``jax.jit`` is seen through; other nested
    functions (scans, conditionals, custom derivatives) are moved whole or not at all.
    The new args are an opaque tuple of arrays. The same pair comes back if there is
    nothing to move.
    """
    leaves = (*jax.tree.leaves(args), *jax.tree.leaves(h))
    jaxpr = jax.make_jaxpr(step)(args, h)
    program = _Program(jaxpr)
    first = len(leaves) - len(jax.tree.leaves(h))
    moved, kept, crossing = program.split(set(program.inputs[first:]))
    if not moved:
        return step, args
    known = {**program.constants, **dict(zip(program.inputs, leaves, strict=True))}
    _evaluate(moved, known)
    treedef = jax.tree.structure(h)

    def rest(crossed: PyTree, h: PyTree) -> PyTree:
        values = dict(zip(crossing, crossed, strict=True))
        values |= zip(program.inputs[first:], jax.tree.leaves(h), strict=True)
        _evaluate(kept, values)
        image = [_read(values, name) for name in program.outputs]
        return sharding.vary_like(jax.tree.unflatten(treedef, image), h)

    return rest, tuple(known[name] for name in crossing)


def hoist_linear(linear: LinearMap, like: PyTree) -> LinearMap:
    """The same map for use in a loop: what its argument does not reach is done here."""
    step, saved = hoist(lambda _, v: linear(v), (), like)
    return partial(step, saved)


class _Program:
    """A jaxpr as one flat list of operations."""

    def __init__(self, jaxpr: core.ClosedJaxpr) -> None:
        self.count = 0
        self.operations: list[_Operation] = []
        scope: dict[core.Var, int | core.Literal] = {}
        self.constants = dict(
            zip(self._new(scope, jaxpr.jaxpr.constvars), jaxpr.consts, strict=True)
        )
        self.inputs = self._new(scope, jaxpr.jaxpr.invars)
        self.outputs = self._inline(jaxpr.jaxpr, scope)

    def _new(self, scope: dict, variables: Iterable[core.Var]) -> tuple[int, ...]:
        """Fresh names for ``variables``."""
        made = []
        for variable in variables:
            scope[variable] = self.count
            made.append(self.count)
            self.count += 1
        return tuple(made)

    def _inline(self, jaxpr: core.Jaxpr, scope: dict) -> tuple[int | core.Literal, ...]:
        """Appends the operations of ``jaxpr``; returns the names of its outputs."""
        name = lambda atom: atom if isinstance(atom, core.Literal) else scope[atom]
        for equation in jaxpr.eqns:
            inputs = tuple(map(name, equation.invars))
            if _is_plain_jit(equation):
                inner = equation.params["jaxpr"].jaxpr
                inside = dict(zip(inner.invars, inputs, strict=True))
                outputs = self._inline(inner, inside)
                scope.update(zip(equation.outvars, outputs, strict=True))
            else:
                self._append(equation, inputs, self._new(scope, equation.outvars))
        return tuple(map(name, jaxpr.outvars))

    def _append(
        self,
        equation: core.JaxprEqn,
        inputs: tuple[int | core.Literal, ...],
        outputs: tuple[int, ...],
    ) -> None:
        """One equation as an operation, or a convolution as two."""
        parts = channels_last(equation)
        if parts is None:
            free = equation.primitive.name in _FREE
            run = partial(_run, equation)
            self.operations.append(
                _Operation(run, inputs, outputs, free, not equation.effects)
            )
            return
        image, kernel = inputs
        ordered, self.count = self.count, self.count + 1
        for run, taken, made in (
            (parts.kernel, (kernel,), (ordered,)),
            (parts.rest, (image, ordered), outputs),
        ):
            one = lambda *x, run=run: (run(*x),)
            self.operations.append(_Operation(one, taken, made))

    def split(
        self, reached: set[int]
    ) -> tuple[list[_Operation], list[_Operation], tuple[int, ...]]:
        """Operations to do once, those to repeat, and what the latter need of before.

        ``reached`` names what is different in every step.
        """
        fixed: dict[int, _Operation] = {}  # by output: what does not change
        inside: list[_Operation] = []
        for operation in self.operations:
            if not operation.pure or reached.intersection(_names(operation)):
                inside.append(operation)
                reached.update(operation.outputs)
            else:
                fixed |= dict.fromkeys(operation.outputs, operation)
        repeated = set(map(id, inside))
        crossing: dict[int, None] = {}  # a set that keeps its order
        needed = [n for op in inside for n in _names(op)]
        needed += [n for n in self.outputs if isinstance(n, int)]
        while needed:
            name = needed.pop()
            producer = fixed.get(name)
            if producer and producer.free:
                if id(producer) not in repeated:
                    repeated.add(id(producer))
                    needed += _names(producer)
            elif name not in reached:
                crossing[name] = None
        moved, needed = set(), list(crossing)
        while needed:
            producer = fixed.get(needed.pop())
            if producer and id(producer) not in moved:
                moved.add(id(producer))
                needed += _names(producer)
        pick = lambda chosen: [op for op in self.operations if id(op) in chosen]
        return pick(moved), pick(repeated), tuple(crossing)


def _is_plain_jit(equation: core.JaxprEqn) -> bool:
    """Whether the equation is a jit without shardings of its own, or constants."""
    if equation.primitive.name not in ("jit", "pjit"):
        return False
    shardings = (*equation.params["in_shardings"], *equation.params["out_shardings"])
    plain = all(type(s).__name__ == "UnspecifiedValue" for s in shardings)
    return plain and not equation.params["jaxpr"].consts


def _names(operation: _Operation) -> Iterator[int]:
    """The inputs of an operation that are no literals."""
    return (name for name in operation.inputs if isinstance(name, int))


def _read(values: dict[int, jax.Array], name: int | core.Literal) -> jax.Array:
    return name.val if isinstance(name, core.Literal) else values[name]


def _evaluate(operations: Sequence[_Operation], values: dict[int, jax.Array]) -> None:
    """Runs ``operations`` in order, adding their outputs to ``values``."""
    for operation in operations:
        made = operation.run(*(_read(values, name) for name in operation.inputs))
        values |= zip(operation.outputs, made, strict=True)


def _run(equation: core.JaxprEqn, *inputs: jax.Array) -> Sequence[jax.Array]:
    """The outputs of one equation."""
    # A jaxpr of one equation: the only way to run one that is the same in all
    # versions of JAX, and keeps its context and its place in the source.
    given = {
        variable: value
        for variable, value in zip(equation.invars, inputs, strict=True)
        if not isinstance(variable, core.Literal)
    }
    source = core.DebugInfo("hoist", equation.primitive.name, None, None)
    jaxpr = core.Jaxpr(
        (), list(given), equation.outvars, [equation], equation.effects, source
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*given.values())
