"""Images of digits: where they come from, and how they are deformed in training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.data import images as data


def load(name: str) -> tuple[Any, Any]:
    """Images in [0, 1] and labels, for training and for testing."""
    if name == "mnist":
        parts = [data.mnist("train"), data.mnist("test")]
    else:
        images, labels = data.digits()  # of the last writers: not of those before
        parts = [(images[:1437], labels[:1437]), (images[1437:], labels[1437:])]
    top = parts[0][0].max()
    scaled = lambda images: (images / top).astype(np.float32)
    return tuple((scaled(x), y.astype(np.int32)) for x, y in parts)


def batches(arrays: tuple[np.ndarray, ...], size: int) -> list[tuple[np.ndarray, ...]]:
    """In order."""
    parts = range(0, len(arrays[0]), size)
    return [tuple(array[i : i + size] for array in arrays) for i in parts]


def deformed(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image turned, scaled and shifted a little, at random."""
    turn, scale, shift = jax.random.split(key, 3)
    count, side = len(images), images.shape[1]
    a = 0.15 * jax.random.uniform(turn, (count,), minval=-1)
    s = 1 + 0.08 * jax.random.uniform(scale, (count, 2), minval=-1)
    t = side / 18 * jax.random.uniform(shift, (count, 2), minval=-1)
    at = jnp.arange(side) - (side - 1) / 2
    rows, columns = jnp.meshgrid(at, at, indexing="ij")

    def one(image: jax.Array, a: jax.Array, s: jax.Array, t: jax.Array) -> jax.Array:
        y = s[0] * (jnp.cos(a) * rows - jnp.sin(a) * columns) + t[0]
        x = s[1] * (jnp.sin(a) * rows + jnp.cos(a) * columns) + t[1]
        where = [y + (side - 1) / 2, x + (side - 1) / 2]
        return jax.scipy.ndimage.map_coordinates(image, where, order=1)

    return jax.vmap(one)(images, a, s, t)
