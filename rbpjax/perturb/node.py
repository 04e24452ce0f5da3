"""Node perturbation: noise on the pre-activations, credited with the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax

from rbpjax._core.strategy import count, function, real, strategy
from rbpjax.perturb.cell import Nodes
from rbpjax.perturb.credit import Credit, causal, instant
from rbpjax.perturb.difference import Difference, OneSided
from rbpjax.perturb.noise import Noise, rademacher
from rbpjax.perturb.samples import axis, check_chunk, check_result
from rbpjax.types import PyTree

Derivative = Callable[[bool], tuple[jax.Array, PyTree]]
"""(δL/σ ``[T, samples, …]``, δa/σ if asked for), of all samples of a chunk."""


@strategy
class NodePerturbation:
    """Estimates the error of each node by noise ξ_t added to it.

        e_t = credit(δL)_t ξ_t / σ,    ∂L/∂W ≈ Σ_t e_t x_tᵀ,

    averaged over samples; x_t is the clean input of the layer. What it estimates is
    decided by the credit, up to O(σ²) (not at all with ``Exact()``):

    * ``causal``, ``total``: the gradient through time. Unbiased.
    * ``instant``: the gradient of BPTT truncated to one step. Biased wherever memory
      matters.

    The variance grows with the number of nodes, steps and examples, not with the number
    of weights. For a matrix W of m rows with input x, all of the loss credited
    (``total``) and Gaussian noise: E‖Ĝ - G‖² = m ‖g‖² Σ_t‖x_t‖² + ‖G‖², g the errors of
    all nodes, steps and examples.

    Cost: clean pass, samples × the cost of ``difference``, one product a matrix; memory
    ``chunk`` × (T × nodes), and no copy of the parameters. To be used with
    ``recurrent_value_and_grad``. AD modes: none are needed, nor is its estimate meant
    to be differentiated.

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
      readout_credit: the same for ``Nodes.readout``. ``instant`` is exact there.
      scale: factor on the gradient; 1 for the estimates above.

    Raises:
      ValueError: a field is not of its kind or range.

    Example:
      >>> from rbpjax import perturb
      >>> perturb.NodePerturbation(num_samples=64, chunk=16)
      NodePerturbation(num_samples=64, chunk=16)

    References:
      Züge, Klos, Memmesheimer, "Weight versus Node Perturbation Learning in Temporally
      Extended Tasks", PRX 13, 021006, 2023.
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
    scale: float = real(default=1.0)

    def __post_init__(self) -> None:
        check_chunk(self)

    def errors(
        self, derivative: Derivative, directions: PyTree, like: PyTree, batched: bool
    ) -> PyTree:
        """The node errors of all samples, ``[T, samples, …]``."""
        del batched
        delta, _ = derivative(False)
        return credited(credits(self, self.scale * delta, like), directions, like)


class _Credited(Protocol):
    """A rule that credits nodes, those that feed the state apart from the others."""

    @property
    def credit(self) -> Credit: ...

    @property
    def readout_credit(self) -> Credit: ...


def credits(rule: _Credited, delta: jax.Array, like: PyTree) -> PyTree:
    """For each leaf of nodes its credits, by step, sample and example."""
    fill = lambda credit, nodes: jax.tree.map(lambda _: credit, nodes)
    recurrent = credited_with(rule.credit, "credit", delta)
    if not isinstance(like, Nodes):
        return fill(recurrent, like)
    readout = credited_with(rule.readout_credit, "readout_credit", delta)
    return Nodes(fill(recurrent, like.recurrent), fill(readout, like.readout))


def credited_with(credit: Credit, name: str, delta: jax.Array) -> jax.Array:
    """``credit(delta)``; ValueError if it has another shape."""
    made = credit(delta)
    check_result(made, delta, f"{name}(delta)")
    return made


def credited(credits: PyTree, nodes: PyTree, like: PyTree) -> PyTree:
    """Leaves ``[T, samples, …]`` times their credits, in the dtypes of ``like``."""

    def product(credit: jax.Array, v: jax.Array, a: jax.Array) -> jax.Array:
        credit = credit.reshape(credit.shape + (1,) * (v.ndim - credit.ndim))
        return credit.astype(a.dtype) * v.astype(a.dtype)

    return jax.tree.map(product, credits, nodes, like)
