"""How good an estimate will be, and how long a step it allows, before it is run."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from rbpjax.perturb.noise import Antithetic, Noise, coordinate, hadamard, orthonormal
from rbpjax.perturb.samples import size_of
from rbpjax.perturb.seeded import SeededPerturbation
from rbpjax.perturb.weight import WeightPerturbation
from rbpjax.types import PyTree

FRAMES = (orthonormal, coordinate, hadamard)


class Advice(NamedTuple):
    """What ``diagnose`` predicts; Python numbers, and sentences when printed.

    Attributes:
      size: d, the number of parameters.
      num_samples: K, the different directions of one estimate.
      orthogonal: whether these are orthogonal to each other.
      variance: E‖ĝ - g‖² / ‖g‖².
      cosine: the root mean square of the cosine between estimate and gradient.
      target: the cosine that was asked for.
      samples_needed: the least number of different directions that reaches it.
      step: the largest stable step, as a part of that of the exact gradient.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> rule = perturb.WeightPerturbation(num_samples=10)
      >>> advice = perturb.diagnose(jnp.zeros((9, 11)), rule)
      >>> round(advice.variance, 3), round(advice.cosine, 3)  # 98 / 10, √(10 / 108)
      (9.8, 0.304)
    """

    size: int
    num_samples: int
    orthogonal: bool
    variance: float
    cosine: float
    target: float
    samples_needed: int
    step: float

    def __repr__(self) -> str:
        """The advice in words."""
        kind = "orthogonal" if self.orthogonal else "independent"
        return (
            f"{self.num_samples:,} {kind} directions in {self.size:,} parameters: the "
            f"estimate is at a cosine of {self.cosine:.3g} "
            f"({_degrees(self.cosine):.0f}°) to the gradient, and its variance is "
            f"{self.variance:.3g} ‖g‖².\n"
            f"A cosine of {self.target:.3g} ({_degrees(self.target):.0f}°) takes "
            f"{self.samples_needed:,} of them.\n"
            f"The largest stable step is {self.step:.3g} times that of the exact "
            "gradient; half of it is the fastest."
        )

    __str__ = __repr__


def diagnose(
    params: PyTree,
    rule: WeightPerturbation | SeededPerturbation,
    *,
    cosine: float = 0.5,
    effective_rank: float | None = None,
) -> Advice:
    """Predicts angle, variance and largest stable step of a rule on any smooth loss.

    From formulas, in d parameters with K directions, where the difference is exact (or
    σ small). Nothing is run: cost and memory none. Independent of the loss are:

    * the angle: the mean square of its cosine is K / (K + d - 1) for independent
      directions and K / d for orthogonal ones (K ≤ d);
    * the variance: (d + 1) / K for ``normal`` and unknown noise, (d - 1) / K for
      ``rademacher`` and ``sphere``, d / K - 1 for orthogonal directions.

    The step compares SGD on a quadratic loss, whose expected loss falls from everywhere
    below a step of 2 / λ for the exact gradient and below

        (2 / λ) K / (K + 1 + r)

    for this one; λ is the largest curvature, r = tr H / λ the effective rank of the
    Hessian. Orthogonal directions: (2 / λ) (K / d)² / (a + b r), with
    b = K (d - K) / (d (d - 1) (d + 2)) and a = K (K + 2) / (d (d + 2)) - b.

    Exact are: for ``normal`` noise and ``orthonormal`` directions all of it, for
    ``rademacher``, ``sphere``, ``coordinate`` and ``hadamard`` (d a power of two) the
    variance and, of frames or single samples, the angle. The rest is close where the
    gradient is spread over many parameters. Directions of low rank are taken for full
    ones, those of ``Antithetic`` for half as many.

    Args:
      params: pytree of the parameters, or of their shapes.
      rule: a ``WeightPerturbation`` that draws once a sequence, or a
        ``SeededPerturbation``.
      cosine: the angle to ask for, a cosine in (0, 1).
      effective_rank: r, in [1, d]; None: d, the largest that it can be, for which the
        step is stable whatever the loss.

    Returns:
      An ``Advice``.

    Raises:
      ValueError: ``rule`` is none of those, ``params`` has no entries, ``cosine`` or
        ``effective_rank`` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> rule = perturb.WeightPerturbation(num_samples=100)
      >>> perturb.diagnose({"w": jnp.zeros((30, 30)), "b": jnp.zeros(1)}, rule)
      100 independent directions in 901 parameters: the estimate is at a cosine of \
