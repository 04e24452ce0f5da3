"""The frame of all rules: (I - Jᵀ) z = g with a right-hand side of unit norm.

A rule is called as ``rule(vjp, cotangent, start=None)`` with ``vjp(v)`` = Jᵀv, and
returns a ``Solution`` whose residual ‖g + Jᵀz - z‖ / ‖g‖ was measured with the very z
returned. Each rule of this folder is one method in this frame::

    system = System.of(vjp, cotangent, self.tol)       # g / ‖g‖, and the tolerance
    begin = system.begin(start)                        # z = 0, or from an earlier z
    end = self.advance(system, begin)                  # the method
    return system.measured(end, self.max_steps)        # the true residual, ‖g‖ z

Since g is brought to unit norm, tolerances are relative to the cotangent, and float32
keeps gradients of any magnitude that it can represent. A state of several leaves, which
may have several units, is solved for in variables without: each leaf divided by its own
size. Methods that carry a recurrence for the residual run inside ``System.restarted``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import sharding, tree
from rbpjax._core.convolution import channels_last
from rbpjax.fixed_point.contract import (
    check_made,
    check_solution,
    first_parameter,
)
from rbpjax.fixed_point.iterate import ratio, repeat, status_of
from rbpjax.types import BackwardRule, LinearMap, PyTree, Solution, Status

UNRESOLVED = 0.25
"""Of ε‖z‖: what a computed residual may hide, about the root mean square of one
rounding of z. No residual is reported below it, nor believed."""


class Progress(NamedTuple):
    """How far a rule has come, for a right-hand side of unit norm.

    Attributes:
      z: the iterate.
      r: its residual g + Jᵀz - z.
      num_steps: steps so far.
      num_products: products with J or Jᵀ so far.
      error: what the tolerance bounds, mostly ‖r‖.
      rounding: whether the method believed to be done, and rounding had it be wrong.
      singular: whether r is a left null vector of I - J: Jᵀr = r, and no z removes it.
    """

    z: PyTree
    r: PyTree
    num_steps: jax.Array
    num_products: jax.Array
    error: jax.Array
    rounding: jax.Array
    singular: jax.Array


class System(NamedTuple):
    """The equation (I - Jᵀ) z = g for a g of unit norm.

    Attributes:
      vjp: v ↦ Jᵀv.
      g: the cotangent divided by its norm; zero if that is zero.
      size: the norm.
      tol: bound on the residual that a method aims for.
      asked: bound on the residual that is reported.
      units: what each leaf is to be multiplied by, powers of two; None for one leaf.
      head: what finding them has made of the series, a ``Progress``, or None.
    """

    vjp: LinearMap
    g: PyTree
    size: jax.Array
    tol: float | jax.Array
    asked: float | jax.Array
    units: PyTree | None = None
    head: Progress | None = None

    @classmethod
    def of(
        cls,
        vjp: LinearMap,
        cotangent: PyTree,
        tol: float | jax.Array | None,
        *,
        scaled: bool = True,
    ) -> System:
        """The system of a cotangent of any magnitude; ``None``: the default tol.

        With several leaves and ``scaled`` it is that of Dz, D (I - Jᵀ) D⁻¹ Dz = Dg,
        where D makes the root mean square of each leaf of the first terms of the series
        about 1: no change of units changes the steps of a rule, and no leaf is lost
        beside larger ones. Two products find it, more if a leaf is reached later; they
        are the first two of the series, from which the rule goes on.
        """
        tol = tree.tol_for(cotangent, tol)
        if not scaled or len(jax.tree.leaves(cotangent)) == 1:
            g, size = tree.to_unit(cotangent)
            return cls(vjp, g, size, tol, tol)
        power = tree.power_of_two(tree.max_abs(cotangent))
        first = tree.scale(1 / power, cotangent)
        units, before, now, k = _own_sizes(vjp, first)
        largest = jax.tree.reduce(jnp.maximum, units)
        units = jax.tree.map(lambda unit: unit / largest, units)
        inverse = jax.tree.map(lambda unit: 1 / unit, units)
        scale = lambda v: tree.multiply(inverse, tree.scale(1 / largest, v))
        g = scale(first)
        length = tree.norm(g)
        safe = jnp.where(length == 0, 1, length).astype(length.dtype)
        unit_length = lambda v: tree.divide(scale(v), safe)
        z, r = unit_length(before), unit_length(tree.sub(now, before))
        never = sharding.vary_like(jnp.array(False), r)
        head = Progress(z, r, k, k, tree.norm(r), never, never)
        apply = lambda v: tree.multiply(inverse, vjp(tree.multiply(units, v)))
        # The residual of each leaf is to be small beside its own size too, which is
        # between 1 and 2 before, and so 1 / length of the unit now.
        aim = tol * jnp.minimum(1, 0.5 / safe)
        size = power * largest * length
        return cls(apply, unit_length(first), size, aim, tol, units, head)

    def apply(self, z: PyTree) -> PyTree:
        """(I - Jᵀ) z."""
        return tree.sub(z, self.vjp(z))

    def residual(self, z: PyTree) -> PyTree:
        """The residual g - (I - Jᵀ) z.

        In this order: what z and Jᵀz have in common goes without rounding, where g
        added to a large z would be lost in it.
        """
        return tree.sub(self.g, self.apply(z))

    def unless(self, done: jax.Array) -> System:
        """This system, or, where ``done``, one whose tolerance anything meets."""
        tol = jnp.where(done, jnp.inf, self.tol).astype(self.size.dtype)
        return self._replace(tol=tol)

    def transposed(self) -> LinearMap | None:
        """V ↦ Jv for use in a loop, or None where JAX cannot make it of v ↦ Jᵀv.

        So it is where f has a backward pass of its own. It is found out by tracing,
        and JAX has an exception of another kind for each operation without a transpose.
        """
        try:
            return channels_last(tree.adjoint(self.vjp, self.g), self.g)
        except Exception:
            return None

    def unresolved(self, z: PyTree) -> jax.Array:
        """What rounding may hide in the residual of z.

        Where an iteration shares its rounding with the residual, that may be zero, and
        z wrong.
        """
        return UNRESOLVED * tree.rounding(z)

    def begin(self, start: PyTree | None) -> Progress:
        """Where a rule begins: z = 0, or the best multiple of ``start``, by one VJP.

        Best is the least residual ‖g - a (I - Jᵀ) start‖, so that the start's
        magnitude, in the units of an earlier loss, does not matter, and no start is
        worse than none: one that is zero, not finite or at a right angle leaves z = 0.
        """
        g = self.g
        zero, k = tree.scale(0.0, g), sharding.vary_like(jnp.int32(0), g)
        never = sharding.vary_like(jnp.array(False), g)
        nowhere = Progress(zero, g, k, k, tree.norm(g), never, never)
        if start is None and self.head is not None:
            useful = self.head.error < nowhere.error  # False for NaN
            begin = tree.where(useful, self.head, nowhere)
            return begin._replace(num_products=self.head.num_products)
        if start is None:
            return nowhere
        start = sharding.typed_like(start, g)
        if self.units is not None and self.head is not None:
            k = self.head.num_products
            start = jax.tree.map(
                lambda s, unit: tree.divide(s, unit), start, self.units
            )
        unit = tree.to_unit(start)[0]
        image = self.apply(unit)
        a = ratio(tree.vdot(image, g), tree.vdot(image, image))
        usable = jnp.isfinite(a)
        z = tree.where(usable, tree.scale(a, unit), zero)
        r = tree.where(usable, tree.axpy(-a, image, g), g)
        return nowhere._replace(z=z, r=r, num_products=k + 1, error=tree.norm(r))

    def measured(
        self, end: Progress, max_steps: int | jax.Array, believed: jax.Array
    ) -> Solution:
        """The solution for the cotangent itself, with the residual measured at z.

        One VJP, which the compiler removes when nobody reads the report. ``believed``:
        whether the method ended since its own recurrence was done.
        """
        r = self.residual(end.z)
        end = end._replace(
            r=r, num_products=end.num_products + 1, rounding=believed | end.rounding
        )
        return self.refined(end, max_steps)

    def truncated(self, end: Progress) -> Solution:
        """The solution after as many steps as were asked for, as ``measured``."""
        solution = self.measured(end, 0, jnp.array(False))
        ended = solution.status == Status.OUT_OF_BUDGET
        status = jnp.where(ended, jnp.int32(Status.TRUNCATED), solution.status)
        return solution._replace(status=status)

    def restarted(
        self,
        one_pass: Callable[[Progress], Progress],
        start: Progress,
        max_steps: int | jax.Array,
        error: Callable[[PyTree, PyTree], jax.Array] = lambda z, r: tree.norm(r),
        error_products: int = 0,
        *,
        stalled: float = 0.5,
    ) -> Progress:
        """Passes of a method, each from the true residual, until that meets ``tol``.

        A pass runs until its own recurrence believes to be done; then the residual is
        measured, and the next one starts on what is left. A recurrence that drifted,
        broke down or stagnated is found out there, and a pass that made things worse is
        undone. Ends with the tolerance, or what rounding leaves of it, the budget, or a
        pass that leaves more than ``stalled`` times the error. A pass should aim at
        half of the tolerance, the other half is for rounding; of the ``Progress`` that
        it returns r is not read, and error is what it believes. ``error(z, r)`` is what
        ``tol`` bounds; it takes ``error_products``.
        """

        def unsolved(passes: tuple[Progress, jax.Array]) -> jax.Array:
            now, before = passes
            gained = now.error <= stalled * before
            above = now.error > jnp.maximum(self.tol, self.unresolved(now.z))
            return above & gained & (now.num_steps < max_steps)

        def body(passes: tuple[Progress, jax.Array]) -> tuple[Progress, jax.Array]:
            old, _ = passes
            new = one_pass(old)
            r = self.residual(new.z)
            found = error(new.z, r)
            better = found < old.error  # False for NaN
            end = old._replace(
                z=tree.where(better, new.z, old.z),
                r=tree.where(better, r, old.r),
                num_steps=new.num_steps,
                num_products=new.num_products + 1 + error_products,
                error=jnp.where(better, found, old.error),
                rounding=(new.error <= self.tol) & ~(found <= self.tol),
            )
            return end, old.error

        infinity = jnp.full_like(start.error, jnp.inf)
        infinity = sharding.vary_like(infinity, start.r)
        return lax.while_loop(unsolved, body, (start, infinity))[0]

    def refined(
        self, end: Progress, max_steps: int | jax.Array, error: jax.Array | None = None
    ) -> Solution:
        """The solution for the cotangent itself, where ``end.r`` was measured.

        ``error``: what ``tol`` bounds, if that is not ‖r‖. Neither is taken for less
        than what rounding may hide.
        """
        hidden = self.unresolved(end.z)
        residual = jnp.maximum(self._relative(end), hidden)
        error = residual if error is None else jnp.maximum(error, hidden)
        z = end.z if self.units is None else tree.multiply(self.units, end.z)
        z = tree.scale(self.size, z)
        rounding = end.rounding | (error <= jnp.maximum(self.asked, hidden))
        status = status_of(error, self.asked, end.num_steps >= max_steps)
        pick = lambda condition, status, other: jnp.where(
            condition, jnp.int32(status), other
        )
        failed = (status == Status.STAGNATED) | (status == Status.OUT_OF_BUDGET)
        status = pick(failed & rounding, Status.ROUNDING, status)
        status = pick(failed & end.singular, Status.SINGULAR, status)
        status = pick(tree.all_finite(z), status, Status.NOT_FINITE)
        converged = status == Status.CONVERGED
        return Solution(z, end.num_steps, end.num_products, residual, status, converged)

    def _relative(self, end: Progress) -> jax.Array:
        """‖r‖ / ‖g‖, and within each leaf ‖r‖ / max(‖g‖, ‖z‖, ‖Jᵀz‖), the largest.

        A leaf to which the loss gives little weight counts by itself. For a single leaf
        it is the first.
        """
        z, r, total = end.z, end.r, tree.norm(end.r)
        if len(jax.tree.leaves(r)) == 1:
            return total
        image = tree.add(tree.sub(r, self.g), z)

        def leaf(r: jax.Array, *others: jax.Array) -> jax.Array:
            # Small leaves of unscaled states have squares that vanish.
            size = lambda u: tree.to_unit(u)[1].astype(total.dtype)
            return ratio(size(r), jnp.stack(list(map(size, others))).max())

        leaves = jax.tree.map(leaf, r, self.g, z, image)
        return jax.tree.reduce(jnp.maximum, leaves, total)


def _own_sizes(vjp: LinearMap, g: PyTree) -> tuple[PyTree, PyTree, PyTree, jax.Array]:
    """``(units, before, now, k)``: the sizes of the leaves of z, as far as terms tell.

    A unit is a power of two, that below the largest norm of the leaf among the sums of
    the first terms of the series; ``now`` is the sum of k + 1 terms, ``before`` of k.
    """
    leaves, treedef = jax.tree.flatten(g)
    dtype = tree.real_dtype(g)
    size = lambda x: jnp.stack(
        [tree.to_unit(u)[1].astype(dtype) for u in jax.tree.leaves(x)]
    )

    def unseen(sums: tuple) -> jax.Array:
        *_, sizes, k = sums
        return (k < 2) | (jnp.any(sizes == 0) & (k < len(leaves)))

    def body(sums: tuple) -> tuple:
        _, now, sizes, k = sums
        after = tree.add(g, vjp(now))
        return now, after, jnp.maximum(sizes, size(after)), k + 1

    k = sharding.vary_like(jnp.int32(0), g)
    sizes = sharding.vary_like(size(g), g)
    before, now, sizes, k = lax.while_loop(unseen, body, (g, g, sizes, k))
    units = jax.tree.unflatten(treedef, list(tree.power_of_two(sizes)))
    return units, before, now, k


def add_terms(
    product: LinearMap, z: PyTree, r: PyTree, num_terms: int | jax.Array
) -> tuple[PyTree, PyTree]:
    """``z`` plus Σ Bᵏ r over k < ``num_terms``, and the next term, B^num_terms r.

    ``product`` is v ↦ Bv. By Horner's scheme, y ← B (r + y): one state to carry, its
    sum fused into the product, where terms added one by one take a pass over the sum
    and a copy more. The term is the last difference of two y, so that its rounding
    errors are those of this sum, not of z: where more is to come, they are corrected.
    """
    zero = tree.scale(0.0, r)
    y = repeat(lambda y: product(tree.add(r, y)), num_terms - 1, zero)
    total = tree.add(r, y)
    return tree.add(z, total), tree.sub(product(total), y)


def apply_rule(
    rule: BackwardRule, vjp: LinearMap, cotangent: PyTree, start: PyTree | None = None
) -> Solution:
    """``rule(vjp, cotangent)``, checked to be a solution like the cotangent."""
    check_rule(rule)
    if start is not None and not takes_start(rule):
        raise ValueError(
            f"the backward rule {rule!r} takes no start: to go on from an earlier "
            "adjoint, as of a probe or by Broyden(share=True), it must be callable as "
            "rule(vjp, cotangent, start=z). Add the keyword, or give no adjoint to "
            "start from."
        )
    options = {} if start is None else {"start": start}
    axes = sharding.coupling(vjp, cotangent)
    sharding.check_coupled(rule, axes, "backward=rbpjax.Adaptive()")
    with sharding.coupled(axes):
        solution = rule(channels_last(vjp, cotangent), cotangent, **options)
    return check_solution(solution, cotangent, f"the backward rule {rule!r}")


def check_rule(rule: BackwardRule) -> None:
    """Raises ValueError where a forward solver stands in a rule's place."""
    check_made(rule)
    if first_parameter(rule) == "step":
        raise ValueError(
            f"{rule!r} is a forward solver, called as solver(step, h0); a backward "
            "rule is called as rule(vjp, cotangent). A solver solves the adjoint "
            f"equation inside RBP: RBP({rule!r})."
        )


def takes_start(rule: BackwardRule) -> bool:
    """Whether the rule can be called with the keyword ``start``."""
    try:
        inspect.signature(rule).bind(None, None, start=None)
    except TypeError:
        return False
    return True
