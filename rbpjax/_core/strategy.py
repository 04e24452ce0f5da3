"""Strategies: value objects that hold the options of a method, checked when made.

A field says with its specifier what it may be::

    @strategy
    class Neumann:
        tol: float | jax.Array | None = tolerance(default=None)
        max_steps: int | jax.Array = budget(default=1000)
        damping: float = real(default=0.0, below=1.0)

and the instance is called, compared, hashed and printed by value. Options are given by
name, but for a strategy in a strategy, as in ``RBP(Anderson())``, whose field is
declared ``kw_only=False``. Type checkers read ``default=`` and ``kw_only=`` there.

Tolerances and budgets may be traced: of a schedule, say. A strategy is a pytree, and
such numbers are its leaves.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from rbpjax.types import PyTree

T = TypeVar("T")
Check = Callable[[Any], bool]

REQUIRED: Any = dataclasses.MISSING
"""In the place of a default: the option must be given."""


def option(
    *,
    default: Any = REQUIRED,
    check: Check,
    meaning: str,
    excludes: str = "",
    kw_only: bool = True,
) -> Any:
    """A field whose value must pass ``check``; ``meaning`` says in words what it is.

    None passes where it is the default. ``excludes`` names another option that may not
    be given beside this one.
    """
    optional = (lambda x: x is None or check(x)) if default is None else check
    metadata = {"check": optional, "meaning": meaning, "excludes": excludes}
    return dataclasses.field(default=default, kw_only=kw_only, metadata=metadata)


def count(*, default: Any = REQUIRED, minimum: int = 1, excludes: str = "") -> Any:
    """A Python int of at least ``minimum``."""
    return option(
        default=default,
        check=lambda x: _is_number(x, int) and x >= minimum,
        meaning=f"a Python int of at least {minimum}",
        excludes=excludes,
    )


def budget(*, default: Any = REQUIRED, minimum: int = 1, excludes: str = "") -> Any:
    """An int of at least ``minimum``, a traced one, too."""
    enough = lambda x: x >= minimum
    return option(
        default=default,
        check=lambda x: (
            (_is_number(x, int) and enough(x)) or _is_scalar(x, jnp.integer, enough)
        ),
        meaning=f"an integer of at least {minimum}",
        excludes=excludes,
    )


def real(
    *,
    default: Any = REQUIRED,
    minimum: float = 0.0,
    maximum: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> Any:
    """A Python number in [minimum, maximum], and strictly between above and below."""
    left = f"({above}" if above >= minimum else f"[{minimum}"
    right = f"{maximum}]" if maximum < below else f"{below})"
    within = lambda x: minimum <= x <= maximum and above < x < below
    return option(
        default=default,
        check=lambda x: _is_number(x, int, float) and within(x),
        meaning=f"a Python number in {left}, {right}",
    )


def tolerance(*, default: float | None = None, excludes: str = "") -> Any:
    """A relative tolerance in [0, 1), a traced one, too, or None for the default."""
    within = lambda x: 0 <= x < 1
    return option(
        default=default,
        check=lambda x: (
            x is None
            or (_is_number(x, int, float) and within(x))
            or _is_scalar(x, jnp.floating, within)
        ),
        meaning="a relative tolerance, a number in [0, 1), or None",
        excludes=excludes,
    )


def switch(*, default: bool) -> Any:
    """True or False."""
    return option(
        default=default, check=lambda x: isinstance(x, bool), meaning="True or False"
    )


def function(
    *, default: Any = REQUIRED, meaning: str, call: str = "", kw_only: bool = True
) -> Any:
    """A callable, described by ``meaning``, and by ``call``, how it is called."""
    meaning = f"{meaning}, called as {call}" if call else meaning
    made = lambda x: callable(x) and not isinstance(x, type)
    return option(default=default, check=made, meaning=meaning, kw_only=kw_only)


@dataclass_transform(
    frozen_default=True,
    kw_only_default=True,
    field_specifiers=(option, count, budget, real, tolerance, switch, function),
)
def strategy(cls: type[T]) -> type[T]:
    """Makes ``cls`` a frozen dataclass and a pytree, its options checked.

    Instances compare and hash by value and print as they were written, so that they
    can be closed over, passed through ``jax.jit`` or used as keys; equal instances
    share one compilation. Options are Python values, but for tolerances and budgets,
    which may be scalar arrays, too, and are then the pytree's leaves.

    A class that has more to check than field by field defines ``__post_init__``, which
    is run after those checks.
    """
    own = cls.__dict__.get("__post_init__")

    def __post_init__(self: object) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            _check(self, field)
        if own is not None:
            own(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    made = dataclasses.dataclass(frozen=True, kw_only=True, repr=False)(cls)
    made.__repr__ = _as_written  # type: ignore[method-assign]
    _take_names_only(made)
    unflatten = functools.partial(_unflatten, made)
    jax.tree_util.register_pytree_node(made, _flatten, unflatten)
    return made


@dataclasses.dataclass(frozen=True)
class Hole:
    """The place of a number in a strategy without its numbers."""

    index: int


def split(strategy: PyTree) -> tuple[list, PyTree]:
    """The arrays in a strategy, or in any callable pytree, and all but these."""
    leaves, treedef = jax.tree.flatten(strategy)
    numbers = [leaf for leaf in leaves if _is_array(leaf)]
    holes = map(Hole, range(len(numbers)))
    rest = [next(holes) if _is_array(leaf) else leaf for leaf in leaves]
    return numbers, jax.tree.unflatten(treedef, rest) if numbers else strategy


def filled(rest: PyTree, numbers: list) -> PyTree:
    """The strategy of which ``split`` made these two."""
    pick = lambda leaf: numbers[leaf.index] if isinstance(leaf, Hole) else leaf
    return jax.tree.map(pick, rest) if numbers else rest


def _flatten(self: Any) -> tuple[tuple, tuple]:
    """Arrays and callable pytrees as children; names of all fields, and the rest."""
    names = [field.name for field in dataclasses.fields(self)]
    values = [getattr(self, name) for name in names]
    child = [_is_array(v) or isinstance(v, Hole) or _is_node(v) for v in values]
    children = tuple(v for v, one in zip(values, child, strict=True) if one)
    static = tuple(
        (name, None if one else v, one)
        for name, v, one in zip(names, values, child, strict=True)
    )
    return children, static


def _unflatten(cls: type, static: tuple, children: Iterable) -> Any:
    """Unchecked: JAX puts other things than numbers there, too."""
    self, rest = object.__new__(cls), iter(children)
    for name, value, child in static:
        object.__setattr__(self, name, next(rest) if child else value)
    return self


def _as_written(self: object) -> str:
    """The call that makes an equal instance, without what has its default value."""
    values = {f: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
    given = (
        f"{field.name}={value!r}"
        for field, value in values.items()
        if _is_array(value) or value != field.default
    )
    return f"{type(self).__name__}({', '.join(given)})"


def _check(owner: object, field: dataclasses.Field) -> None:
    """Raises ValueError unless the field's value is what its specifier says."""
    name, value, rule = type(owner).__name__, getattr(owner, field.name), field.metadata
    if not rule:
        raise TypeError(
            f"{name}.{field.name} has no specifier, such as count() or real()."
        )
    if not rule["check"](value):
        raise ValueError(
            f"{name}: `{field.name}` must be {rule['meaning']}; got {value!r}."
            + (
                " Arrays cannot be options, but for scalars: of a floating-point dtype "
                "for `tol`, of an integer one for `steps` and `max_steps`."
                if hasattr(value, "dtype")
                else ""
            )
            + (
                f" It is a class: give an instance, {value.__name__}()."
                if isinstance(value, type)
                else ""
            )
        )
    if _is_array(value) and jnp.issubdtype(value.dtype, jnp.integer):
        object.__setattr__(owner, field.name, jnp.asarray(value, jnp.int32))
    other = rule["excludes"]
    if other and value is not None and getattr(owner, other) is not None:
        raise ValueError(
            f"{name}: give `{field.name}` or `{other}`, not both; got "
            f"{field.name}={value!r}, {other}={getattr(owner, other)!r}."
        )


