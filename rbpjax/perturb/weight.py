"""Weight perturbation: noise on the parameters, for any loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from rbpjax._core.keys import check_key
from rbpjax._core.strategy import count, function, real, strategy, switch
from rbpjax.perturb.credit import Credit, causal
from rbpjax.perturb.difference import Difference, OneSided, sized, slopes
from rbpjax.perturb.noise import Noise, rademacher
from rbpjax.perturb.samples import (
    axis,
    check_chunk,
    draw,
    joined,
    mean_over_samples,
    scaled,
    size_of,
    spread,
    unflatten,
    weighted_sum,
    widest,
)
from rbpjax.perturb.seeded import (
    SeededDescent,
    SeededPerturbation,
    seeded_slopes,
    seeded_sum,
)
from rbpjax.types import PyTree


@strategy
class WeightPerturbation:
    """Estimates the gradient by noise v on all parameters at once.

        ∂L/∂θ ≈ mean over samples of  v (L(θ + σv) - L(θ)) / σ,

    with ``difference`` in place of the quotient. Unbiased up to O(σ²); unbiased with
    ``Exact()``, and with any σ for quadratic losses. The variance of one sample is
    d ± 1 times ‖g‖², d the number of parameters (see ``Noise``).

    With ``every_step`` (in ``recurrent_value_and_grad``) the noise is drawn anew at
    every step of a sequence, and ``credit`` decides what is estimated, as it does for
    ``NodePerturbation``. Its variance is higher than that of one draw a sequence.

    Cost: clean pass, and samples × the cost of ``difference``; memory ``chunk``
    parameter trees, whatever the number of samples. AD modes: none are needed, nor is
    its estimate meant to be differentiated.

    Attributes:
      num_samples: K, directions to average over.
      chunk: how many of them run at once; divides ``num_samples``. None: the largest
        divisor up to four, or with which the copies of the parameters have at most
        2¹⁷ entries in all (2²⁶ where JAX does not run on a CPU: not measured there).
      axis_name: an axis of the ``shard_map`` around, over which samples are divided:
        each device takes its share, of which ``chunk`` is a part, and the mean is that
        of one device with all of them. None: all samples here.
      difference: one of ``perturb.difference``, or a callable like them.
      noise: how directions are drawn: one of ``perturb.noise``, or a callable.
      every_step: draw anew at every step instead of once a sequence.
      credit: which losses count, with ``every_step``; unused without.
      scale: factor on the gradient; 1 for the estimate above.

    Raises:
      ValueError: a field is not of its kind or range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> rule = perturb.WeightPerturbation(  # a whole frame: the gradient itself
      ...     num_samples=2,
      ...     difference=perturb.difference.Exact(),
      ...     noise=perturb.noise.orthonormal,
      ... )
      >>> f = perturb.value_and_grad(lambda p: jnp.sum(p**2), rule)
      >>> p = jnp.array([1.0, 3.0])
      >>> value, grads = f(jax.random.key(0), p)
      >>> bool(jnp.max(jnp.abs(grads - 2 * p)) < 1e-5)
      True

    References:
      Baydin et al., "Gradients without Backpropagation",
      https://arxiv.org/abs/2202.08587: the case ``Exact()`` with ``normal``.
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
    every_step: bool = switch(default=False)
    credit: Credit = function(
        default=causal, meaning="a callable such as perturb.credit.causal"
    )
    scale: float = real(default=1.0)

    def __post_init__(self) -> None:
        check_chunk(self)


