"""Directions to perturb in: a public namespace of noises, each a ``Noise``.

* ``rademacher``: signs; the default, cheapest to draw and least variance;
* ``normal``: Gaussian entries; one more ‖g‖² of variance on either side;
* ``sphere``: Gaussian directions of one length;
* ``orthonormal``, ``coordinate``: frames; a whole one has no variance left;
* ``hadamard``: a frame of signs, as cheap as signs;
* ``Antithetic(noise=…)``: each direction of another noise both ways.

Cost: a random number an entry (a bit an entry for signs), and the square of the size
for ``orthonormal``. Not differentiable in the key; nothing else is an argument.

Example:
  >>> import jax, jax.numpy as jnp
  >>> from rbpjax import perturb
  >>> first_three = jnp.arange(3)
  >>> perturb.noise.normal(jax.random.key(0), first_three, 5, jnp.float32).shape
  (3, 5)
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp

from rbpjax._core.strategy import function, strategy

__all__ = [
    "Antithetic",
    "Noise",
    "coordinate",
    "hadamard",
    "normal",
    "orthonormal",
    "rademacher",
    "sphere",
]


class Noise(Protocol):
    """Draws directions v with E v vᵀ = I, all entries uncorrelated.

    ``noise(key, indices, size, dtype)`` returns ``[len(indices), size]``: the samples
    of those numbers. Sample i depends on ``key`` and i alone, so that chunks of any
    length draw the same directions. Any such callable serves; one that ignores ``key``
    and returns rows of a table makes an enumeration. The result may have a narrower
    dtype than ``dtype`` (signs are bytes): memory, not arithmetic, is what noise costs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> def halves(key, indices, size, dtype):  # one entry in two, times √2
      ...     def draw(i):
      ...         keys = jax.random.split(jax.random.fold_in(key, i))
      ...         kept = jax.random.bernoulli(keys[0], 0.5, (size,)).astype(dtype)
      ...         return 2**0.5 * kept * jax.random.rademacher(keys[1], (size,), dtype)
      ...     return jax.vmap(draw)(indices)
      >>> rule = perturb.NodePerturbation(noise=halves)
      >>> rule.noise(jax.random.key(0), jnp.arange(2), 7, jnp.float32).shape
      (2, 7)
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
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> indices = jnp.arange(3)
      >>> perturb.noise.normal(jax.random.key(0), indices, 5, jnp.float32).shape
      (3, 5)

    References:
      Nesterov and Spokoiny, "Random gradient-free minimization of convex functions",
      Foundations of Computational Mathematics 17, 2017.
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
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> indices = jnp.arange(3)
      >>> v = perturb.noise.rademacher(jax.random.key(0), indices, 5, jnp.float32)
      >>> v.shape, bool(jnp.all(v * v == 1))
      ((3, 5), True)

    References:
      Spall, "Multivariate stochastic approximation using a simultaneous perturbation
      gradient approximation", IEEE Transactions on Automatic Control 37, 1992.
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
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> v = perturb.noise.sphere(jax.random.key(0), jnp.arange(3), 4, jnp.float32)
      >>> jnp.linalg.norm(v, axis=1).round(3).tolist()
      [2.0, 2.0, 2.0]

    References:
      Flaxman, Kalai, McMahan, "Online convex optimization in the bandit setting",
      SODA 2005.
    """
    v = normal(key, indices, size, dtype)
    return v * (size**0.5 / jnp.linalg.norm(v, axis=1, keepdims=True))


def orthonormal(
    key: jax.Array, indices: jax.Array, size: int, dtype: jnp.dtype
) -> jax.Array:
    """Draws the rows of one random orthogonal matrix, times √d.

    With ``num_samples = size`` (or a multiple) and ``Exact()`` the gradient has no
    variance left: it is exact. Fewer samples waste nothing on overlap: the variance of
    K ≤ d of them is (d / K - 1) ‖g‖². The memory is that of the matrix, size²: for
    small problems and for tests. ``hadamard`` is for large ones.

    Args:
      key: PRNG key.
      indices: numbers of the samples, ``[k]``; they repeat after ``size``.
      size: dimensions d of a direction.
      dtype: of the result.

    Returns:
      Directions, ``[k, size]``, orthogonal, each of norm √size.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> indices = jnp.arange(3)
      >>> v = perturb.noise.orthonormal(jax.random.key(0), indices, 3, jnp.float32)
      >>> bool(jnp.max(jnp.abs(v @ v.T - 3 * jnp.eye(3, dtype=v.dtype))) < 1e-5)
      True

    References:
      Choromanski et al., "Structured Evolution with Compact Architectures for Scalable
      Policy Optimization", ICML 2018.
    """
    half = jnp.finfo(dtype).bits < 32  # in which there is no QR
    wide = jnp.float32 if half else dtype
    frame = jax.random.orthogonal(key, size, dtype=wide)[indices % size] * size**0.5
    return frame.astype(dtype)


def hadamard(
    key: jax.Array, indices: jax.Array, size: int, dtype: jnp.dtype
) -> jax.Array:
    """Draws orthogonal signs: the rows of a Hadamard matrix, columns flipped at random.

    Row i has the signs (-1)^popcount(i & j) s_j, s random signs. Let N be the power of
    two from ``size`` on. With ``num_samples`` = N (or a multiple) and ``Exact()`` the
    gradient has no variance left. Where ``size`` = N all directions are orthogonal, and
    the variance of K ≤ d samples is (d / K - 1) ‖g‖², as that of ``orthonormal``; else
    they are nearly so. No matrix is made: an entry costs as much as one of
    ``rademacher``.

    Args:
      key: PRNG key.
      indices: numbers of the samples, ``[k]``; after N new signs s are drawn.
      size: dimensions d of a direction.
      dtype: ignored.

    Returns:
      Directions, ``[k, size]``, int8 entries ±1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> v = perturb.noise.hadamard(jax.random.key(0), jnp.arange(4), 4, jnp.float32)
      >>> (v @ v.T).tolist()
      [[4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0], [0, 0, 0, 4]]

    References:
      Choromanski et al., "Structured Evolution with Compact Architectures for Scalable
      Policy Optimization", ICML 2018: one block of its HD products.
    """
    rows = 1 << max(size - 1, 0).bit_length()
    numbers = indices.astype(jnp.uint32)
    columns = jnp.arange(size, dtype=jnp.uint32)
    both = jnp.broadcast_arrays((numbers % rows)[:, None], columns[None])
    odd = jax.lax.population_count(jnp.bitwise_and(*both)) & 1
    return (1 - 2 * odd.astype(jnp.int8)) * rademacher(
        key, numbers // rows, size, dtype
    )


@strategy
class Antithetic:
    """Draws each direction of another noise both ways: v, then -v.

    With ``OneSided`` and an even number of samples curvature cancels in every pair, as
    in ``Central``, and the clean pass is of no account. Where the derivative is exact,
    -v tells what v has told: the variance of K samples is that of K / 2.

    Attributes:
      noise: how the directions are drawn: one of ``perturb.noise``, or a callable.

    Raises:
      ValueError: ``noise`` is no callable.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> both = perturb.noise.Antithetic()
      >>> v = both(jax.random.key(0), jnp.arange(4), 7, jnp.float32)
      >>> bool(jnp.all(v[0] == -v[1])), bool(jnp.all(v[2] == -v[3]))
      (True, True)

    References:
      Salimans et al., "Evolution Strategies as a Scalable Alternative to Reinforcement
      Learning", https://arxiv.org/abs/1703.03864, section 2.1: mirrored sampling.
    """

    noise: Noise = function(
        default=rademacher, meaning="a callable such as perturb.noise.rademacher"
    )

    def __call__(
        self, key: jax.Array, indices: jax.Array, size: int, dtype: jnp.dtype
    ) -> jax.Array:
        """Returns the directions of those samples."""
        v = self.noise(key, indices // 2, size, dtype)
        return v * (1 - 2 * (indices % 2).astype(v.dtype))[:, None]


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
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> indices = jnp.arange(4)
      >>> v = perturb.noise.coordinate(jax.random.key(0), indices, 4, jnp.float32)
      >>> v.sum(0).tolist()
      [2.0, 2.0, 2.0, 2.0]

    References:
      Nocedal and Wright, "Numerical Optimization", 2nd edition, section 8.1.
    """
    places = jax.random.permutation(key, size)[indices % size]
    return jax.nn.one_hot(places, size, dtype=dtype) * size**0.5


def _at(key: jax.Array, index: jax.Array) -> jax.Array:
    return jax.random.fold_in(key, index)
