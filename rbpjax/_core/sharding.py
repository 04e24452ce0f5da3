"""How arrays are spread over devices, as far as the types of loops depend on it.

A loop's carry must have one type on entry and on exit. Inside ``shard_map`` with
``check_vma`` the axes over which an array varies are part of the type, and on meshes
with explicit axes its sharding is: what is made from nothing, such as zeros or random
numbers, must be given the type of the data that it will meet.

Where f itself has collectives, the devices of a ``shard_map`` (or the rows of a
``vmap`` with an axis name) hold the parts of one state, and all must take the same
decisions: sums over the state go over those axes too. Which ones they are is found in
f's jaxpr, when a solver or rule is called; ``coupled`` tells all sums below that call.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from itertools import compress
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jax.sharding import PartitionSpec as P

from rbpjax.types import PyTree

# JAX 0.8 to 0.12 have them under other names, one after the other.
_reshard = getattr(jax, "reshard", None) or jax.sharding.reshard


def _pcast(x: jax.Array, axes: tuple) -> jax.Array:
    """``x`` as an array that varies over ``axes`` too."""
    if hasattr(lax, "pcast"):
        return lax.pcast(x, axes, to="varying")
    return getattr(lax, "pvary")(x, axes)  # noqa: B009


def varying_axes(avals: Iterable[Any]) -> frozenset:
    """The ``shard_map`` axes over which arrays of these types vary."""
    return frozenset().union(
        # JAX 0.12 moved the set of varying axes.
        *(a.vma if hasattr(a, "vma") else a.manual_axis_type.varying for a in avals)
    )


def vary(x: PyTree, axes: frozenset) -> PyTree:
    """Marks ``x`` as varying over ``axes`` of the enclosing ``shard_map``."""
    if not axes:
        return x

    def leaf(u: jax.Array) -> jax.Array:
        missing = axes - varying_axes([jax.typeof(u)])
        return _pcast(u, tuple(missing)) if missing else u

    return jax.tree.map(leaf, x)


def vary_like(x: PyTree, reference: PyTree) -> PyTree:
    """Marks ``x`` as varying over all axes that a leaf of ``reference`` varies over."""
    return vary(x, varying_axes(map(jax.typeof, jax.tree.leaves(reference))))


def typed_like(x: PyTree, like: PyTree) -> PyTree:
    """``x`` with the types of ``like``: its varying axes, and its explicit sharding."""

    def leaf(u: jax.Array, v: jax.Array) -> jax.Array:
        sharding = jax.typeof(v).sharding
        same = jax.typeof(u).sharding.spec == sharding.spec
        return u if same else _reshard(u, sharding)

    return vary_like(jax.tree.map(leaf, x, like), like)


def is_sharded(x: jax.Array) -> bool:
    """Whether an explicit mesh splits ``x`` along one of its axes."""
    return any(part is not None for part in jax.typeof(x).sharding.spec)


def gathered(x: jax.Array) -> jax.Array:
    """``x`` whole on every device of an explicit mesh."""
    return _reshard(x, P(*(None for _ in x.shape))) if is_sharded(x) else x


_coupled: ContextVar[tuple] = ContextVar("coupled", default=())


@contextlib.contextmanager
def coupled(axes: Iterable) -> Iterator[None]:
    """What is traced inside sums over ``axes`` as well, which share one state."""
    token = _coupled.set(tuple(sorted({*_coupled.get(), *axes}, key=str)))
    try:
        yield
    finally:
        _coupled.reset(token)


def coupling(f: Callable[..., PyTree], *examples: PyTree) -> frozenset:
    """The named axes over which the devices, or rows, talk to each other in ``f``."""
    names = getattr(core, "unsafe_get_axis_names_DO_NOT_USE", lambda: None)()
    if names is not None and not names:
        return frozenset()
    jaxpr = jax.make_jaxpr(lambda *examples: f(*examples))(*examples).jaxpr
    found = frozenset(_collectives(jaxpr))
    return found if names is None else found & frozenset(names)


def summed(f: Callable[..., PyTree], *examples: PyTree) -> Any:
    """The context in which sums over states go over the coupling axes of ``f``."""
    return coupled(coupling(f, *examples))


def check_coupled(strategy: object, axes: frozenset, remedy: str) -> None:
    """Raises ValueError for a solver or rule that would not sum over ``axes``."""
    ours = getattr(strategy, "__module__", "").startswith("rbpjax.")
    if not (ours or axes <= frozenset(getattr(strategy, "axis_names", ()))):
        shown = sorted(axes, key=str)
        raise ValueError(
            f"{strategy!r}: f has collectives over the axes {shown}, so that their "
            "devices share one state, and a solver or rule of your own would judge "
            f"each part alone. Write `{remedy}`, or, if its sums go over these axes, "
            f"give it the attribute `axis_names = {tuple(shown)!r}`."
        )


def _collectives(jaxpr: core.Jaxpr, used: list[bool] | None = None) -> Iterator[Any]:
    """The axes of all collectives that its results need, also of nested functions.

    ``used``: which of its results. Of a product with Jᵀ those of h alone are: sums of
    the parameters' cotangents over devices do not make a state one.
    """
    results = jaxpr.outvars if used is None else compress(jaxpr.outvars, used)
    needed = set(filter(_is_variable, results))
    for eqn in reversed(jaxpr.eqns):
        wanted = [variable in needed for variable in eqn.outvars]
        if not any(wanted):
            continue
        needed.update(filter(_is_variable, eqn.invars))
        values = jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        inner = [getattr(value, "jaxpr", value) for value in values]
        inner = [value for value in inner if hasattr(value, "eqns")]
        called = eqn.primitive.name in ("jit", "pjit", "closed_call", "remat2")
        for value in inner:
            yield from _collectives(value, wanted if called else None)
        if not inner and eqn.primitive.name != "axis_index":
            yield from (e.name for e in eqn.effects if hasattr(e, "name"))


def _is_variable(x: Any) -> bool:
    return not isinstance(x, core.Literal)


def total(x: jax.Array) -> jax.Array:
    """The sum of ``x`` over the coupled axes; of the type of ``x``."""
    return _reduced(lax.psum, x)


def largest(x: jax.Array) -> jax.Array:
    """The largest ``x`` over the coupled axes; of the type of ``x``."""
    # It only scales, and has no derivative in JAX.
    return _reduced(lax.pmax, lax.stop_gradient(x))


def everywhere(condition: jax.Array) -> jax.Array:
    """Whether it holds in all parts of a coupled state."""
    if not _coupled.get():
        return condition
    return total((~condition).astype("int32")) == 0


def _reduced(reduce: Callable, x: jax.Array) -> jax.Array:
    axes = _coupled.get()
    if not axes:
        return x
    # Those whose collectives want an x that varies over all of them: with check_vma.
    checked = varying_axes([jax.typeof(lax.axis_index(axes))])
    return vary_like(reduce(vary(x, checked), axes), x)


def own_key(key: jax.Array) -> jax.Array:
    """A key of each part of a coupled state: parts must not be alike."""
    axes = _coupled.get()
    return jax.random.fold_in(key, lax.axis_index(axes)) if axes else key


def parts() -> int:
    """Into how many parts the coupled axes divide a state."""
    return math.prod(int(lax.psum(1, axis)) for axis in _coupled.get())


def whole(x: jax.Array) -> jax.Array:
    """The vectors of all parts, one behind the other."""
    axes = _coupled.get()
    return lax.all_gather(x, axes, tiled=True) if axes else x


def own_part(x: jax.Array) -> jax.Array:
    """What of a vector of all parts belongs to this one."""
    axes = _coupled.get()
    if not axes:
        return x
    size = len(x) // parts()
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * size, size)
