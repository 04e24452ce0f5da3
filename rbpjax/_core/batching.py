"""What belongs to one example each, and may not be shared by a ``vmap``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from rbpjax.types import PyTree


def of_each_example(probe: jax.Array, data: PyTree) -> jax.Array:
    """``probe``, which ``vmap`` must map wherever it maps one of ``data``.

    The gradient of a shared probe would be the sum over all examples, and no report.
    """
    return _own_p.bind(jnp.asarray(probe), *jax.tree.leaves(data))


def _batch(args: Any, axes: Any) -> tuple[jax.Array, Any]:
    if axes[0] is None and any(axis is not None for axis in axes[1:]):
        raise ValueError(
            "`probe` is shared by the examples of a vmap: its gradient would be the "
            "sum of their reports. Give each its own: map over a probe with a leading "
            "axis, as in jax.tree.map(lambda p: jnp.zeros(n, p.dtype), zeros)."
        )
    return args[0], axes[0]


_own_p = Primitive("of_each_example")
_own_p.def_impl(lambda probe, *data: probe)
_own_p.def_abstract_eval(lambda probe, *data: probe)
mlir.register_lowering(
    _own_p, mlir.lower_fun(lambda probe, *data: probe, multiple_results=False)
)
ad.primitive_jvps[_own_p] = lambda primals, tangents: (
    _own_p.bind(*primals),
    tangents[0],
)
batching.primitive_batchers[_own_p] = _batch
