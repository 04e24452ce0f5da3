"""Reports from inside the backward pass, as the gradient of a probe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rbpjax.fixed_point import tree
from rbpjax.types import PyTree


class AdjointReport(NamedTuple):
    """What the backward pass did; all leaves are floats.

    It comes out of the backward pass as the *gradient of the loss with respect to a
    probe*, ``AdjointReport.zeros()`` handed to the solve. Where one probe serves
    several solves, their reports add up, as gradients do; inside ``jax.vmap`` give one
    probe an example, inside ``lax.scan`` one a step.

    Attributes:
      num_steps: steps of the backward rule.
      residual: ‖g + Jᵀz - z‖ / ‖g‖.
      converged: 1 if the rule reached its tolerance, else 0.
      cotangent_norm: ‖g‖; zero where no gradient arrived, or no adjoint was solved
        (``bptt``).
    """

    num_steps: Any
    residual: Any
    converged: Any
    cotangent_norm: Any

    @classmethod
    def zeros(cls, shape: tuple[int, ...] = ()) -> AdjointReport:
        """A probe: zeros of ``shape``, for example ``(batch,)`` to map over."""
        return cls(*(jnp.zeros(shape) for _ in cls._fields))


def value_and_grad(
    loss: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, PyTree, AdjointReport]]:
    """``jax.value_and_grad`` that also returns the report of the adjoint solve.

    Args:
      loss: scalar function that takes ``probe`` as keyword and hands it to a solve.
      argnums: as in ``jax.value_and_grad``.
      has_aux: as in ``jax.value_and_grad``.

    Returns:
      ``(*args, **kwargs) -> (value, grads, report)``. Several solves with one probe add
      their reports up. A report of zeros says that no adjoint was solved.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import rbp_solve
      >>> solve = rbp_solve(lambda a, x, h: a * h + x)
      >>> def loss(a, x, probe):
      ...     return jnp.sum(solve(a, x, jnp.zeros(1), probe=probe).value)
      >>> value, grad, report = value_and_grad(loss)(jnp.array([0.5]), jnp.ones(1))
      >>> grad.round(6).tolist(), float(report.converged)
      ([4.0], 1.0)
    """

    def with_report(*args: Any, **kwargs: Any) -> tuple[Any, PyTree, AdjointReport]:
        def probed(probe: AdjointReport, *args: Any) -> Any:
            return loss(*args, probe=probe, **kwargs)

        single = isinstance(argnums, int)
        wanted = tuple(
            i % len(args) + 1 for i in ((argnums,) if single else tuple(argnums))
        )
        value, (report, *grads) = jax.value_and_grad(
            probed, argnums=(0, *wanted), has_aux=has_aux
        )(AdjointReport.zeros(), *args)
        return value, grads[0] if single else tuple(grads), report

    return with_report


def as_probe(probe: AdjointReport | None, h: PyTree) -> AdjointReport | None:
    """The probe as arrays, varying over devices as the state does."""
    if probe is None:
        return None
    if not isinstance(probe, AdjointReport):
        raise ValueError(
            "`probe` must be an AdjointReport, such as AdjointReport.zeros(); got "
            f"{type(probe).__name__}."
        )
    for name, leaf in zip(probe._fields, map(jnp.asarray, probe), strict=True):
        if leaf.shape or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"`probe.{name}` must be a floating-point scalar here; got "
                f"{leaf.dtype}{list(leaf.shape)}. Map over probes with jax.vmap, or "
                "scan over them, one for each solve."
            )
    return tree.vary_like(AdjointReport(*map(jnp.asarray, probe)), h)
