"""Scales of a sum of outer products: those of minimum variance, in any units."""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core.norm import agreed, careful, log_slope, norm, squares, within
from rbpjax.types import PyTree

SHARE = 2.0**-10
"""How large a factor whose partner is zero is made, of the largest of the step."""


class Factors(NamedTuple):
    """One side, v or w, of a sum of outer products.

    Attributes:
      vectors: a pytree for each term.
      norms: of more terms, their norms; a pytree of arrays, one entry a term.
    """

    vectors: tuple
    norms: PyTree = ()


class Scales(NamedTuple):
    """ρ of all terms, as ``Factors`` has them."""

    vectors: tuple
    norms: PyTree


@jax.custom_jvp
def balance(v: Factors, w: Factors) -> Scales:
    """The scales ρᵢ = √(‖wᵢ‖/‖vᵢ‖), after which ρᵢvᵢ and wᵢ/ρᵢ have equal norms.

    There is no constant in them that has units: in other units of parameters, states or
    losses the estimate is scaled, and is the same.

    Where one factor is zero, so is the product, whatever the scale, and the other
    factor only adds variance: it is made small beside the largest term. It is not left
    out, because a run may be differentiated, and the zero may have a derivative.
    """
    sums = [squares(tree) for side in (v, w) for tree in side.vectors]
    dtype = jnp.result_type(*sums)
    count, structure = len(v.vectors), jax.tree.structure(v.norms)
    roots_of = lambda norms: [jnp.sqrt(n.astype(dtype)) for n in jax.tree.leaves(norms)]

    def with_zeros(roots: list[jax.Array]) -> Scales:
        """From the roots of the norms of all vectors."""
        v_roots = roots[:count] + roots_of(v.norms)
        w_roots = roots[count:] + roots_of(w.norms)
        rho = scales(v_roots, w_roots)
        return Scales(tuple(rho[:count]), structure.unflatten(rho[count:]))

    def quick() -> Scales:
        ratio = lambda a, b: jnp.sqrt(b.astype(dtype) / a.astype(dtype))
        roots = list(map(jnp.sqrt, sums))
        vectors = tuple(map(ratio, roots[:count], roots[count:]))
        return Scales(vectors, jax.tree.map(ratio, v.norms, w.norms))

    def slow() -> Scales:
        some = lambda: with_zeros([jnp.sqrt(jnp.sqrt(s)) for s in sums])
        every = lambda: with_zeros([jnp.sqrt(careful(t)) for t in trees])
        return lax.cond(fine, some, every) if jax.tree.leaves(v.norms) else every()

    trees, fine = (*v.vectors, *w.vectors), agreed(within(*sums))
    known = [jnp.all(n > 0) for n in jax.tree.leaves((v.norms, w.norms))]
    return lax.cond(reduce(jnp.logical_and, map(agreed, known), fine), quick, slow)


@balance.defjvp
def _balance_jvp(primals: tuple, tangents: tuple) -> tuple[Scales, Scales]:
    rho = balance(*primals)
    slopes = [
        Scales(
            tuple(map(log_slope, of.vectors, by.vectors, map(norm, of.vectors))),
            jax.tree.map(lambda n, d: d / jnp.where(n == 0, 1, n), of.norms, by.norms),
        )
        for of, by in zip(primals, tangents, strict=True)
    ]
    return rho, jax.tree.map(lambda r, v, w: r * (w - v) / 2, rho, *slopes)


def scales(v_roots: list[jax.Array], w_roots: list[jax.Array]) -> list[jax.Array]:
    """ρ of all terms from the roots of their norms, of which some may be zero."""
    most: Any = 0
    for a, b in zip(v_roots, w_roots, strict=True):
        most = jnp.maximum(most, jnp.max(a * b, initial=0))
    most = lax.stop_gradient(most)
    least = SHARE * jnp.where(most > 0, most, 1)

    def scale(v: jax.Array, w: jax.Array) -> jax.Array:
        no_v, no_w = v == 0, w == 0  # not `> 0`, which would hide a nan
        divisor = jnp.where(no_v, 1, v)
        alone = jnp.where(no_w, least / divisor**2, w**2 / least)
        alone = jnp.where(no_v & no_w, 1, alone)
        return jnp.where(no_v | no_w, lax.stop_gradient(alone), w / divisor)

    return list(map(scale, v_roots, w_roots))
