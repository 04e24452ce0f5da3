"""Samples: directions as pytrees, and means over samples, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from rbpjax._core.sharding import vary, vary_like, varying_axes
from rbpjax._core.strategy import option
from rbpjax.types import PyTree


class _Divided(Protocol):
    """A rule that averages over samples, which may be divided over devices."""

    @property
    def num_samples(self) -> int: ...

    @property
    def axis_name(self) -> str | None: ...


class _Sampled(_Divided, Protocol):
    """One that takes them a chunk at a time."""

    @property
    def chunk(self) -> int | None: ...


def axis() -> Any:
    """The field of a rule that names the axis over which samples are divided."""
    return option(
        default=None,
        check=lambda value: value is None or isinstance(value, str),
        meaning="None, or the name of an axis of the shard_map around it, a str",
    )


def check_chunk(rule: _Sampled) -> None:
    """Raises ValueError unless the chunks divide the samples."""
    if rule.chunk is not None and rule.num_samples % rule.chunk:
        raise ValueError(
            f"{type(rule).__name__}: `chunk` = {rule.chunk} must divide `num_samples` "
            f"= {rule.num_samples}. Take a divisor, or None for what fits."
        )


def spread(rule: _Divided, tree: PyTree) -> PyTree:
    """``tree`` as what differs between devices, where samples are divided over them."""
    if rule.axis_name is None:
        return tree
    return vary(tree, varying_axes([jax.typeof(_place(rule.axis_name))]))


def _place(name: str) -> jax.Array:
    """The number of this device; ValueError if there is no such axis."""
    try:
        return jax.lax.axis_index(name)
    except NameError:
        raise ValueError(
            f"`axis_name` = {name!r} is no axis here: call it inside `jax.shard_map` "
            "over a mesh that has it, or leave it out."
        ) from None


def joined(rule: _Divided, tree: PyTree) -> PyTree:
    """What all devices have found alike, as the same array on all of them."""
    if rule.axis_name is None:
        return tree
    varies = lambda x: rule.axis_name in varying_axes([jax.typeof(x)])
    mean = lambda x: jax.lax.pmean(x, rule.axis_name) if varies(x) else x
    return jax.tree.map(mean, tree)


# Entries of the directions that run at once by default. Measured on a CPU with networks
# of 144 to 163,200 weights: more leave the caches, and fewer than four samples make
# products of matrices into ones with vectors. Elsewhere it bounds memory alone.
_AT_ONCE = {"cpu": 2**17}
_AT_ONCE_ELSEWHERE = 2**26


def fitting(num_samples: int, size: int) -> int:
    """How many samples of ``size`` entries run at once by default; a divisor."""
    entries = _AT_ONCE.get(jax.default_backend(), _AT_ONCE_ELSEWHERE)
    most = min(num_samples, max(4, entries // max(size, 1)))
    return next(c for c in range(most, 0, -1) if num_samples % c == 0)


def mean_over_samples(
    estimate: Callable[[jax.Array], PyTree], rule: _Sampled, size: int
) -> PyTree:
    """The sum over chunks of ``estimate(indices)``, divided by the number of samples.

    Memory is that of one chunk of directions of ``size`` entries, whatever the number
    of samples. With ``axis_name`` each device takes its share of the samples, which are
    the same ones as on one device.
    """
    indices = numbers(rule, rule.chunk)
    chunk = rule.chunk or fitting(len(indices), size)
    if chunk == len(indices):
        sums = estimate(indices)
    else:
        rows = indices.reshape(-1, chunk)
        zeros = optax.tree.zeros_like(jax.eval_shape(estimate, rows[0]))
        zeros = vary_like(zeros, rows)
        add = lambda sums, row: (optax.tree.add(sums, estimate(row)), None)
        sums, _ = jax.lax.scan(add, zeros, rows)
    return jax.tree.map(lambda s: s / rule.num_samples, summed(rule, sums))


def over_samples(f: Callable[..., PyTree], trees: tuple, size: int) -> PyTree:
    """``jax.vmap(f)(*trees)``, as many of them at once as ``fitting`` says."""
    number = len(jax.tree.leaves(trees)[0])
    chunk = fitting(number, size)
    if chunk == number:
        return jax.vmap(f)(*trees)
    return jax.lax.map(lambda args: f(*args), trees, batch_size=chunk)


def numbers(rule: _Divided, chunk: int | None = None) -> jax.Array:
    """The numbers of the samples of this device; ValueError if they are no whole one.

    Those of all devices are the same ones as on one device, in order.
    """
    indices, name = jnp.arange(rule.num_samples, dtype=jnp.uint32), rule.axis_name
    if name is None:
        return indices
    place, devices = _place(name), int(jax.lax.psum(1, name))
    share = len(indices) // devices
    if len(indices) % devices or share % (chunk or 1):
        raise ValueError(
            f"`num_samples` = {len(indices)} must be a multiple of the {devices} "
            f"devices of {name!r} times `chunk` = {chunk or 1}. Take another number."
        )
    return indices.reshape(devices, share)[place]


def summed(rule: _Divided, tree: PyTree) -> PyTree:
    """The sum over the devices that samples are divided over."""
    return tree if rule.axis_name is None else jax.lax.psum(tree, rule.axis_name)


def of_all(rule: _Divided, own: jax.Array) -> jax.Array:
    """A number for each sample, from those of each device's own: the same on all."""
    if rule.axis_name is None:
        return own
    # In its place among zeros, and summed: a sum is the same array on all devices.
    rows = jnp.zeros((rule.num_samples // len(own), len(own)), own.dtype)
    rows = vary_like(rows, own).at[_place(rule.axis_name)].set(own)
    return summed(rule, rows).reshape(-1)


def draw(
    noise: Callable[..., jax.Array],
    key: jax.Array,
    indices: jax.Array,
    size: int,
    dtype: jnp.dtype,
) -> jax.Array:
    """Directions ``[samples, size]``; ValueError if ``noise`` makes anything else."""
    vectors = noise(key, indices, size, dtype)
    want, got = (len(indices), size), getattr(vectors, "shape", None)
    if got != want or not _is_real(vectors.dtype):
        shown = vectors if got is None else f"{vectors.dtype}{list(got)}"
        raise ValueError(
            "`noise(key, indices, size, dtype)` must return real numbers [samples, "
            f"size], here {list(want)}; got {shown}."
        )
    return vectors


def _is_real(dtype: jnp.dtype) -> bool:
    real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    return bool(real)


def check_result(made: PyTree, like: PyTree, call: str) -> None:
    """Raises ValueError unless what a rule's callable made is shaped as ``like``."""
    got, want = (jax.tree.map(jnp.shape, tree) for tree in (made, like))
    if got != want:
        raise ValueError(f"`{call}` must return arrays of shapes {want}; got {got}.")


def size_of(tree: PyTree) -> int:
    """Number of entries of all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def widest(tree: PyTree) -> jnp.dtype:
    """The widest dtype of the leaves: what noise is drawn in."""
    return max((leaf.dtype for leaf in jax.tree.leaves(tree)), key=lambda d: d.itemsize)


def unflatten(flat: jax.Array, like: PyTree) -> PyTree:
    """A vector as a tree with the structure and shapes of ``like``."""
    leaves, structure = jax.tree.flatten(like)
    made, start = [], 0
    for leaf in leaves:
        made.append(flat[start : start + leaf.size].reshape(leaf.shape))
        start += leaf.size
    return structure.unflatten(made)


def scaled(amount: jax.typing.ArrayLike, direction: PyTree, like: PyTree) -> PyTree:
    """``amount * direction`` in the dtypes of ``like``."""
    by = lambda leaf: jnp.asarray(amount).astype(leaf.dtype)
    return jax.tree.map(lambda v, u: by(u) * v.astype(u.dtype), direction, like)


def weighted_sum(weights: jax.Array, trees: PyTree, like: PyTree) -> PyTree:
    """Σ_k weights_k trees_k over the leading axis, in the dtypes of ``like``."""
    return jax.tree.map(
        lambda v, leaf: jnp.tensordot(
            weights.astype(leaf.dtype), v.astype(leaf.dtype), 1
        ),
        trees,
        like,
    )
