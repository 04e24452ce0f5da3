"""Directions to perturb in: any callable with the contract of ``Noise``."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp

from rbpjax.types import PyTree


class Noise(Protocol):
    """Draws directions v with E v vᵀ = I, all entries uncorrelated.

    ``noise(key, indices, size, dtype)`` returns ``[len(indices), size]``: the samples
    of those numbers. Sample i depends on ``key`` and i alone, so that chunks of any
    length draw the same directions. Any such callable serves; one that ignores ``key``
    and returns rows of a table makes an enumeration. The result may have a narrower
    dtype than ``dtype`` (signs are bytes): memory, not arithmetic, is what noise costs.
    """

    def __call__(
        self, key: jax.Array, indices: jax.Array, size: int, dtype: jnp.dtype, /
    ) -> jax.Array:
        """Returns the directions of those samples."""
        ...


def normal(
    key: jax.Array, indices: jax.Array, size: int, dtype: jnp.dtype
) -> jax.Array:
    """Draws independent standard normal entries.

    A one-sample gradient has total variance (d + 1) ‖g‖² in d dimensions.

    Args:
      key: PRNG key.
      indices: numbers of the samples, ``[k]``.
      size: dimensions d of a direction.
      dtype: of the result.

    Returns:
      Directions, ``[k, size]``.

    Example:
      >>> normal(jax.random.key(0), jnp.arange(3), 5, jnp.float32).shape
      (3, 5)
    """
    return jax.vmap(lambda i: jax.random.normal(_at(key, i), (size,), dtype))(indices)


def rademacher(
    key: jax.Array, indices: jax.Array, size: int, dtype: jnp.dtype
) -> jax.Array:
    """Draws independent signs: the default, cheapest to draw and least variance.

    A one-sample gradient has total variance (d - 1) ‖g‖² in d dimensions.

    Args:
      key: PRNG key.
      indices: numbers of the samples, ``[k]``.
      size: dimensions d of a direction.
      dtype: ignored.

    Returns:
      Directions, ``[k, size]``, int8 entries ±1.

    Example:
      >>> v = rademacher(jax.random.key(0), jnp.arange(3), 5, jnp.float32)
      >>> v.shape, bool(jnp.all(v * v == 1))
      ((3, 5), True)
    """
    del dtype

    # A random word has 32 signs in it: jax.random.rademacher spends a word on each,
    # which costs as much as the forward pass that it is for.
    def one(index: jax.Array) -> jax.Array:
        words = jax.random.bits(_at(key, index), (-(-size // 32), 1), jnp.uint32)
        places = jnp.arange(32, dtype=jnp.uint32)[None]
        bits = (jax.lax.shift_right_logical(*jnp.broadcast_arrays(words, places))) & 1
        return 1 - 2 * bits.reshape(-1)[:size].astype(jnp.int8)

    return jax.vmap(one)(indices)


def sphere(
    key: jax.Array, indices: jax.Array, size: int, dtype: jnp.dtype
) -> jax.Array:
    """Draws from the sphere of radius √d: all directions alike, no luck with length.

    A one-sample gradient has total variance (d - 1) ‖g‖² in d dimensions. Entries of
    one direction are uncorrelated but not independent.

    Args:
      key: PRNG key.
      indices: numbers of the samples, ``[k]``.
      size: dimensions d of a direction.
      dtype: of the result.

    Returns:
      Directions, ``[k, size]``, each of norm √size.

    Example:
      >>> v = sphere(jax.random.key(0), jnp.arange(3), 4, jnp.float64)
      >>> jnp.linalg.norm(v, axis=1).round(6)
      Array([2., 2., 2.], dtype=float64)
    """
    v = normal(key, indices, size, dtype)
    return v * (size**0.5 / jnp.linalg.norm(v, axis=1, keepdims=True))


def orthonormal(
    key: jax.Array, indices: jax.Array, size: int, dtype: jnp.dtype
) -> jax.Array:
    """Draws the rows of one random orthogonal matrix, times √d.

    With ``num_samples = size`` (or a multiple) and ``Exact()`` the gradient has no
    variance left: it is exact. Fewer samples waste nothing on overlap. The memory is
    that of the matrix, size²: for small problems and for tests.

    Args:
      key: PRNG key.
      indices: numbers of the samples, ``[k]``; they repeat after ``size``.
      size: dimensions d of a direction.
      dtype: of the result.

    Returns:
      Directions, ``[k, size]``, orthogonal, each of norm √size.

    Example:
      >>> v = orthonormal(jax.random.key(0), jnp.arange(3), 3, jnp.float64)
      >>> bool(jnp.allclose(v @ v.T, 3 * jnp.eye(3), atol=1e-12))
      True
    """
    return jax.random.orthogonal(key, size, dtype=dtype)[indices % size] * size**0.5


def coordinate(
    key: jax.Array, indices: jax.Array, size: int, dtype: jnp.dtype
) -> jax.Array:
    """Draws coordinate directions in random order, times √d: one entry at a time.

    With ``num_samples = size`` and ``Central(sigma)`` this is the textbook's numerical
    gradient with step ``sigma √size``.

    Args:
      key: PRNG key.
      indices: numbers of the samples, ``[k]``; they repeat after ``size``.
      size: dimensions d of a direction.
      dtype: of the result.

    Returns:
      Directions, ``[k, size]``, one entry √size in each, the others 0.

    Example:
      >>> coordinate(jax.random.key(0), jnp.arange(4), 4, jnp.float64).sum(0)
      Array([2., 2., 2., 2.], dtype=float64)
    """
    places = jax.random.permutation(key, size)[indices % size]
    return jax.nn.one_hot(places, size, dtype=dtype) * size**0.5


def _at(key: jax.Array, index: jax.Array) -> jax.Array:
    return jax.random.fold_in(key, index)


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
    return jax.tree.map(
        lambda v, leaf: (amount * v.astype(leaf.dtype)).astype(leaf.dtype),
        direction,
        like,
    )
