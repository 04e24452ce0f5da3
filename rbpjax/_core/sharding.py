"""How arrays are spread over devices, as far as the types of loops depend on it.

A loop's carry must have one type on entry and on exit. Inside ``shard_map`` with
``check_vma`` the axes over which an array varies are part of the type, and on meshes
with explicit axes its sharding is: what is made from nothing, such as zeros or random
numbers, must be given the type of the data that it will meet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax import lax
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
