"""How wrong a gradient through a fixed point may be: by products, or by solves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax._core.step import ClosedStep, floats
from rbpjax.fixed_point.backward.adaptive import Adaptive
from rbpjax.fixed_point.backward.rule import apply_rule
from rbpjax.fixed_point.iterate import ratio
from rbpjax.types import PyTree, Solution, Status

FAR = 0.1
"""Of its size, an error of the state from which nothing is said of the gradient."""


class Bound(NamedTuple):
    """What is known of a gradient's relative error.

    Attributes:
      error: a bound on it; infinite where nothing can be said.
      accuracy: what counts as converged, √ε of the coarsest arithmetic inside f.
    """

    error: jax.Array
    accuracy: jax.Array


def error_bound(
    step: ClosedStep,
    args: PyTree,
    h: PyTree,
    image: PyTree,
    vjp: Callable[[PyTree], Any],
    g: PyTree,
    z: PyTree,
    found: Solution,
    verify: bool = False,
) -> Bound:
    """A bound on the relative error of the gradient (∂f/∂args)ᵀz, by eight products.

    An estimate, not a proof. Three things may be wrong: the state, the adjoint, and the
    arithmetic. The state is moved by as far as its residual may be from the fixed
    point, and what this changes is measured; the adjoint's residual counts as often as
    solving amplifies; the arithmetic is measured by the difference of a product and of
    its two parts. Norms are relative within each leaf. It is a bound for the cotangent
    that was given: how the loss bends is not known here, but the gradient is not
    called better than the state.

    Args:
      step: the closed step function.
      args: its arguments.
      h: the state found, near a fixed point.
      image: f(h).
      vjp: of the step at (args, h): a pair, of args and of h.
      g: the cotangent.
      z: the adjoint found, (I - Jᵀ) z = g.
      found: the forward solve. Of a state that it did not bring to rest nothing is
        said.
      verify: whether solves join in (see ``_followed``); the larger estimate counts.
    """
    eps = tree.coarsest_eps(h)
    unit, noise = _random(h)
    forward = _Norm.of(h, image)
    backward = _Norm.of(g, z)

    gradient, product = vjp(z)
    r = tree.sub(tree.add(g, product), z)
    part = jax.tree.map(lambda m, x: m.astype(x.dtype) * x, unit, z)
    ones, others = vjp(part), vjp(tree.sub(z, part))
    lost = tree.sub(tree.add(ones[1], others[1]), product)
    lost_gradient = _difference(_sum(ones[0], others[0]), gradient)
    # Of a product that is small by cancellation (h - F(h), Newton's steps), z's own
    # rounding is most of what is lost.
    own = jnp.maximum(backward(lost) - 4 * eps * backward(z), 0)
    precision = 4 * ratio(own, backward(product))
    # Below, it is that of the state itself, of which a few roundings are seen.
    precision = jnp.where(precision > 16 * eps, precision, eps)
    rounding = eps * (backward(g) + backward(z) + backward(product)) + backward(lost)

    q = tree.sub(image, h)
    size = forward(q)
    # What tends to zero is small beside what it was, as the solver knows.
    beside = jnp.where(size > found.residual, ratio(found.residual, size), 1)
    next_q = tree.sub(step(args, image), image)
    rate = ratio(forward(next_q), size)
    slow = (rate < 1) & (size > 8 * eps)
    reach = jnp.where(slow, 1 / (1 - jnp.where(slow, rate, 0)), 1)
    # What one leaf amplifies is small in the norm of all of them; the cotangent comes
    # into a leaf by itself, or by Jᵀg.
    sizes = _leaf_rms(z), jnp.maximum(_leaf_rms(g), _leaf_rms(vjp(g)[1]))
    by_leaf = jnp.where(sizes[1] > 0, ratio(*sizes), 0)
    amplified = jnp.maximum(reach, jnp.maximum(jnp.max(by_leaf), 1))
    amplified = jnp.maximum(amplified, ratio(backward(z), backward(g)))

    # As far as the fixed point may be: by the residual, and by rounding.
    error = jax.tree.map(
        lambda x, y, sign: (
            x + precision.astype(x.dtype) * sign * jnp.abs(y).astype(x.dtype)
        ),
        q,
        image,
        noise,
    )
    d = tree.scale(amplified, error)
    away = forward(d) * beside.astype(size.dtype)
    _, moved_vjp = jax.vjp(step, args, tree.add(h, d))
    other_gradient, other_product = moved_vjp(z)
    bend = backward(tree.sub(other_product, product))
    adjoint = ratio(amplified * (backward(r) + rounding + bend), backward(z))
    terms = [
        adjoint,
        away,
        _relative(_difference(other_gradient, gradient), gradient),
        _relative(lost_gradient, gradient),
    ]
    total = jnp.sqrt(sum(jnp.square(term.astype(away.dtype)) for term in terms))
    if verify:
        sizes = (_leaf_rms(x) for x in (g, z, product))
        noise = jnp.hypot(eps * jnp.sqrt(sum(s * s for s in sizes)), _leaf_rms(lost))
        given = args, h, z, q, r, precision * _leaf_rms(image), noise
        total = jnp.maximum(total, _followed(step, *lax.stop_gradient(given)))
    finite = jnp.isfinite(tree.max_abs(z)) & jnp.isfinite(_largest(gradient))
    settled = (found.status == Status.CONVERGED) | (found.status == Status.ROUNDING)
    known = (total < 0.5) & (away < FAR) & finite & settled  # False for NaN
    # Beside a z that overflows, nearly, g may vanish: then nothing is known.
    nothing = tree.max_abs(g) == 0
    known &= (backward(z) > 0) & (backward(g) > 0)
    known_or_none = jnp.where(known, total / (1 - jnp.where(known, total, 0)), jnp.inf)
    return Bound(
        jnp.where(nothing & finite, 0, known_or_none),
        jnp.sqrt(jnp.minimum(precision, 2**-7)),
    )


def _followed(
    step: ClosedStep,
    args: PyTree,
    h: PyTree,
    z: PyTree,
    q: PyTree,
    r: PyTree,
    q_noise: jax.Array,
    r_noise: jax.Array,
) -> jax.Array:
    """The gradient's relative error, with the residuals followed through both solves.

    d = (I - J)⁻¹ (q + noise) is the error of the state. It changes the residual of the
    adjoint, whose error is e = (I - Jᵀ)⁻¹ (r + that + noise), and the gradient. Noise
    is as large as rounding and residual are, leaf by leaf: a residual may by chance
    have nothing of the direction that solving amplifies most. Two draws, for one may be
    ten times too small in one case of sixteen.
    """
    # Noise lies to 1/√n in any one direction: a solve that stops above sees it not.
    numbers = sum(
        tree.entries(u) * (1 + jnp.iscomplexobj(u)) for u in jax.tree.leaves(h)
    )
    tol = max(min(0.03, 1 / (3 * numbers**0.5)), 8 * tree.coarsest_eps(h))
    rule = Adaptive(tol=tol)
    _, jvp = jax.linearize(lambda h: step(args, h), h)
    _, vjp = jax.vjp(step, args, h)
    gradient, product = vjp(z)
    forward = _Norm.of(h)

    def noisy(x: PyTree, sizes: jax.Array, signs: PyTree) -> PyTree:
        noise = tree.scale_leaves(sizes + _leaf_rms(x), signs)
        return tree.add(x, tree.cast_like(noise, x))

    def draw(signs: tuple[PyTree, PyTree]) -> jax.Array:
        d = apply_rule(rule, jvp, noisy(q, q_noise, signs[0]))
        _, moved_vjp = jax.vjp(step, args, tree.add(h, d.value))
        other_gradient, other_product = moved_vjp(z)
        left = tree.add(r, tree.sub(other_product, product))
        e = apply_rule(rule, lambda v: vjp(v)[1], noisy(left, r_noise, signs[1]))
        change = _sum(_difference(other_gradient, gradient), vjp(e.value)[0])
        known = d.converged & e.converged & (forward(d.value) < FAR)
        return jnp.where(known, _relative(change, gradient), jnp.inf)

    draws = [(_random(h, 2 * k)[1], _random(h, 2 * k + 1)[1]) for k in range(2)]
    # A loop: what both solves start from is then one array, not one for each reader
    # with a rounding of its own.
    errors = lax.map(draw, jax.tree.map(lambda *x: jnp.stack(x), *draws))
    return jnp.sqrt(jnp.mean(errors * errors))


class _Norm(NamedTuple):
    """A norm in which all leaves count alike: each relative to its own size."""

    sizes: jax.Array

    @classmethod
    def of(cls, *states: PyTree) -> _Norm:
        """Leaves in units of their largest size in ``states``."""
        return cls(jnp.max(jnp.stack([_leaf_rms(x) for x in states]), axis=0))

    def __call__(self, x: PyTree) -> jax.Array:
        return jnp.linalg.norm(ratio(_leaf_rms(x), self.sizes))


def _leaf_rms(x: PyTree) -> jax.Array:
    """The root mean square of each leaf, of any magnitude."""

    def leaf(u: jax.Array) -> jax.Array:
        norm = tree.to_unit(u)[1]
        return norm / tree.entries(u) ** 0.5

    dtype = tree.real_dtype(x)
    return jnp.stack([leaf(u).astype(dtype) for u in jax.tree.leaves(x)])


def _random(h: PyTree, seed: int = 0) -> tuple[PyTree, PyTree]:
    """Numbers in (0, 1), and signs, like the state; the same ones for the same seed."""
    leaves, treedef = jax.tree.flatten(h)
    key = sharding.own_key(jax.random.key(seed))
    keys = jax.random.split(key, (2, len(leaves)))
    draw = lambda make, row: sharding.typed_like(
        jax.tree.unflatten(
            treedef,
            [make(k, x) for k, x in zip(keys[row], leaves, strict=True)],
        ),
        h,
    )
    unit = lambda k, x: jax.random.uniform(k, x.shape, jnp.float32).astype(x.dtype)
    sign = lambda k, x: jax.random.rademacher(k, x.shape, jnp.float32).astype(x.dtype)
    return draw(unit, 0), draw(sign, 1)


def _sum(x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, floats(x), floats(y))


def _difference(x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(jnp.subtract, floats(x), floats(y))


def _largest(x: PyTree) -> jax.Array:
    x = floats(x)
    leaves = jax.tree.leaves(x)
    return tree.max_abs(leaves) if leaves else jnp.zeros(())


def _relative(change: PyTree, gradient: PyTree) -> jax.Array:
    """The largest relative change of the gradient of consts, params, or inputs."""
    found = [jnp.zeros(())]
    for part, whole in zip(change, gradient, strict=True):
        part, whole = jax.tree.leaves(floats(part)), jax.tree.leaves(floats(whole))
        if whole:
            found.append(ratio(tree.to_unit(part)[1], tree.to_unit(whole)[1]))
    return jnp.max(jnp.stack([x.astype(found[-1].dtype) for x in found]))
