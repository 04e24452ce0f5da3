"""The scalings of the authors' public code, for comparison with it."""

from __future__ import annotations

from typing import NamedTuple

from rbpjax.perturb.activity import ActivityPerturbation
from rbpjax.perturb.credit import instant
from rbpjax.perturb.difference import OneSided
from rbpjax.perturb.node import NodePerturbation
from rbpjax.perturb.noise import normal
from rbpjax.perturb.norm import per_layer_step
from rbpjax.perturb.weight import WeightPerturbation


class PaperCode(NamedTuple):
    """The three rules of the code, made by ``paper_code``.

    Attributes:
      weight: ``WeightPerturbation``, noise drawn at every step.
      node: ``NodePerturbation``.
      activity: ``ActivityPerturbation``.

    Example:
      >>> from rbpjax import perturb
      >>> perturb.paper_code(100, sigma=1e-3).node.scale
      0.001
    """

    weight: WeightPerturbation
    node: NodePerturbation
    activity: ActivityPerturbation


def paper_code(num_units: int, *, sigma: float = 1e-3) -> PaperCode:
    """Makes the rules as the authors' public code has them (2024), scalings included.

    One clean and one noisy pass, Gaussian noise, ``instant`` credit, so that all three
    estimate (at best) the gradient truncated to one step. Node and weight perturbation
    divide by σ, not σ²: their gradients are σ times ours. Activity perturbation divides
    by the squared Frobenius norm of a layer's δa at a step, over the batch, and
    multiplies by √N with N all units of the network, inputs included.

    To agree with that code the loss must be one scalar, the mean over examples and
    outputs. Departs from it in one place: there weight noise on R at the first step is
    not credited, which changes nothing but variance, since the state is zero.

    Args:
      num_units: N = inputs + hidden units + outputs.
      sigma: the size of the noise.

    Returns:
      A ``PaperCode`` of three rules.

    Raises:
      ValueError: an argument is not of its kind or range.

    Example:
      >>> from rbpjax import perturb
      >>> perturb.paper_code(100).activity.scale
      10.0

    References:
      https://github.com/jesusgf96/NP_RNNs at 0a33229.
    """
    if isinstance(num_units, bool) or not isinstance(num_units, int) or num_units < 1:
        raise ValueError(f"`num_units` must be a positive int; got {num_units!r}.")
    difference = OneSided(sigma=sigma)
    shared = dict(difference=difference, noise=normal, credit=instant)
    return PaperCode(
        WeightPerturbation(every_step=True, scale=sigma, **shared),
        NodePerturbation(scale=sigma, **shared),
        ActivityPerturbation(norm=per_layer_step, scale=num_units**0.5, **shared),
    )
