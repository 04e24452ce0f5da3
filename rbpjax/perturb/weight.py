"""Weight perturbation: noise on the parameters, for any loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rbpjax.perturb.credit import Credit, causal
from rbpjax.perturb.difference import Difference, OneSided
from rbpjax.perturb.noise import Noise, rademacher, scaled, size_of, unflatten, widest
from rbpjax.perturb.samples import check_callable, check_samples, mean_over_samples
from rbpjax.types import PyTree, check_real, strategy


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
    parameter trees, whatever the number of samples.

    Attributes:
      num_samples: K, directions to average over.
      chunk: how many of them run at once; divides ``num_samples``; None: all.
      difference: ``OneSided``, ``Central``, ``Exact``, or a callable like them.
      noise: how directions are drawn; see ``Noise``.
      every_step: draw anew at every step instead of once a sequence.
      credit: which losses count, with ``every_step``; unused without.
      scale: factor on the gradient; 1 for the estimate above.

    Raises:
      ValueError: a field is not of its kind or range.

    Example:
      >>> from rbpjax.perturb import Exact, orthonormal
      >>> rule = WeightPerturbation(2, difference=Exact(), noise=orthonormal)
      >>> f = value_and_grad(lambda p: jnp.sum(p**2), rule)
      >>> f(jax.random.key(0), jnp.array([1.0, 3.0]))[1].round(6)
      Array([2., 6.], dtype=float64)

    References:
      Baydin et al., "Gradients without Backpropagation",
      https://arxiv.org/abs/2202.08587: the case ``Exact()`` with ``normal``.
    """

    num_samples: int = 1
    chunk: int | None = None
    difference: Difference = OneSided()
    noise: Noise = rademacher
    every_step: bool = False
    credit: Credit = causal
    scale: float = 1.0

    def __post_init__(self):
        check_samples(self, self.num_samples, self.chunk)
        check_callable(self, "difference", self.difference, "OneSided(1e-4) or Exact()")
        check_callable(self, "noise", self.noise, "rademacher or normal")
        check_callable(self, "credit", self.credit, "causal or Trace(0.9)")
        check_real(self, "scale", self.scale)
        if not isinstance(self.every_step, bool):
            raise ValueError(
                f"WeightPerturbation: `every_step` must be True or False; got "
                f"{self.every_step!r}."
            )


def value_and_grad(
    loss: Callable[..., Any], rule: WeightPerturbation, *, has_aux: bool = False
) -> Callable[..., tuple[Any, PyTree]]:
    """Makes a function that returns a loss and its perturbation gradient.

    As ``jax.value_and_grad(loss)`` with a key before the arguments, and without a
    backward pass: see ``WeightPerturbation`` for what it estimates and costs. Works
    under ``jit``, ``vmap`` and ``scan``. A loss that is not finite makes the gradient
    not finite, and is returned as it is.

    Args:
      loss: ``loss(params, *args, **kwargs) -> scalar``, or ``(scalar, aux)``.
      rule: a ``WeightPerturbation``.
      has_aux: whether ``loss`` returns a pair; aux is that of the clean pass.

    Returns:
      ``f(key, params, *args, **kwargs) -> (value, grads)`` or ``((value, aux),
      grads)``; grads have the structure, shapes and dtypes of ``params``.

    Raises:
      ValueError: ``rule`` is no ``WeightPerturbation`` or draws at every step; when
        called, if ``loss`` returns no scalar or a leaf of ``params`` is not
        floating-point.

    Example:
      >>> rule = WeightPerturbation(num_samples=1000, chunk=100)
      >>> f = value_and_grad(lambda p, x: jnp.sum(p["w"] * x), rule)
      >>> value, grads = f(jax.random.key(0), {"w": jnp.ones(2)}, jnp.array([1.0, 2.0]))
      >>> float(value), bool(jnp.all(jnp.abs(grads["w"] - jnp.array([1.0, 2.0])) < 0.5))
      (3.0, True)
    """
    if not isinstance(rule, WeightPerturbation):
        raise ValueError(
            "`rule` must be a WeightPerturbation, which works on any loss; got "
            f"{rule!r}. Node rules need a cell: recurrent_value_and_grad."
        )
    if rule.every_step:
        raise ValueError(
            "`rule` with every_step=True needs the steps: recurrent_value_and_grad."
        )

    def estimate(key: jax.Array, params: PyTree, *args: Any, **kwargs: Any) -> Any:
        params = check_params(params)
        full = lambda p: loss(p, *args, **kwargs)
        scalar = (lambda p: full(p)[0]) if has_aux else full
        shape = jax.eval_shape(scalar, params)
        if getattr(shape, "shape", None) != ():
            raise ValueError(
                f"`loss` must return a scalar; got {shape}. Take the mean, or say "
                "has_aux=True if it returns (loss, auxiliary)."
            )
        result = full(params)
        clean = result[0] if has_aux else result
        return result, weight_gradient(rule, key, params, scalar, clean)

    return estimate


def weight_gradient(
    rule: WeightPerturbation,
    key: jax.Array,
    params: PyTree,
    losses: Callable[[PyTree], jax.Array],
    clean: jax.Array,
) -> PyTree:
    """The estimate for the sum of ``losses(params)``, which is ``clean`` there."""
    size, dtype = size_of(params), widest(params)

    def slope(direction: PyTree) -> jax.Array:
        move = lambda s: jax.tree.map(jnp.add, params, scaled(s, direction, params))
        return jnp.sum(rule.difference(lambda s: losses(move(s)), clean))

    def chunk(indices: jax.Array) -> PyTree:
        flat = rule.noise(key, indices, size, dtype)
        directions = jax.vmap(lambda v: unflatten(v, params))(flat)
        slopes = rule.scale * jax.vmap(slope)(directions)
        return weighted_sum(slopes, directions, params)

    return mean_over_samples(chunk, rule.num_samples, rule.chunk)


def weighted_sum(weights: jax.Array, trees: PyTree, like: PyTree) -> PyTree:
    """Σ_k weights_k trees_k over the leading axis, in the dtypes of ``like``."""
    return jax.tree.map(
        lambda v, leaf: jnp.tensordot(
            weights.astype(leaf.dtype), v.astype(leaf.dtype), 1
        ),
        trees,
        like,
    )


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
