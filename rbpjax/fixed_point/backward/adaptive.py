"""The default rule: Neumann while that is the way, Krylov methods where it is not."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rbpjax._core import tree
from rbpjax._core.strategy import budget, count, strategy, tolerance
from rbpjax.fixed_point.backward.bicgstab import BiCGSTAB
from rbpjax.fixed_point.backward.cg_normal import CGNormal
from rbpjax.fixed_point.backward.gmres import GMRES
from rbpjax.fixed_point.backward.rule import Progress, System, add_terms, ratio
from rbpjax.fixed_point.iterate import next_look
from rbpjax.types import LinearMap, PyTree, Solution

ALIGNED = 0.75
"""Cosine of two residuals from which the later one says little that is new."""
FEW = 8
"""Steps that are left, at most, where it is not worth while to change the method."""
GROWTH = 1e3
"""What terms may grow by before they fall: on quadratics, momentum needs about √κ/2."""

SETTLING = 0.1
"""Part of a term that may change until the next look, where it tends to a limit."""


@strategy
class Adaptive:
    """Right whenever I - J is invertible, as cheap as Neumann where that is the way.

    Four loops in one compiled program, each of which ends at once when the tolerance is
    met already, and goes on from where the one before it stopped:

    1. the Neumann series, until the rate of its first terms says that more than
       ``patience`` would follow, or more than 8 that point where the last ones did
       (a cosine of 0.75). Krylov methods gain by what terms have in common: much where
       J has a few large eigenvalues, nothing where they lie on a circle;
    2. BiCGSTAB, which does not need ρ(J) < 1 nor squares the condition number, but may
       stagnate. If it does, the series goes on for as long as it contracts, up to half
       of the budget, and BiCGSTAB after it;
    3. CG on the normal equations, which needs nothing but I - J invertible. Where f has
       a backward pass of its own (another ``rbp_solve`` inside, a ``custom_vjp``, a
       callback), which JAX cannot transpose to J, restarted GMRES in its place, which
       may stagnate where I - J is far from normal.

    Exact up to ``tol``, or reported as not converged. What BiCGSTAB has solved by its
    recurrence, and a restart leaves as it is by the true residual, is what rounding
    allows: the rule ends there, as no other method would get further.

    Where f conserves something (a total, a phase), I - J is singular, and the series,
    when its turn comes again, settles at terms that no longer change: left null vectors
    of I - J. Then (I - Jᵀ) z = g but for those, of which parameters that do not change
    what is conserved receive nothing: their gradient is right, and the status says
    ``SINGULAR``.

    Cost: that of ``Neumann(tol=tol)`` or, with some Neumann steps more, that of the
    Krylov methods. Memory: eight states. AD modes: none of its own; ``rbp_solve``
    differentiates around it, to every order.

    Attributes:
      tol: bound on the relative adjoint residual ‖g + Jᵀz - z‖ / ‖g‖, in [0, 1).
        ``None``: three quarters of the digits of the coarsest dtype in the state.
      max_steps: budget of steps over all loops; the last may use it up alone.
      patience: number of Neumann steps that are worth waiting for.

    Raises:
      ValueError: if an option is out of its range or not a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import Adaptive
      >>> jnp.set_printoptions(precision=4, suppress=True)
      >>> jac = jnp.array([[0.0, 3.0], [-2.0, 0.0]])  # ρ(J) = √6: Neumann diverges
      >>> z = Adaptive()(lambda v: jac.T @ v, jnp.array([1.0, 0.0])).value
      >>> print(z)
      [0.1429 0.4286]

    References:
      Liao et al. 2018, algorithm 2 and section 3.1; van der Vorst 1992. The hand-over
      is ours; ``python -m benchmarks families`` measures what it rests on.
    """

    tol: float | jax.Array | None = tolerance(default=None)
    max_steps: int | jax.Array = budget(default=2000)
    patience: int = count(default=100)

    def __call__(
        self, vjp: LinearMap, cotangent: PyTree, *, start: PyTree | None = None
    ) -> Solution:
        """Solves (I - Jᵀ) z = g."""
        system = System.of(vjp, cotangent, self.tol)
        krylov = BiCGSTAB(max_steps=(self.max_steps + 1) // 2)

        def unsolved(attempts: tuple[jax.Array, Progress]) -> jax.Array:
            number, now = attempts
            open_ = ~now.rounding & ~now.singular
            return (now.error > system.tol) & open_ & (number < 2)

        def attempt(attempts: tuple[jax.Array, Progress]) -> tuple:
            number, before = attempts
            now = self._series(system, before, stubborn=number > 0)
            # BiCGSTAB would get stuck again where it has been stuck.
            stuck = (number > 0) & (now.error >= before.error) | now.singular
            end = krylov.advance(system.unless(stuck), now)
            # It may drift in one pass; that what it gained first is lost in a second
            # is rounding.
            end = end._replace(rounding=end.rounding & (end.error <= 0.5 * now.error))
            # Where I - J is singular z grows and the residual hardly falls: the next
            # method must not begin in what is mostly a null vector, but anew.
            grown = system.unresolved(end.z) > tree.coarsest_eps(end.z) ** 0.5
            lost = grown & (end.error > 0.1 * now.error)
            nothing = jax.tree.map(lambda u: jnp.zeros((), u.dtype), end.z)
            anew = end._replace(z=nothing, r=system.g, error=tree.norm(system.g))
            return number + 1, tree.where(lost, anew, end)

        begin = system.begin(start)
        none = jnp.zeros_like(begin.num_steps)
        _, now = lax.while_loop(unsolved, attempt, (none, begin))
        last = CGNormal if system.transposed() else GMRES
        end = last(max_steps=self.max_steps).advance(
            system.unless(now.rounding | now.singular), now
        )
        # Of a null vector there may be any amount in z: the smallest z has none.
        surplus = ratio(tree.vdot(end.z, end.r), tree.vdot(end.r, end.r))
        surplus = jnp.where(end.singular, surplus, 0)
        end = end._replace(z=tree.axpy(-surplus, end.r, end.z))
        return system.measured(end, self.max_steps, end.error <= system.tol)

    def _series(self, system: System, start: Progress, stubborn: jax.Array) -> Progress:
        """The series while it is worth while, or ``stubborn``: while it contracts."""
        tol = system.tol / 2  # Half of it is left to rounding, as in Neumann.
        half = self.max_steps // 2
        first = jnp.where(stubborn, start.num_steps, 0)
        budget = jnp.where(stubborn, half, self.max_steps).astype(first.dtype)

        def worthwhile(now: _State) -> jax.Array:
            return (now.error > tol) & now.good & (now.k < budget)

        def body(now: _State) -> _State:
            ahead = now.ahead
            z, r = add_terms(system.vjp, now.z, now.r, ahead)
            k, error = now.k + ahead, tree.norm(r)
            far = jnp.log(error / tol) / jnp.log(now.error / error)
            far = far * ahead.astype(far.dtype)
            left = jnp.where(error < now.error, far, jnp.inf)
            aligned = jnp.abs(tree.vdot(r, now.r)) > ALIGNED * error * now.error
            taken = k - first
            hopeless = (taken >= FEW) & (left > self.patience)
            slow = (taken >= FEW // 2) & aligned & (left > FEW)
            # Towards a left null vector: what is left of a term hardly changes.
            change = tree.norm(tree.sub(r, now.r))
            settled = stubborn & (change <= system.tol * error)
            gone = (taken >= self.patience) & (
                left > jnp.asarray(self.max_steps, left.dtype)
            )
            gone &= change > SETTLING * error
            good = jnp.where(stubborn, ~gone, ~(hopeless | slow))
            good &= (error < GROWTH * start.error) & ~settled  # False for NaN
            after = next_look(None, taken, ahead, error, now.error, tol)
            after = jnp.minimum(after, budget - k)
            return _State(z, r, k, error, after, good, settled)

        # A first look after two terms: one more look costs more than one term too many.
        k = start.num_steps
        ahead = jnp.minimum(2, budget - k)
        now = _State(
            start.z, start.r, k, start.error, ahead, k < budget, start.singular
        )
        end = lax.while_loop(worthwhile, body, now)
        # Terms that grew are worse than nothing: what follows starts without them.
        useful = (end.error < start.error) | end.settled
        return start._replace(
            z=tree.where(useful, end.z, start.z),
            r=tree.where(useful, end.r, start.r),
            num_steps=end.k,
            num_products=start.num_products + end.k - start.num_steps,
            error=jnp.where(useful, end.error, start.error),
            singular=end.settled,
        )


class _State(NamedTuple):
    """What the loop carries.

    The sum, the next term, the terms so far, the norm of the next one, the terms to
    the next look, whether to go on, and whether r is a left null vector.
    """

    z: PyTree
    r: PyTree
    k: jax.Array
    error: jax.Array
    ahead: jax.Array
    good: jax.Array
    settled: jax.Array
