"""The frame of all rules: (I - Jᵀ) z = g with a right-hand side of unit norm.

A rule is called as ``rule(vjp, cotangent, start=None)`` with ``vjp(v)`` = Jᵀv, and
returns a ``Solution`` whose residual ‖g + Jᵀz - z‖ / ‖g‖ was measured with the very z
returned. Each rule of this folder is one method in this frame::

    system = System.of(vjp, cotangent, self.tol)       # g / ‖g‖, and the tolerance
    begin = system.begin(start)                        # z = 0, or from an earlier z
    end = self.advance(system, begin)                  # the method
    return system.measured(end, self.max_steps)        # the true residual, ‖g‖ z

Since g is brought to unit norm, tolerances are relative to the cotangent, and float32
keeps gradients of any magnitude that it can represent. Methods that carry a recurrence
for the residual run inside ``System.restarted``.
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
from rbpjax.fixed_point.iterate import (
    check_solution,
    first_parameter,
    ratio,
    repeat,
    status_of,
)
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
    """

    z: PyTree
    r: PyTree
    num_steps: jax.Array
    num_products: jax.Array
    error: jax.Array
    rounding: jax.Array


class System(NamedTuple):
    """The equation (I - Jᵀ) z = g for a g of unit norm.

    Attributes:
      vjp: v ↦ Jᵀv.
      g: the cotangent divided by its norm; zero if that is zero.
      size: the norm.
      tol: bound on the residual.
    """

    vjp: LinearMap
    g: PyTree
    size: jax.Array
    tol: float | jax.Array

    @classmethod
    def of(cls, vjp: LinearMap, cotangent: PyTree, tol: float | None) -> System:
        """The system of a cotangent of any magnitude; ``None``: the default tol."""
        g, size = tree.to_unit(cotangent)
        return cls(vjp, g, size, tree.default_tol(g) if tol is None else tol)

    def apply(self, z: PyTree) -> PyTree:
        """(I - Jᵀ) z."""
        return tree.sub(z, self.vjp(z))

    def residual(self, z: PyTree) -> PyTree:
        """The residual g - (I - Jᵀ) z.

        In this order: what z and Jᵀz have in common goes without rounding, where g
        added to a large z would be lost in it.
        """
        return tree.sub(self.g, self.apply(z))

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
        if start is None:
            return Progress(zero, g, k, k, tree.norm(g), never)
        unit = tree.to_unit(sharding.typed_like(start, g))[0]
        image = self.apply(unit)
        a = ratio(tree.vdot(image, g), tree.vdot(image, image))
        usable = jnp.isfinite(a)
        z = tree.where(usable, tree.scale(a, unit), zero)
        r = tree.where(usable, tree.axpy(-a, image, g), g)
        return Progress(z, r, k, k + 1, tree.norm(r), never)

    def measured(self, end: Progress, max_steps: int, believed: jax.Array) -> Solution:
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
        max_steps: int,
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
            return (
                Progress(
                    tree.where(better, new.z, old.z),
                    tree.where(better, r, old.r),
                    new.num_steps,
                    new.num_products + 1 + error_products,
                    jnp.where(better, found, old.error),
                    (new.error <= self.tol) & ~(found <= self.tol),
                ),
                old.error,
            )

        infinity = jnp.full_like(start.error, jnp.inf)
        infinity = sharding.vary_like(infinity, start.r)
        return lax.while_loop(unsolved, body, (start, infinity))[0]

    def refined(
        self, end: Progress, max_steps: int, error: jax.Array | None = None
    ) -> Solution:
        """The solution for the cotangent itself, where ``end.r`` was measured.

        ``error``: what ``tol`` bounds, if that is not ‖r‖. Neither is taken for less
        than what rounding may hide.
        """
        hidden = self.unresolved(end.z)
        residual = jnp.maximum(tree.norm(end.r), hidden)
        error = residual if error is None else jnp.maximum(error, hidden)
        z = tree.scale(self.size, end.z)
        rounding = end.rounding | (error <= jnp.maximum(self.tol, hidden))
        status = status_of(error, self.tol, end.num_steps >= max_steps)
        pick = lambda condition, status, other: jnp.where(
            condition, jnp.int32(status), other
        )
        failed = (status == Status.STAGNATED) | (status == Status.OUT_OF_BUDGET)
        status = pick(failed & rounding, Status.ROUNDING, status)
        status = pick(tree.all_finite(z), status, Status.NOT_FINITE)
        converged = status == Status.CONVERGED
        return Solution(z, end.num_steps, end.num_products, residual, status, converged)


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
            "adjoint, as of a probe, it must be callable as rule(vjp, cotangent, "
            "start=z). Add the keyword, or give no adjoint to start from."
        )
    options = {} if start is None else {"start": start}
    solution = rule(channels_last(vjp, cotangent), cotangent, **options)
    return check_solution(solution, cotangent, f"the backward rule {rule!r}")


def check_rule(rule: BackwardRule) -> None:
    """Raises ValueError where a forward solver stands in a rule's place."""
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
