"""Reports of solves inside nnx modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from rbpjax.fixed_point.report import AdjointReport, position
from rbpjax.types import PyTree

Argument = int | nnx.DiffState


def value_and_grad_with_report(
    loss: Callable[..., PyTree],
    argnums: Argument | tuple[Argument, ...] = 0,
    has_aux: bool = False,
) -> Callable[..., tuple[PyTree, PyTree, AdjointReport]]:
    """``nnx.value_and_grad`` that also returns the report of the adjoint solve.

    What the modules' calls change (batch statistics, counters of dropout) is changed
    after it, and gradients are those of the parameters, or of what a filter selects, as
    ``nnx.Optimizer`` takes them. For arrays and other pytrees, what
    ``rbpjax.value_and_grad_with_report`` does.

    Args:
      loss: scalar function of nnx modules or pytrees, that takes ``probe`` as keyword
        and hands it to a solve.
      argnums: as in ``nnx.value_and_grad``: the numbers of arguments, or of modules
        ``nnx.DiffState(number, filter)``.
      has_aux: as in ``nnx.value_and_grad``.

    Returns:
      ``(*args, probe=None, **kwargs) -> (value, grads, report)``.

    Raises:
      TypeError: if there is no argument of such a number.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from rbpjax.nn import FixedPoint, GraphCell, normalized_adjacency
      >>> from rbpjax.nn import value_and_grad_with_report
      >>> graph = normalized_adjacency(jnp.array([[0, 1], [1, 0]]), 2)
      >>> layer = FixedPoint(GraphCell(4, gain=0.5, rngs=nnx.Rngs(0)))
      >>> drive = jnp.ones((2, 4), jnp.float32)
      >>> def loss(layer, probe):
      ...     return layer((graph, drive), jnp.zeros_like(drive), probe).value.sum()
      >>> _, grads, report = value_and_grad_with_report(loss)(layer)
      >>> grads["cell"]["kernel"].shape, float(report.converged)
      ((4, 4), 1.0)

    References:
      ``nnx.value_and_grad``, whose arguments these are; the report is that of
      ``AdjointReport``.
    """
    single = not isinstance(argnums, tuple | list)

    def with_report(
        *args: PyTree, probe: AdjointReport | None = None, **kwargs: PyTree
    ) -> tuple[PyTree, PyTree, AdjointReport]:
        def probed(probe: AdjointReport, *args: PyTree) -> PyTree:
            return loss(*args, probe=probe, **kwargs)

        # The probe comes first.
        after = [_after(a, len(args)) for a in ([argnums] if single else argnums)]
        value, (report, *grads) = nnx.value_and_grad(
            probed, argnums=(0, *after), has_aux=has_aux
        )(AdjointReport.zeros() if probe is None else probe, *args)
        return value, grads[0] if single else tuple(grads), report

    return with_report


FORWARD_LIMIT, ADJOINT_LIMIT, RADIUS_LIMIT = 0.3, 1.0, 1.2
"""Above any of them a network has left equilibrium."""


def report_metrics(
    report: AdjointReport, *, radius: jax.Array | None = None, prefix: str = "solve/"
) -> dict[str, jax.Array]:
    """A report as named scalars for a log, with the reading that training needs.

    ``left_equilibrium`` is 1 where the forward residual is above 0.3, the adjoint's
    above 1 (then the gradient is worse than the one-step one) or ρ(J), if given, above
    1.2, or where one of them is not finite; else 0. These limits are a heuristic that
    told healthy from failing runs in our experiments (docs/results/models.md); healthy
    is a forward residual of 1e-2 or less, an adjoint residual up to 0.5 for a truncated
    rule, ρ(J) from 0.85 to 0.95. ``converged`` is 0 for a truncated rule, always, and
    few steps are no success by themselves.

    Cost: nothing. Under ``jit`` too. Not differentiated.

    Args:
      report: of one solve, scalars as leaves.
      radius: ρ(J), a scalar, as of ``FixedPoint.spectral_radius``, if it was computed.
      prefix: in front of each name.

    Returns:
      A dict of scalars: ``forward_residual``, ``forward_steps``, ``adjoint_residual``,
      ``adjoint_steps``, ``bound``, ``converged``, ``left_equilibrium`` and, if given,
      ``radius``.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import AdjointReport
      >>> from rbpjax.nn import report_metrics
      >>> report = AdjointReport.zeros()._replace(residual=jnp.array(2.5))
      >>> metrics = report_metrics(report, radius=jnp.array(0.9))
      >>> float(metrics["solve/left_equilibrium"]), float(metrics["solve/bound"])
      (1.0, 0.0)

    References:
      ``rbpjax.AdjointReport`` for what each number is.
    """
    healthy = (report.forward_residual <= FORWARD_LIMIT) & (
        report.residual <= ADJOINT_LIMIT
    )
    named = {
        "forward_residual": report.forward_residual,
        "forward_steps": report.forward_steps,
        "adjoint_residual": report.residual,
        "adjoint_steps": report.num_steps,
        "bound": report.bound,
        "converged": report.converged,
    }
    if radius is not None:
        healthy &= radius <= RADIUS_LIMIT
        named["radius"] = jnp.asarray(radius)
    named["left_equilibrium"] = 1 - healthy.astype(report.residual.dtype)
    return {prefix + name: value for name, value in named.items()}


def _after(argument: Argument, count: int) -> Argument:
    """The argument's number behind the probe; negative ones count from the end."""
    if isinstance(argument, nnx.DiffState):
        number = position(argument.argnum, count) + 1
        return dataclasses.replace(argument, argnum=number)
    return position(argument, count) + 1
