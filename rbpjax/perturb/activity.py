"""Activity-based node perturbation: the change of the activity, credited."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from rbpjax.perturb.credit import Credit, causal, instant
from rbpjax.perturb.difference import Difference, OneSided
from rbpjax.perturb.node import Derivative, check_rule, credited, credits
from rbpjax.perturb.noise import Noise, rademacher
from rbpjax.types import PyTree, strategy

Blocks = list[tuple[jax.Array, int]]
Norm = Callable[[Sequence[jax.Array]], Blocks]
"""Leaves ``[T, examples, units]`` to the squared norm of each one's block, and N."""


def per_layer_step(leaves: Sequence[jax.Array]) -> Blocks:
    """Normalizes each leaf of nodes by itself at each step.

    Args:
      leaves: activity differences, ``[T, examples, units]`` each.

    Returns:
      For each leaf the squared norms ``[T, examples, 1]`` and the entries of a block.

    Example:
      >>> [(norm, n)] = per_layer_step([jnp.ones((5, 2, 3))])
      >>> norm.shape, n
      ((5, 2, 1), 3)
    """
    return [(jnp.sum(a * a, axis=2, keepdims=True), a.shape[2]) for a in leaves]


def per_step(leaves: Sequence[jax.Array]) -> Blocks:
    """Normalizes all nodes of a step together.

    Args:
      leaves: activity differences, ``[T, examples, units]`` each.

    Returns:
      For each leaf the squared norms ``[T, examples, 1]`` and the entries of a block.

    Example:
      >>> blocks = per_step([jnp.ones((5, 2, 3)), jnp.ones((5, 2, 4))])
      >>> [n for _, n in blocks]
      [7, 7]
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
      >>> [(norm, n)] = per_sequence([jnp.ones((5, 2, 3))])
      >>> norm.shape, n
      ((1, 2, 1), 15)
    """
    blocks = per_step(leaves)
    return [(jnp.sum(s, axis=0, keepdims=True), n * len(s)) for s, n in blocks]


@strategy
class ActivityPerturbation:
    """Estimates node errors by the change δa of the activity that noise brings about.

        e_t = N credit(δL)_t δa_t / ‖δa_t‖²,    ∂L/∂W ≈ Σ_t e_t x_tᵀ,

    averaged over samples; δa_t = noisy - clean nodes holds the noise of earlier steps
    too, passed on by the network. The source of the noise need not be known, and σ
    cancels.

    **Not an unbiased gradient**, whatever σ and the number of samples: its mean is the
    gradient *preconditioned by the covariance of δa*. Without the norm (``norm=None``),
    with ``credit=causal``, E e_t = C_t g_t with C_t = E δa_t δa_tᵀ / σ² and g_t the
    error of BPTT; with ``instant``, g_t is that of one step. C_t is positive
    semi-definite, so that it is a direction of descent for each layer and step, and no
    more. With the norm, E e_t = N S g_t, S = E δδᵀ/‖δ‖²: equal to g_t only where C_t is
    a multiple of the identity. ``readout_credit=causal`` and ``credit=total`` add
    spurious terms.

    One loss a batch (see ``recurrent_value_and_grad``) makes the batch one block: the
    Frobenius norm of the authors' code. One loss an example has a norm an example, and
    far less variance.

    Cost: as ``NodePerturbation``; memory ``chunk`` × (T × nodes).

    Attributes:
      num_samples: K, directions to average over.
      chunk: how many of them run at once; divides ``num_samples``; None: all.
      difference: ``OneSided``, ``Central``, ``Exact``, or a callable like them.
      noise: how directions are drawn; see ``Noise``.
      credit: which losses count for nodes that feed the state.
      readout_credit: the same for ``Nodes.readout``.
      norm: ``per_layer_step``, ``per_step``, ``per_sequence``, a callable like them,
        or None for the raw δa/σ.
      scale: the factor for a block of N entries: ``float`` is N, ``math.sqrt`` is √N; a
        number is itself. Unused where ``norm`` is None.

    A block with δa = 0 gets error 0.

    Raises:
      ValueError: a field is not of its kind or range.

    Example:
      >>> ActivityPerturbation(num_samples=64, norm=per_step).num_samples
      64

    References:
      García Fernández, Keemink, van Gerven, "Gradient-Free Training of Recurrent
      Neural Networks using Random Perturbations", https://arxiv.org/abs/2405.08967.
      The scalings of its public code are ``paper_code``.
    """

    num_samples: int = 1
    chunk: int | None = None
    difference: Difference = OneSided()
    noise: Noise = rademacher
    credit: Credit = causal
    readout_credit: Credit = instant
    norm: Norm | None = per_layer_step
    scale: Callable[[int], float] | float = float

    def __post_init__(self):
        check_rule(self)
        if self.norm is not None and not callable(self.norm):
            raise ValueError(
                "ActivityPerturbation: `norm` must be None or a callable such as "
                f"per_layer_step; got {self.norm!r}."
            )
        number = isinstance(self.scale, (int, float)) and not isinstance(
            self.scale, bool
        )
        if not (callable(self.scale) or number):
            raise ValueError(
                "ActivityPerturbation: `scale` must be a Python number or a function "
                f"of the number of nodes, such as math.sqrt; got {self.scale!r}."
            )

    def errors(
        self, derivative: Derivative, directions: PyTree, like: PyTree, batched: bool
    ) -> PyTree:
        """The node errors of all samples, ``[T, samples, …]``."""
        del directions
        delta, activity = derivative(True)
        made = credits(self, delta, like)
        if self.norm is not None:
            factors = self._factors(self.norm, activity, batched)
            made = jax.tree.map(lambda c, f: c * f.astype(c.dtype), made, factors)
        return credited(made, activity, like)

    def _factors(self, norm: Norm, activity: PyTree, batched: bool) -> PyTree:
        """scale(N) / ‖δa‖² for each leaf, by step, sample and example."""
        leaves, structure = jax.tree.flatten(activity)
        # [T, samples (and examples, if each has its loss), …] as [T, blocks, units].
        blocks = lambda a: a.shape[1:3] if batched else a.shape[1:2]
        rows = [a.reshape(len(a), math.prod(blocks(a)), -1) for a in leaves]
        made = []
        for a, (square, count) in zip(leaves, norm(rows), strict=True):
            scale = self.scale(count) if callable(self.scale) else self.scale
            # Where nothing moved there is nothing to credit, rather than 0/0.
            factor = jnp.where(square > 0, scale / jnp.where(square > 0, square, 1), 0)
            factor = jnp.broadcast_to(factor, (len(a), math.prod(blocks(a)), 1))
            made.append(factor.reshape(len(a), *blocks(a)))
        return structure.unflatten(made)
