"""Seeded perturbation: directions that are drawn anew from a key, and never kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from rbpjax._core.sharding import vary_like
from rbpjax._core.strategy import count, function, real, strategy
from rbpjax.perturb.difference import Difference, OneSided, sized, slopes
from rbpjax.perturb.noise import Noise, rademacher
from rbpjax.perturb.samples import axis, draw, numbers, of_all, scaled
from rbpjax.types import PyTree


@strategy
class SeededPerturbation:
    """Estimates the gradient as ``WeightPerturbation``, without storing directions.

        ∂L/∂θ ≈ mean over samples of  v (L(θ + σv) - L(θ)) / σ.

    The direction of a leaf is a function of the key, the number of the sample and the
    place of the leaf. It is drawn where it is added to the parameters, and once more
    where the gradient is summed up, leaf by leaf: only the K slopes are kept between.
    Samples run one after another.

    With ``rank`` r the direction of a matrix [m, n] is a bᵀ / √r, with noise a [m, r]
    and b [n, r] (leaves of more axes are matrices of their last one; vectors and
    scalars are drawn as they are). It takes r (m + n) random numbers in the place of
    m n. The matrix is formed and added to the parameters: a pass costs what it costs.

    Unbiased as ``WeightPerturbation``, with any ``rank``: E v vᵀ = I. The variance of
    one sample is d ± 1 times ‖g‖², d the number of parameters (see ``Noise``), and with
    rank 1 and ``rademacher`` d - 1 times, as for full signs; other noise of low rank
    has more.

    Cost: clean pass, and samples × the cost of ``difference``, and every direction
    twice. Memory: one set of perturbed parameters a pass of ``difference``, the draws
    of some leaves, and the gradient, whatever the number of samples. AD modes: none are
    needed, nor is its estimate meant to be differentiated.

    Attributes:
      num_samples: K, directions to average over.
      axis_name: an axis of the ``shard_map`` around, over which the passes of samples
        are divided, each device taking its share: the estimate is that of one device
        with all of them. The K slopes are exchanged, and no gradient: every device sums
        up all directions itself. None: all samples here.
      difference: one of ``perturb.difference``, or a callable like them.
      noise: how the entries of a leaf are drawn: one of ``perturb.noise``, or a
        callable. Frames (``orthonormal``) are frames of a leaf, not of all parameters.
      rank: of the directions of matrices; None: full.
      scale: factor on the gradient; 1 for the estimate above.

    Raises:
      ValueError: a field is not of its kind or range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> rule = perturb.SeededPerturbation(num_samples=4000, rank=1)
      >>> f = perturb.value_and_grad(lambda w: jnp.sum(w**2), rule)
      >>> w = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> value, grads = f(jax.random.key(0), w)
      >>> bool(jnp.max(jnp.abs(grads - 2 * w)) < 1.5)
      True

    References:
      Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS
      2023, https://arxiv.org/abs/2305.17333, Algorithm 1. Low rank: Sarkar et al.,
      "Evolution Strategies at the Hyperscale", https://arxiv.org/abs/2511.16652.
    """

    num_samples: int = count(default=1)
    axis_name: str | None = axis()
    difference: Difference = function(
        default=OneSided(), meaning="a callable such as perturb.difference.Exact()"
    )
    noise: Noise = function(
        default=rademacher, meaning="a callable such as perturb.noise.rademacher"
    )
    rank: int | None = count(default=None)
    scale: float = real(default=1.0)


class SeededDescent(Protocol):
    """``f(key, params, rate, *args, **kwargs) -> (value, params)``."""

    def __call__(
        self,
        key: jax.Array,
        params: PyTree,
        rate: jax.typing.ArrayLike,
        *args: PyTree,
        **kwargs: PyTree,
    ) -> tuple[jax.Array, PyTree]:
        """Returns the loss before the step, and the parameters after it."""
        ...


def seeded_slopes(
    rule: SeededPerturbation,
    key: jax.Array,
    params: PyTree,
    losses: Callable[[PyTree], jax.Array],
    clean: jax.Array,
) -> jax.Array:
    """The derivatives along all directions, over their number: ``[samples]``."""
    difference = sized(rule.difference, params)

    def slope(index: jax.Array) -> jax.Array:
        def move(amount: jax.typing.ArrayLike) -> PyTree:
            def leaf(place: int, u: jax.Array) -> jax.Array:
                return u + scaled(amount, direction(rule, key, index, place, u), u)

            return _by_place(leaf, params)

        return jnp.sum(slopes(difference, lambda s: losses(move(s)), clean))

    found = of_all(rule, jax.lax.map(slope, numbers(rule)))
    return found * (rule.scale / rule.num_samples)


def seeded_sum(
    rule: SeededPerturbation, key: jax.Array, weights: jax.Array, start: PyTree
) -> PyTree:
    """``start`` and Σ_k weights_k v_k, one leaf and one direction after another."""

    def leaf(place: int, first: jax.Array) -> jax.Array:
        def add(index: jax.Array, total: jax.Array) -> jax.Array:
            v = direction(rule, key, index, place, first)
            return total + scaled(weights[index], v, first)

        start = vary_like(first, (first, weights))
        return jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(len(weights)), add, start)

    return _by_place(leaf, start)


def direction(
    rule: SeededPerturbation,
    key: jax.Array,
    index: jax.Array,
    place: int,
    like: jax.Array,
) -> jax.Array:
    """The direction of one leaf in one sample."""
    here = jax.random.fold_in(key, place)
    entries = lambda size: draw(rule.noise, here, index[None], size, like.dtype)[0]
    if rule.rank is None or like.ndim < 2:
        return entries(like.size).reshape(like.shape)
    columns = like.shape[-1]
    rows = like.size // max(columns, 1)
    both = entries(rule.rank * (rows + columns)).astype(like.dtype)
    both = both.reshape(rows + columns, rule.rank)
    product = both[:rows] @ both[rows:].T
    return (product / jnp.asarray(rule.rank**0.5, like.dtype)).reshape(like.shape)


def _by_place(leaf: Callable[[int, jax.Array], jax.Array], tree: PyTree) -> PyTree:
    """``leaf(place, x)`` for each leaf x, numbered."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([leaf(i, x) for i, x in enumerate(leaves)])