0.316 (72°) to the gradient, and its variance is 9 ‖g‖².
      A cosine of 0.5 (60°) takes 300 of them.
      The largest stable step is 0.0998 times that of the exact gradient; half of it \
is the fastest.

    References:
      Variance and step: Nesterov and Spokoiny, "Random gradient-free minimization of
      convex functions", Foundations of Computational Mathematics 17, 2017. Effective
      rank: Malladi et al., https://arxiv.org/abs/2305.17333, section 4. The angle: of a
      Gaussian matrix V and a vector g, cos²(VᵀV g, g) is of a beta distribution.
    """
    once = isinstance(rule, WeightPerturbation) and not rule.every_step
    if not once and not isinstance(rule, SeededPerturbation):
        raise ValueError(
            "`rule` must be a WeightPerturbation that draws once a sequence, or a "
            f"SeededPerturbation; got {rule!r}. The variance of node rules depends on "
            "the data: see NodePerturbation."
        )
    if not 0 < cosine < 1:
        raise ValueError(f"`cosine` must be a number in (0, 1); got {cosine!r}.")
    size = size_of(params) if jax.tree.leaves(params) else 0
    if not size:
        raise ValueError(f"`params` must have entries; got {params!r}.")
    rank = size if effective_rank is None else effective_rank
    if not 1 <= rank <= size:
        raise ValueError(
            f"`effective_rank` must be in [1, {size}], the number of parameters; got "
            f"{effective_rank!r}. It is tr H / λ of a Hessian H."
        )
    drawn = _different(rule.noise, rule.num_samples)
    kind = rule.noise.noise if isinstance(rule.noise, Antithetic) else rule.noise
    # Frames of a SeededPerturbation are frames of a leaf.
    orthogonal = kind in FRAMES and isinstance(rule, WeightPerturbation)
    if orthogonal:
        drawn = min(drawn, size)
        mean_square, needed = drawn / size, cosine**2 * size
        variance, step = size / drawn - 1, _frame_step(size, drawn, rank)
    else:
        excess = -1 if getattr(kind, "__name__", "") in ("rademacher", "sphere") else 1
        mean_square = drawn / (drawn + size - 1)
        needed = cosine**2 * (size - 1) / (1 - cosine**2)
        variance, step = (size + excess) / drawn, drawn / (drawn + 1 + rank)
    return Advice(
        size=size,
        num_samples=drawn,
        orthogonal=orthogonal,
        variance=variance,
        cosine=mean_square**0.5,
        target=cosine,
        samples_needed=max(1, math.ceil(needed * (1 - 1e-12))),
        step=step,
    )


def _different(noise: Noise, num_samples: int) -> int:
    """How many directions are not another one's opposite."""
    return -(-num_samples // 2) if isinstance(noise, Antithetic) else num_samples


def _frame_step(d: int, k: int, rank: float) -> float:
    """1 / E ĝᵀHĝ for the worst g, with E P g gᵀ P = a g gᵀ + b ‖g‖² I."""
    b = k * (d - k) / (d * (d - 1) * (d + 2)) if d > 1 else 0.0
    a = k * (k + 2) / (d * (d + 2)) - b
    return (k / d) ** 2 / (a + b * rank)


def _degrees(cosine: float) -> float:
    return math.degrees(math.acos(min(cosine, 1.0)))