class PerturbedValueAndGrad(Protocol):
    """``f(key, params, *args, **kwargs) -> (value, grads)``."""

    def __call__(
        self, key: jax.Array, params: PyTree, *args: PyTree, **kwargs: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Returns the loss, or (loss, aux), and the estimate of its gradient."""
        ...


def value_and_grad(
    loss: Callable[..., PyTree],
    rule: WeightPerturbation | SeededPerturbation,
    *,
    has_aux: bool = False,
) -> PerturbedValueAndGrad:
    """Makes a function that returns a loss and its perturbation gradient.

    As ``jax.value_and_grad(loss)`` with a key before the arguments, and without a
    backward pass: see the rule for what it estimates, at what cost and memory. Works
    under ``jit``, ``vmap`` and ``scan``; not made to be differentiated. A loss that is
    not finite makes the gradient not finite, and is returned as it is.

    Args:
      loss: ``loss(params, *args, **kwargs) -> scalar``, or ``(scalar, aux)``.
      rule: a ``WeightPerturbation`` or a ``SeededPerturbation``.
      has_aux: whether ``loss`` returns a pair; aux is that of the clean pass.

    Returns:
      ``f(key, params, *args, **kwargs) -> (value, grads)`` or ``((value, aux),
      grads)``; grads have the structure, shapes and dtypes of ``params``.

    Raises:
      ValueError: ``rule`` is none of those or draws at every step; when
        called, if ``key`` is no PRNG key, ``loss`` returns no floating-point scalar, a
        leaf of ``params`` is not floating-point, or a callable of the rule does not
        return the shapes that it should.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> rule = perturb.WeightPerturbation(num_samples=1000, chunk=100)
      >>> f = perturb.value_and_grad(lambda p, x: jnp.sum(p["w"] * x), rule)
      >>> params, x = {"w": jnp.ones(2)}, jnp.array([1.0, 2.0])
      >>> value, grads = f(jax.random.key(0), params, x)
      >>> float(value), bool(jnp.all(jnp.abs(grads["w"] - x) < 0.5))
      (3.0, True)

    References:
      Züge, Klos, Memmesheimer, "Weight versus Node Perturbation Learning in Temporally
      Extended Tasks", PRX 13, 021006, 2023.
    """
    if not isinstance(rule, WeightPerturbation | SeededPerturbation):
        raise ValueError(
            "`rule` must be a WeightPerturbation or a SeededPerturbation, which work "
            f"on any loss; got {rule!r}. Node rules need a cell: "
            "recurrent_value_and_grad."
        )
    if isinstance(rule, WeightPerturbation) and rule.every_step:
        raise ValueError(
            "`rule` with every_step=True needs the steps: recurrent_value_and_grad."
        )

    def estimate(
        key: jax.Array, params: PyTree, *args: PyTree, **kwargs: PyTree
    ) -> tuple[PyTree, PyTree]:
        check_key(key)
        params = check_params(params)
        here, args, kwargs = spread(rule, (params, args, kwargs))
        full = lambda p: loss(p, *args, **kwargs)
        scalar = (lambda p: full(p)[0]) if has_aux else full
        _check_scalar(scalar, here)
        result = full(here)
        clean = result[0] if has_aux else result
        if isinstance(rule, SeededPerturbation):
            weights = seeded_slopes(rule, key, here, scalar, clean)
            zeros = jax.tree.map(jnp.zeros_like, params)
            return joined(rule, result), seeded_sum(rule, key, weights, zeros)
        return joined(rule, (result, weight_gradient(rule, key, here, scalar, clean)))

    return estimate


def seeded_descent(
    loss: Callable[..., jax.Array], rule: SeededPerturbation
) -> SeededDescent:
    """Makes a function that takes a step of gradient descent without a gradient.

        θ ← θ - rate × mean over samples of  v (L(θ + σv) - L(θ)) / σ

    The estimate is that of ``value_and_grad(loss, rule)``, unbiased as there, but it is
    added to the parameters while it is drawn, leaf by leaf, and never stored. Where the
    caller gives the parameters away (``jax.jit(…, donate_argnums=1)``), the memory of
    training is that of one perturbed pass beside the parameters.

    Departs from the paper in one point: perturbed parameters are computed from the
    clean ones, and not changed in place and back, which would leave rounding in them.

    Cost: clean pass, and samples × the cost of ``difference``, and every direction
    twice; memory the perturbed parameters, whatever the number of samples. Works under
    ``jit``, ``vmap`` and ``scan``; not made to be differentiated.

    Args:
      loss: ``loss(params, *args, **kwargs) -> scalar``.
      rule: a ``SeededPerturbation``.

    Returns:
      ``f(key, params, rate, *args, **kwargs) -> (value, params)``: the loss before the
      step, and the parameters after it, in their structure, shapes and dtypes.

    Raises:
      ValueError: ``rule`` is no ``SeededPerturbation``; when called, as
        ``value_and_grad``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax import perturb
      >>> rule = perturb.SeededPerturbation(num_samples=4)
      >>> step = perturb.seeded_descent(lambda w: jnp.sum((w - 1) ** 2), rule)
      >>> w, losses = jax.lax.scan(
      ...     lambda w, key: step(key, w, 0.05)[::-1],
      ...     jnp.zeros((3, 4)),
      ...     jax.random.split(jax.random.key(0), 200),
      ... )
      >>> bool(jnp.sum((w - 1) ** 2) < 1e-3)
      True

    References:
      Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS
      2023, https://arxiv.org/abs/2305.17333, Algorithm 1.
    """
    if not isinstance(rule, SeededPerturbation):
        raise ValueError(
            f"`rule` must be a SeededPerturbation; got {rule!r}. Of others take the "
            "gradient: value_and_grad."
        )

    def descend(
        key: jax.Array,
        params: PyTree,
        rate: jax.typing.ArrayLike,
        *args: PyTree,
        **kwargs: PyTree,
    ) -> tuple[jax.Array, PyTree]:
        check_key(key)
        params = check_params(params)
        here, args, kwargs = spread(rule, (params, args, kwargs))
        full = lambda p: loss(p, *args, **kwargs)
        _check_scalar(full, here)
        clean = full(here)
        weights = seeded_slopes(rule, key, here, full, clean)
        weights = -jnp.asarray(rate, weights.dtype) * weights
        return joined(rule, clean), seeded_sum(rule, key, weights, params)

    return descend


def _check_scalar(loss: Callable[[PyTree], jax.Array], params: PyTree) -> None:
    """Raises ValueError unless the loss is a floating-point scalar."""
    shape = jax.eval_shape(loss, params)
    scalar_shape = getattr(shape, "shape", None) == ()
    if not scalar_shape or not jnp.issubdtype(shape.dtype, jnp.floating):
        raise ValueError(
            "`loss` must return a scalar, a floating-point one; got "
            f"{shape}. Take the mean, or say "
            "has_aux=True if it returns (loss, auxiliary)."
        )


def weight_gradient(
    rule: WeightPerturbation,
    key: jax.Array,
    params: PyTree,
    losses: Callable[[PyTree], jax.Array],
    clean: jax.Array,
) -> PyTree:
    """The estimate for the sum of ``losses(params)``, which is ``clean`` there."""
    size, dtype = size_of(params), widest(params)
    difference = sized(rule.difference, params)

    def slope(direction: PyTree) -> jax.Array:
        move = lambda s: jax.tree.map(jnp.add, params, scaled(s, direction, params))
        return jnp.sum(slopes(difference, lambda s: losses(move(s)), clean))

    def chunk(indices: jax.Array) -> PyTree:
        flat = draw(rule.noise, key, indices, size, dtype)
        directions = jax.vmap(lambda v: unflatten(v, params))(flat)
        weights = rule.scale * jax.vmap(slope)(directions)
        return weighted_sum(weights, directions, params)

    return mean_over_samples(chunk, rule, size)


def check_params(params: PyTree) -> PyTree:
    """The parameters as arrays; ValueError for what cannot be perturbed."""
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"`params` must have floating-point leaves; got {jnp.result_type(leaf)}"
                f" at {jax.tree_util.keystr(path)}. Pass it among the other arguments, "
                "or close over it."
            )
    return jax.tree.map(jnp.asarray, params)
