"""Reports from inside the backward pass, as the gradient of a probe."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax

from rbpjax._core import sharding, tree
from rbpjax._core.step import check_like, floats, merge, only_arrays
from rbpjax.fixed_point.bound import Bound
from rbpjax.types import PyTree, Solution


class AdjointReport(NamedTuple):
    """What the backward pass did; all leaves are floats.

    It comes out of the backward pass as the *gradient of the loss with respect to a
    probe*, ``AdjointReport.zeros()`` handed to the solve. Where one probe serves
    several solves, their reports add up, as gradients do; inside ``jax.vmap`` give one
    probe an example, inside ``lax.scan`` one a step.

    A probe with an ``adjoint`` starts the backward rule from it, and the report returns
    the one found in its place: in training, where one batch's fixed points move little
    from step to step, hand each step the last one's report. The rule takes the best
    multiple of the start, by one VJP, so that its scale does not matter and a bad one
    does no harm. The tolerance is met as without, in fewer steps, though what is left
    then lies where the solve is slow, so that the error may be some times larger. A
    truncated rule, such as ``Neumann(5)``, adds its terms to the start, and gains in
    accuracy. Such a probe serves one solve: adjoints, too, would add up.

    Attributes:
      num_steps: steps of the backward rule.
      num_products: its products with J or Jᵀ.
      residual: ‖g + Jᵀz - z‖ / ‖g‖, of its adjoint.
      status: its ``Status`` as a float, 0 if converged; of several solves, whose
        reports add up, it is 0 only if all did.
      converged: 1 if ``bound`` is at most √ε, where ε is that of the coarsest
        arithmetic inside f (3e-4 in float32), else 0. It covers both solves.
      cotangent_norm: ‖g‖; zero where no gradient arrived, or no adjoint was solved
        (``bptt``).
      bound: of the gradient's relative error, as far as it can be estimated without
        another solve: for the cotangent given, and infinite where nothing is known.
      forward_steps: steps of the forward solver to the state.
      forward_products: its evaluations of f and products with J.
      forward_residual: the relative residual of the state.
      forward_status: the solver's ``Status`` as a float.
      adjoint: ``None``, or z, a pytree like the state. The only field of a probe whose
        values matter.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import AdjointReport, rbp_solve, value_and_grad_with_report
      >>> solve = rbp_solve(lambda a, x, h: a * h + x)
      >>> def loss(a, probe):
      ...     return jnp.sum(solve(a, jnp.ones(2), jnp.zeros(2), probe).value)
      >>> step = value_and_grad_with_report(loss)
      >>> report = AdjointReport.zeros(adjoint=jnp.zeros(2))
      >>> for _ in range(2):
      ...     _, _, report = step(jnp.array([0.5, 0.8]), probe=report)
      >>> report.adjoint.round(3).tolist(), int(report.num_steps)  # 1 / (1 - a)
      ([2.0, 5.0], 0)
    """

    num_steps: jax.Array
    num_products: jax.Array
    residual: jax.Array
    status: jax.Array
    converged: jax.Array
    cotangent_norm: jax.Array
    bound: jax.Array
    forward_steps: jax.Array
    forward_products: jax.Array
    forward_residual: jax.Array
    forward_status: jax.Array
    adjoint: PyTree | None = None

    @classmethod
    def zeros(
        cls, shape: tuple[int, ...] = (), adjoint: PyTree | None = None
    ) -> AdjointReport:
        """A probe: zeros of ``shape``, for example ``(batch,)`` to map over.

        ``adjoint``: where to start, zeros like the state for a first one.
        """
        return cls(*(jnp.zeros(shape) for _ in cls._fields[:-1]), adjoint=adjoint)


# A function that returns a report can be exported and saved (``jax.export``).
export.register_namedtuple_serialization(
    AdjointReport, serialized_name="rbpjax.AdjointReport"
)


def value_and_grad_with_report(
    loss: Callable[..., PyTree],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    allow_int: bool = False,
) -> Callable[..., tuple[PyTree, PyTree, AdjointReport]]:
    """``jax.value_and_grad`` that also returns the report of the adjoint solve.

    Leaves that have no gradient may stand beside such that have: in a module's random
    state, a sparse matrix's indices, an activation among the parameters. They are set
    aside; in the gradient float0 stands for an integer or key, as with ``allow_int``,
    and None for what is no array. (Of an nnx module whose calls change it, and for
    nnx filters, take ``rbpjax.nn.value_and_grad_with_report``.)

    Args:
      loss: scalar function that takes ``probe`` as keyword and hands it to a solve.
      argnums: as in ``jax.value_and_grad``.
      has_aux: as in ``jax.value_and_grad``.
      allow_int: as in ``jax.value_and_grad``: whether an argument may have integers
        alone.

    Returns:
      ``(*args, probe=None, **kwargs) -> (value, grads, report)``. Several solves with
      one probe add their reports up. A report of zeros says that no adjoint was solved.
      A probe with an ``adjoint``, such as the report of the last step, is a warm start.

    Raises:
      TypeError: as ``jax.value_and_grad``, if there is no argument of such a number, or
        one without a leaf that has a gradient.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax import rbp_solve, value_and_grad_with_report
      >>> solve = rbp_solve(lambda a, x, h: a * h + x)
      >>> def loss(a, x, probe):
      ...     return jnp.sum(solve(a, x, jnp.zeros(1), probe=probe).value)
      >>> a, x = jnp.array([0.5]), jnp.ones(1)
      >>> value, grad, report = value_and_grad_with_report(loss)(a, x)
      >>> grad.round(3).tolist(), float(report.converged)
      ([4.0], 1.0)

    References:
      ``jax.value_and_grad``, whose arguments these are; the report is that of
      ``AdjointReport``.
    """

    def with_report(
        *args: PyTree, probe: AdjointReport | None = None, **kwargs: PyTree
    ) -> tuple[PyTree, PyTree, AdjointReport]:
        single = not isinstance(argnums, tuple | list)
        numbers = [argnums] if single else argnums
        wanted = [position(number, len(args)) for number in numbers]

        def probed(probe: AdjointReport, arrays: list) -> PyTree:
            given = list(args)
            for i, tree_of_arrays in zip(wanted, arrays, strict=True):
                given[i] = merge(tree_of_arrays, args[i])
            return loss(*given, probe=probe, **kwargs)

        arrays = [only_arrays(args[i]) for i in wanted]
        beside = all(
            jax.tree.leaves(floats(a)) or not jax.tree.leaves(a) for a in arrays
        )
        value, (report, grads) = jax.value_and_grad(
            probed, argnums=(0, 1), has_aux=has_aux, allow_int=allow_int or beside
        )(AdjointReport.zeros() if probe is None else probe, arrays)
        return value, grads[0] if single else tuple(grads), report

    return with_report


def position(number: int, count: int) -> int:
    """The argument's number from the front, or what JAX raises if there is none."""
    number = operator.index(number)
    if not -count <= number < count:
        raise TypeError(
            f"differentiating with respect to argnums={number} requires at least "
            f"{number + 1 if number >= 0 else -number} positional arguments to be "
            f"passed by the caller, but got only {count} positional arguments."
        )
    return number % count


