"""What a user would run on the problems of a group: value, gradient, report."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rbpjax
from benchmarks.comparison.fuzz.draws import Problem, Setting
from benchmarks.comparison.fuzz.maps import PRECISIONS, step_function


class Found(NamedTuple):
    """What the library returned for each problem of a group.

    Attributes:
      h: the real numbers of the state, in units.
      grads: of W and x.
      converged: the verdict.
      status: of the report, a ``Status``.
      bound: that of the gradient's relative error; infinite where nothing is stated.
      forward: whether the solution says converged.
    """

    h: np.ndarray
    grads: tuple[np.ndarray, np.ndarray]
    converged: np.ndarray
    status: np.ndarray
    bound: np.ndarray
    forward: np.ndarray


def can_verify() -> bool:
    """Whether this version has the solved estimate, on request."""
    signature = inspect.signature(rbpjax.rbp_solve)
    return "verify" in signature.parameters


def run(setting: Setting, problems: Problem, *, verify: bool = False) -> Found:
    """Solves all problems of a group in one compiled program.

    ``verify`` asks for the solved estimate of the error instead of the cheap one.
    """
    precision = PRECISIONS[setting.precision]
    f = step_function(setting.layout, setting.curves, precision.mantissa)
    chosen: dict[str, Any] = {"forward": setting.solver, "backward": setting.rule}
    if verify:
        chosen["verify"] = True
    solve = rbpjax.rbp_solve(f, **{k: v for k, v in chosen.items() if v is not None})
    # A loss in half precision would overflow where the solve does not.
    wide = jnp.promote_types(precision.real, jnp.float32)

    def one(problem: Problem) -> Any:
        h0 = setting.layout.unravel(problem.h0)
        g, q = (part.astype(wide) for part in problem.loss)

        def loss(params: Any, probe: rbpjax.AdjointReport) -> Any:
            solution = solve(params, problem.inputs, h0, probe=probe)
            v = setting.layout.ravel(solution.value)
            wide_v = v.astype(wide)
            value = jnp.sum(g * wide_v) + 0.5 * jnp.sum(wide_v * q * wide_v)
            return value, (v, solution.converged)

        options = {}
        if setting.warm:
            options["adjoint"] = setting.layout.unravel(problem.garbage)
        probe = rbpjax.AdjointReport.zeros(**options)
        with_report = rbpjax.value_and_grad_with_report(loss, has_aux=True)
        (_, (v, forward)), grads, report = with_report(problem.params, probe=probe)
        bound = getattr(report, "bound", jnp.inf)
        said = report.converged == 1, report.status, jnp.asarray(bound)
        return Found(v, grads, *said, forward)

    mapped = jax.vmap(one) if setting.together else partial(jax.lax.map, one)
    # Every problem has its own report, and whatever was not computed is infinite.
    found = jax.device_get(jax.jit(mapped)(jax.tree.map(jnp.asarray, problems)))
    wide_host = lambda v: v if v.dtype == bool else np.asarray(v, np.float64)
    found = jax.tree.map(wide_host, found)
    stated = np.where(np.isnan(found.bound), np.inf, found.bound)
    return found._replace(bound=np.broadcast_to(stated, found.converged.shape))
