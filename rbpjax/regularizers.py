"""Keeping a network convergent: penalties on J, and a bound on a kernel.

A recurrent network may leave the region where its iteration converges while it is
trained. The two penalties are added to the loss, weighted; the normalization makes the
bound part of the network.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from rbpjax._core import sharding, tree
from rbpjax._core.keys import check_key
from rbpjax._core.step import close
from rbpjax.types import LinearMap, PyTree, StepFn

__all__ = ["contraction_penalty", "jacobian_penalty", "spectral_normalize"]


def jacobian_penalty(
    key: jax.Array | None,
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h: PyTree,
    *,
    num_probes: int = 1,
    probes: PyTree | None = None,
) -> jax.Array:
    """An estimate of ‖J‖_F² / n, n being the number of entries of h.

    ‖J‖_F² = E‖Jᵀε‖² over ε ~ N(0, I) (Hutchinson), and ρ(J)² ≤ ‖J‖_F². Unbiased for
    any number of probes, in the value and in its gradient. The penalty shrinks all of
    J, the harmless part too; its weight is small (0.1 to 2 in the paper's experiments
    with one probe).

    Differentiable in params, inputs and h. Whether the dependence of h = h* on params
    counts is the caller's choice: ``jax.lax.stop_gradient(h)`` leaves it out, as the
    paper's code does, and saves an adjoint solve.

    Cost: ``num_probes`` VJPs of f and one linearization, twice that for the gradient;
    memory: the intermediate values of f for each probe.

    Args:
      key: PRNG key of the probes, a new one each training step; None with ``probes``.
      f: step function ``f(params, inputs, h) -> h``.
      params: pytree.
      inputs: pytree.
      h: the state, usually the fixed point.
      num_probes: number of probes, at least 1.
      probes: the ε themselves instead of a key: a pytree like h with one more, leading,
        axis. Over √n times an orthonormal basis the mean is exact.

    Returns:
      A scalar, the mean over probes.

    Raises:
      ValueError: if not exactly one of ``key`` and ``probes`` is given, ``key`` is no
        PRNG key, ``num_probes`` no Python int of at least 1, ``probes`` is not like h,
        or f changes the state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rbpjax.regularizers import jacobian_penalty
      >>> w = jnp.array([[0.0, 3.0], [-1.0, 0.0]])
      >>> f = lambda w, x, h: w @ h + x
      >>> basis = 2**0.5 * jnp.eye(2)
      >>> one = jnp.ones(2)
      >>> round(float(jacobian_penalty(None, f, w, one, one, probes=basis)), 3)
      5.0

    References:
      Bai, Koltun, Kolter, "Stabilizing Equilibrium Models by Jacobian Regularization",
      ICML 2021, equation 6, https://arxiv.org/abs/2106.14342.
    """
    vjp, h = _vjp(f, params, inputs, h)
    if (key is None) == (probes is None):
        raise ValueError("jacobian_penalty: give `key` or, with key=None, `probes`.")
    if key is not None:
        _check_count("num_probes", num_probes)
        check_key(key)
        probes = _normal(key, h, num_probes)
    probes = jax.tree.map(jnp.asarray, probes)
    leads = {u.shape[:1] for u in jax.tree.leaves(probes)}
    if len(leads) != 1 or leads <= {(), (0,)}:
        shapes = jax.tree.map(jnp.shape, probes)
        raise ValueError(
            "`probes` must have one leading axis for all leaves, over at least one "
            f"probe; got {shapes}."
        )
    describe = lambda t: jax.tree.map(lambda u: (u.shape, str(u.dtype)), t)
    if describe(jax.tree.map(lambda u: u[0], probes)) != describe(h):
        raise ValueError(
            "`probes` must be like `h` with one more leading axis; got "
            f"{describe(probes)} for {describe(h)}."
        )

    def square(probe: PyTree) -> jax.Array:
        v = vjp(probe)
        return tree.vdot(v, v)

    return jnp.mean(jax.vmap(square)(probes)) / _size(h)


def contraction_penalty(
    f: StepFn,
    params: PyTree,
    inputs: PyTree,
    h: PyTree,
    *,
    bound: float = 0.9,
) -> jax.Array:
    """The excess of J's column sums over a bound: mean of ((Jᵀ1)ᵢ - bound)₊².

    One VJP with ones gives the column sums. For J ≥ 0 they bound ρ(J) (the largest of
    them is ‖J‖₁), so that the penalty is zero only if ρ(J) ≤ bound. In general it is a
    heuristic: the sums are signed, excitation and inhibition cancel, and J = -2I costs
    nothing. Unlike ``jacobian_penalty`` it leaves alone what is below the bound, and
    has no noise.

    Differentiable in params, inputs and h, as ``jacobian_penalty`` is.

    Cost: one VJP of f, twice that for the gradient.

    Args:
      f: step function ``f(params, inputs, h) -> h``.
      params: pytree.
      inputs: pytree.
      h: the state, usually the fixed point; real.
      bound: what a column may sum to, in [0, 1) for a contraction.

    Returns:
      A scalar.

    Raises:
      ValueError: if h is complex, ``bound`` is a negative number, or f changes the
        state.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.regularizers import contraction_penalty
      >>> w = jnp.array([[1.0, 0.2], [0.9, 0.3]])  # columns sum to 1.9 and 0.5
      >>> f = lambda w, x, h: w @ h + x
      >>> float(contraction_penalty(f, w, jnp.ones(2), jnp.ones(2)).round(3))
      0.5

    References:
      Linsley et al., "Stable and expressive recurrent vision models", NeurIPS 2020,
      section 4, https://arxiv.org/abs/2005.11362. The mean of squares is that of their
      code; the paper writes the norm.
    """
    if isinstance(bound, (int, float)) and not bound >= 0:
        raise ValueError(f"`bound` must not be negative; got {bound}.")
    vjp, h = _vjp(f, params, inputs, h)
    if any(jnp.iscomplexobj(u) for u in jax.tree.leaves(h)):
        raise ValueError("contraction_penalty: `h` must be real; got complex leaves.")
    sums = vjp(jax.tree.map(jnp.ones_like, h))
    excess = jax.tree.map(
        lambda u: jnp.maximum(u - jnp.asarray(bound, u.dtype), 0), sums
    )
    return tree.vdot(excess, excess) / _size(h)


def spectral_normalize(
    kernel: jax.Array, target: ArrayLike, *, num_steps: int | None = None
) -> jax.Array:
    """The kernel, scaled down where its largest singular value σ exceeds ``target``.

    f(h) = φ(Wh + x) with |φ′| ≤ 1 contracts if ‖W‖₂ < 1, so that a target below 1 makes
    the network convergent whatever its training does: apply it inside f to the kernel.
    A kernel with σ ≤ target is returned as it is, and with its gradient.

    A kernel of more than two axes is taken as the matrix (all but the last) × last, as
    for dense layers and flax's convolutions (…, in, out). As an operator on images,
    with circular or zero padding, a convolution of k taps has a norm of at most √k
    times this σ: divide the target by √k for a guarantee.

    Exact by a singular value decomposition, or, with ``num_steps``, by the power method
    from a fixed start: σ from below, and the result that much above the target. The
    gradient is that of the exact σ in the limit of many steps.

    Cost: O(m n min(m, n)) for an m × n matrix; O(m n) a step of the power method. AD
    modes: all.

    Args:
      kernel: array of at least two axes.
      target: the largest singular value allowed, positive; what is traced and is not
        gives NaN.
      num_steps: ``None``: exact; or the number of steps of the power method.

    Returns:
      An array like ``kernel``.

    Raises:
      ValueError: if ``kernel`` is not a floating-point array of at least two axes,
        ``target`` is a number that is not positive, or ``num_steps`` is no Python int
        of at least 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.regularizers import spectral_normalize
      >>> kernel = jnp.array([[4.0, 0.0], [0.0, 1.0]])
      >>> spectral_normalize(kernel, 0.5).tolist()
      [[0.5, 0.0], [0.0, 0.125]]

    References:
      Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR
      2018, https://arxiv.org/abs/1802.05957, who scale to σ = 1 always. The bound for
      convolutions: Sedghi, Gupta, Long, ICLR 2019, https://arxiv.org/abs/1805.10408.
    """
    kernel = jnp.asarray(kernel)
    if kernel.ndim < 2 or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(
            "`kernel` must be a floating-point array of at least two axes; got "
            f"{kernel.dtype}{list(kernel.shape)}."
        )
    if isinstance(target, (int, float)) and not target > 0:
        raise ValueError(f"`target` must be positive; got {target}.")
    if num_steps is not None:
        _check_count("num_steps", num_steps)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    matrix = matrix.astype(tree.real_dtype(matrix))  # float32 at least
    if num_steps is None:
        sigma = jnp.linalg.norm(matrix, 2)
    else:
        sigma = _power_method(matrix, num_steps)
    target = jnp.asarray(target, sigma.dtype)
    large = sigma > target
    factor = jnp.where(large, target / jnp.where(large, sigma, 1), 1)
    factor = jnp.where(target > 0, factor, jnp.nan)
    return kernel * factor.astype(kernel.dtype)


def _power_method(matrix: jax.Array, num_steps: int) -> jax.Array:
    """σ = uᵀWv, with the gradient uvᵀ that it has where u and v are singular."""
    fixed = lax.stop_gradient(matrix)

    def step(v: jax.Array, _: None) -> tuple[jax.Array, None]:
        # In between too: the square of a large or small kernel is out of range.
        return tree.to_unit(fixed.T @ tree.to_unit(fixed @ v)[0])[0], None

    start = jax.random.normal(jax.random.key(0), matrix.shape[1:], matrix.dtype)
    v, _ = lax.scan(step, tree.to_unit(start)[0], length=num_steps)
    u = tree.to_unit(fixed @ v)[0]
    return u @ (matrix @ v)


def _check_count(name: str, value: object) -> None:
    """Raises ValueError unless ``value`` is a Python int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be at least 1; got {value!r}, no such int.")


def _vjp(
    f: StepFn, params: PyTree, inputs: PyTree, h: PyTree
) -> tuple[LinearMap, PyTree]:
    """The map v ↦ Jᵀv at h, and h as arrays."""
    step, args, h = close(f, params, inputs, h)
    vjp = jax.vjp(partial(step, args), h)[1]
    return lambda v: vjp(v)[0], h


def _normal(key: jax.Array, like: PyTree, num: int) -> PyTree:
    """``num`` draws of N(0, I), stacked."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    draws = [
        jax.random.normal(k, (num, *u.shape), u.dtype)
        for k, u in zip(keys, leaves, strict=True)
    ]
    return sharding.vary_like(jax.tree.unflatten(treedef, draws), like)


def _size(h: PyTree) -> int:
    """The number of entries."""
    return sum(u.size for u in jax.tree.leaves(h))
