"""What the change of the activity is divided by: a public namespace of norms.

A norm maps the activity differences, one leaf ``[T, examples, units]`` for each leaf of
nodes, to the squared norm of each leaf's block and to the number of entries of a block.
Any callable that does so is a norm; ``None`` in the place of one is no division.

Cost: one pass over the differences. AD modes: all.

Example:
  >>> from rbpjax import perturb
  >>> perturb.ActivityPerturbation(norm=perturb.norm.per_step).num_samples
  1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

__all__ = ["Blocks", "Norm", "per_layer_step", "per_sequence", "per_step"]

Blocks = list[tuple[jax.Array, int]]
"""For each leaf the squared norms, ``[T or 1, examples, 1]``, and the entries N."""

Norm = Callable[[Sequence[jax.Array]], Blocks]
"""Leaves ``[T, examples, units]`` to the squared norm of each one's block, and N."""


def per_layer_step(leaves: Sequence[jax.Array]) -> Blocks:
    """Normalizes each leaf of nodes by itself at each step.

    Args:
      leaves: activity differences, ``[T, examples, units]`` each.

    Returns:
      For each leaf the squared norms ``[T, examples, 1]`` and the entries of a block.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> [(square, n)] = perturb.norm.per_layer_step([jnp.ones((5, 2, 3))])
      >>> square.shape, n
      ((5, 2, 1), 3)

    References:
      García Fernández, Keemink, van Gerven, https://arxiv.org/abs/2405.08967: the norm
      of their public code, there over the batch too.
    """
    return [(jnp.sum(a * a, axis=2, keepdims=True), a.shape[2]) for a in leaves]


def per_step(leaves: Sequence[jax.Array]) -> Blocks:
    """Normalizes all nodes of a step together.

    Args:
      leaves: activity differences, ``[T, examples, units]`` each.

    Returns:
      For each leaf the squared norms ``[T, examples, 1]`` and the entries of a block.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> leaves = [jnp.ones((5, 2, 3)), jnp.ones((5, 2, 4))]
      >>> [n for _, n in perturb.norm.per_step(leaves)]
      [7, 7]

    References:
      García Fernández, Keemink, van Gerven, "Gradient-Free Training of Recurrent
      Neural Networks using Random Perturbations", https://arxiv.org/abs/2405.08967.
    """
    blocks = per_layer_step(leaves)
    square = jnp.sum(jnp.stack([square for square, _ in blocks]), axis=0)
    return [(square, sum(n for _, n in blocks))] * len(leaves)


def per_sequence(leaves: Sequence[jax.Array]) -> Blocks:
    """Normalizes all nodes of all steps together.

    Args:
      leaves: activity differences, ``[T, examples, units]`` each.

    Returns:
      For each leaf the squared norms ``[1, examples, 1]`` and the entries of a block.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> [(square, n)] = perturb.norm.per_sequence([jnp.ones((5, 2, 3))])
      >>> square.shape, n
      ((1, 2, 1), 15)

    References:
      García Fernández, Keemink, van Gerven, "Gradient-Free Training of Recurrent
      Neural Networks using Random Perturbations", https://arxiv.org/abs/2405.08967.
    """
    blocks = per_step(leaves)
    return [(jnp.sum(s, axis=0, keepdims=True), n * len(s)) for s, n in blocks]


def check_blocks(blocks: Blocks, leaves: Sequence[jax.Array]) -> None:
    """Raises ValueError unless a norm has returned what it should."""
    shapes = [jnp.shape(square) for square, _ in blocks]
    fit = [
        shape in ((steps, examples, 1), (1, examples, 1))
        for shape, (steps, examples, _) in zip(
            shapes, (a.shape for a in leaves), strict=False
        )
    ]
    if len(shapes) != len(leaves) or not all(fit):
        raise ValueError(
            "`norm(leaves)` must return a pair for each leaf, (squares [T or 1, "
            f"examples, 1], number of entries); got squares of shapes {shapes} for "
            f"leaves of shapes {[a.shape for a in leaves]}."
        )