def as_probe(probe: AdjointReport | None, h: PyTree) -> AdjointReport | None:
    """The probe as arrays, varying over devices as the state does."""
    if probe is None:
        return None
    if not isinstance(probe, AdjointReport):
        raise ValueError(
            "`probe` must be an AdjointReport, such as AdjointReport.zeros(); got "
            f"{type(probe).__name__}."
        )
    *scalars, adjoint = probe
    scalars = list(map(jnp.asarray, scalars))
    for name, leaf in zip(probe._fields[:-1], scalars, strict=True):
        if leaf.shape or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"`probe.{name}` must be a floating-point scalar here; got "
                f"{leaf.dtype}{list(leaf.shape)}. Map over probes with jax.vmap, or "
                "scan over them, one for each solve."
            )
    if adjoint is not None:
        check_like(adjoint, h, "`probe.adjoint`", "`h0`")
        adjoint = jax.tree.map(jnp.asarray, adjoint)
    return sharding.vary_like(AdjointReport(*scalars, adjoint=adjoint), h)


def reported(
    forward: Solution,
    backward: Solution,
    g: PyTree,
    bound: Bound,
    probe: AdjointReport,
) -> AdjointReport:
    """The report on a gradient for the cotangent g, of the types of the probe."""
    raw = AdjointReport(
        num_steps=backward.num_steps,
        num_products=backward.num_products,
        residual=backward.residual,
        status=backward.status,
        converged=bound.error <= bound.accuracy,
        cotangent_norm=tree.to_unit(g)[1],
        bound=bound.error,
        forward_steps=forward.num_steps,
        forward_products=forward.num_products,
        forward_residual=forward.residual,
        forward_status=forward.status,
        adjoint=None if probe.adjoint is None else backward.value,
    )
    found = jax.tree.map(lax.stop_gradient, raw)
    found = jax.tree.map(lambda r, p: r.astype(p.dtype), found, probe)
    return sharding.typed_like(found, probe)
