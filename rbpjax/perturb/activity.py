"""Activity-based node perturbation: the change of the activity, credited."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rbpjax._core.strategy import count, function, option, strategy
from rbpjax.perturb.credit import Credit, causal, instant
from rbpjax.perturb.difference import Difference, OneSided
from rbpjax.perturb.node import Derivative, credited, credits
from rbpjax.perturb.noise import Noise, rademacher
from rbpjax.perturb.norm import Norm, check_blocks, per_layer_step
from rbpjax.perturb.samples import axis, check_chunk
from rbpjax.types import PyTree


def _is_scale(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number or callable(value)


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

    Cost: as ``NodePerturbation``; memory ``chunk`` × (T × nodes). AD modes: none are
    needed, nor is its estimate meant to be differentiated.

    Attributes:
      num_samples: K, directions to average over.
      chunk: how many of them run at once; divides ``num_samples``. None: the largest
        divisor up to four, or with which the nodes, over all steps, have at most
        2¹⁷ entries in all (2²⁶ where JAX does not run on a CPU: not measured there).
      axis_name: an axis of the ``shard_map`` around, over which samples are divided:
        each device takes its share, of which ``chunk`` is a part, and the mean is that
        of one device with all of them. None: all samples here.
      difference: one of ``perturb.difference``, or a callable like them.
      noise: how directions are drawn: one of ``perturb.noise``, or a callable.
      credit: which losses count for nodes that feed the state: one of
        ``perturb.credit``, or a callable.
      readout_credit: the same for ``Nodes.readout``.
      norm: one of ``perturb.norm``, a callable like them, or None for the raw δa/σ.
      scale: the factor for a block of N entries: ``float`` is N, ``math.sqrt`` is √N; a
        number is itself. Unused where ``norm`` is None.

    A block with δa = 0 gets error 0.

    Raises:
      ValueError: a field is not of its kind or range.

    Example:
      >>> from rbpjax import perturb
      >>> perturb.ActivityPerturbation(num_samples=64, scale=2.0)
      ActivityPerturbation(num_samples=64, scale=2.0)

    References:
      García Fernández, Keemink, van Gerven, "Gradient-Free Training of Recurrent
      Neural Networks using Random Perturbations", https://arxiv.org/abs/2405.08967.
      The scalings of its public code are ``paper_code``.
    """

    num_samples: int = count(default=1)
    chunk: int | None = count(default=None)
    axis_name: str | None = axis()
    difference: Difference = function(
        default=OneSided(), meaning="a callable such as perturb.difference.Exact()"
    )
    noise: Noise = function(
        default=rademacher, meaning="a callable such as perturb.noise.rademacher"
    )
    credit: Credit = function(
        default=causal, meaning="a callable such as perturb.credit.causal"
    )
    readout_credit: Credit = function(
        default=instant, meaning="a callable such as perturb.credit.instant"
    )
    norm: Norm | None = option(
        default=per_layer_step,
        check=lambda value: value is None or callable(value),
        meaning="None or a callable such as perturb.norm.per_layer_step",
    )
    scale: Callable[[int], float] | float = option(
        default=float,
        check=_is_scale,
        meaning="a Python number or a function of the number of nodes, such as sqrt",
    )

    def __post_init__(self) -> None:
        check_chunk(self)

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
        found = norm(rows)
        check_blocks(found, rows)
        for a, (square, size) in zip(leaves, found, strict=True):
            scale = self.scale(size) if callable(self.scale) else self.scale
            # Where nothing moved there is nothing to credit, rather than 0/0.
            factor = jnp.where(square > 0, scale / jnp.where(square > 0, square, 1), 0)
            factor = jnp.broadcast_to(factor, (len(a), math.prod(blocks(a)), 1))
            made.append(factor.reshape(len(a), *blocks(a)))
        return structure.unflatten(made)