def _take_names_only(cls: type) -> None:
    """Has the constructor say which names there are when a value comes without one."""
    init = cls.__init__
    fields = dataclasses.fields(cls)
    parts = [field for field in fields if not field.kw_only]

    @functools.wraps(init)
    def __init__(self: object, *args: Any, **options: Any) -> None:
        if len(args) > len(parts):
            names = ", ".join(f"{field.name}=…" for field in fields)
            given = ", ".join(map(repr, args))
            raise TypeError(
                f"{cls.__name__} takes its options by name, {cls.__name__}({names}); "
                f"got {cls.__name__}({given})."
            )
        init(self, *args, **options)

    cls.__init__ = __init__


def _is_number(value: object, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _is_array(value: object) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic)


def _is_node(value: object) -> bool:
    """Whether it is a method that may have leaves, such as a strategy.

    A tuple of sizes is a pytree, too, but an option.
    """
    return callable(value) and not jax.tree_util.all_leaves([value])


def _is_scalar(value: Any, kind: Any, check: Check) -> bool:
    """Whether it is a scalar array of that kind that passes, if its value is known."""
    if not _is_array(value) or value.shape or not jnp.issubdtype(value.dtype, kind):
        return False
    return isinstance(value, jax.core.Tracer) or bool(check(value))
