"""Programs that are compiled once for equal calls outside ``jit``.

Under ``jit`` a program is compiled with what is around it. Outside, JAX compiles a loop
anew at each call, since it knows the loop's functions by identity, and they are made
anew. Here equal programs are found by what they compute: the step's ``jaxpr``, traced
at this very call, and the values of all options. A step that reads something else than
at its last call is another step. What cannot be compared is compiled anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.extend import core

from rbpjax._core import sharding
from rbpjax.types import PyTree

KEPT = 64
"""Programs that are kept, the last ones used."""

LARGEST = 1024
"""Bytes of an array inside a program that are compared; others are not kept."""


def run(
    function: Callable[..., PyTree], options: tuple[Hashable, ...], *args: PyTree
) -> PyTree:
    """``function(*options, *args)``, outside ``jit`` compiled once for equal options.

    The function must be one of a module, and depend on nothing else.
    """
    if _at_top(args) and all(map(is_value, options)):
        try:
            hash(options)
        except TypeError:  # a step with something in it that cannot be compared
            pass
        else:
            return _compiled(function, *options)(*args)
    return function(*options, *args)


@lru_cache(maxsize=KEPT)
def _compiled(function: Callable[..., PyTree], *options: Hashable) -> Callable:
    return jax.jit(partial(function, *options))


def _at_top(args: PyTree) -> bool:
    """Whether nothing around compiles what is done here, or divides it."""
    compiled = getattr(core, "unsafe_am_i_under_a_jit_DO_NOT_USE", lambda: True)
    return not compiled() and not sharding.varying_axes(
        map(jax.typeof, jax.tree.leaves(args))
    )


def is_value(option: object) -> bool:
    """Whether equality of the option is equality of what it does.

    So of this library's value objects, and not of functions: what they read may change.
    """
    ours = type(option).__module__.startswith("rbpjax.")
    if ours and dataclasses.is_dataclass(option):
        compared = [f.name for f in dataclasses.fields(option) if f.compare]
        return all(is_value(getattr(option, name)) for name in compared)
    plain = Program | jax.tree_util.PyTreeDef | str | int | float | None
    return isinstance(option, plain)


class Program:
    """A jaxpr that is equal to others that compute the same from the same types.

    Attributes:
      jaxpr: it.
    """

    def __init__(self, jaxpr: core.Jaxpr) -> None:
        self.jaxpr = jaxpr
        self._key: Hashable | None = None

    def key(self) -> Hashable:
        """What it computes, and its gradient; TypeError if it cannot be compared."""
        if self._key is None:
            rules: list[str] = []
            plain = _jaxpr_key(self.jaxpr, rules)
            self._key = plain, _jaxpr_key(self._vjp(), []) if rules else None
        return self._key

    def _vjp(self) -> core.Jaxpr:
        """Its VJP, where rules of a user's own are what they compute now."""

        def vjp(values: list, cotangents: list) -> tuple:
            consts, args = values[:count], values[count:]
            run = core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, consts))
            return jax.vjp(lambda *args: run(*args), *args)[1](cotangents)

        count = len(self.jaxpr.constvars)
        like = lambda x: jax.ShapeDtypeStruct(
            x.aval.shape, x.aval.dtype, weak_type=getattr(x.aval, "weak_type", False)
        )
        variables = [*self.jaxpr.constvars, *self.jaxpr.invars]
        of = list(map(like, variables)), list(map(like, self.jaxpr.outvars))
        return jax.make_jaxpr(vjp)(*of).jaxpr

    def __hash__(self) -> int:
        return hash(self.key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.key() == other.key()


def _jaxpr_key(jaxpr: core.Jaxpr, rules: list[str]) -> Hashable:
    """What it computes; appends to ``rules`` the functions that have one of their own.

    Such a rule is a Python function, made anew at each trace: it is left out.
    """
    numbers: dict[core.Var, int] = {}

    def name(variables: list) -> tuple:
        for variable in variables:
            numbers[variable] = len(numbers)
        return tuple(variable.aval for variable in variables)

    def atom(x: core.Var | core.Literal) -> Hashable:
        if isinstance(x, core.Literal):
            return _key(x.val, rules), x.aval
        return numbers[x]

    parts: list[Hashable] = [name([*jaxpr.constvars, *jaxpr.invars])]
    for equation in jaxpr.eqns:
        inputs = tuple(map(atom, equation.invars))
        if "callback" in equation.primitive.name:
            raise TypeError("Python functions are not compared")
        params = sorted(equation.params.items())
        if "custom_" in equation.primitive.name:
            rules.append(equation.primitive.name)
            plain = core.ClosedJaxpr | core.Jaxpr | int | str | tuple | None
            params = [(k, v) for k, v in params if isinstance(v, plain)]
        params = tuple((k, _key(v, rules)) for k, v in params)
        context = getattr(equation, "ctx", None)
        outputs = name(equation.outvars)
        parts.append((equation.primitive, inputs, params, outputs, context))
    return (*parts, tuple(map(atom, jaxpr.outvars)))


def _key(value: Any, rules: list[str]) -> Hashable:
    """A part of a program as something to compare by."""
    if isinstance(value, core.ClosedJaxpr):
        return _jaxpr_key(value.jaxpr, rules), _key(value.consts, rules)
    if isinstance(value, core.Jaxpr):
        return _jaxpr_key(value, rules)
    if isinstance(value, tuple | list):
        return type(value), tuple(_key(part, rules) for part in value)
    if isinstance(value, dict):
        return tuple((k, _key(part, rules)) for k, part in value.items())
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        if isinstance(value, jax.core.Tracer) or value.nbytes > LARGEST:
            raise TypeError("an array that is not compared")
        made = np.asarray(value)
        return made.dtype, made.shape, made.tobytes()
    hash(value)
    return type(value), value
