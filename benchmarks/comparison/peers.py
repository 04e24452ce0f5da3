"""What a JAX user would pick: each library's solvers behind one call.

A method is a recipe ``(problem, setting) -> solve(params, inputs)``, the setting two
tolerances, or two numbers of steps for the unrolled ones. Tolerances mean what the
library makes of them; ``rules`` tunes them by the error they lead to.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import rbpjax
from benchmarks.comparison.method import Method, Refused, Setting, compiled
from benchmarks.comparison.problems import Problem
from rbpjax import (
    CG,
    GMRES,
    RBP,
    RRE,
    Adaptive,
    Anderson,
    BiCGSTAB,
    CGNormal,
    Direct,
    FixedPointIteration,
    Neumann,
    Newton,
)

# --- rbpjax --------------------------------------------------------------------------

EVERY = 4  # steps between two looks at the residual, of the methods so named
WARMUP = 8  # plain steps before Newton's
LARGEST = 2000  # numbers in a state whose Jacobian is still formed

RULES: dict[str, Callable[[float, int], rbpjax.BackwardRule]] = {
    "Adaptive": lambda tol, budget: Adaptive(tol=tol, max_steps=budget),
    "Neumann": lambda tol, budget: Neumann(tol=tol, max_steps=budget),
    "RBP(Anderson)": lambda tol, budget: RBP(
        Anderson(tol=tol, max_steps=budget, memory=5)
    ),
    "RBP(RRE)": lambda tol, budget: RBP(RRE(tol=tol, max_steps=budget, memory=5)),
    "CGNormal": lambda tol, budget: CGNormal(tol=tol, max_steps=budget),
    "BiCGSTAB": lambda tol, budget: BiCGSTAB(tol=tol, max_steps=budget),
    "GMRES": lambda tol, budget: GMRES(tol=tol, max_steps=budget),
    "CG": lambda tol, budget: CG(tol=tol, max_steps=budget),
    "Direct": lambda tol, budget: Direct(),
    "Neumann/4": lambda tol, budget: Neumann(
        tol=tol, max_steps=budget, check_every=EVERY
    ),
}
FORWARD: dict[str, Callable[[float, int], rbpjax.ForwardSolver]] = {
    "": lambda tol, budget: FixedPointIteration(tol=tol, max_steps=budget),
    "Anderson + ": lambda tol, budget: Anderson(tol=tol, max_steps=budget, memory=5),
    "RRE + ": lambda tol, budget: RRE(tol=tol, max_steps=budget, memory=5),
    "Newton(BiCGSTAB) + ": lambda tol, budget: Newton(
        BiCGSTAB(tol=1e-2, max_steps=budget), tol=tol, warmup=WARMUP
    ),
    "Newton(CG) + ": lambda tol, budget: Newton(
        CG(tol=1e-4, max_steps=budget), tol=tol
    ),
    "Newton(Direct) + ": lambda tol, budget: Newton(Direct(), tol=tol),
    "Iteration/4 + ": lambda tol, budget: FixedPointIteration(
        tol=tol, max_steps=budget, check_every=EVERY
    ),
}
DEFAULT = "rbpjax Adaptive"


def ours(forward: str, rule: str, problem: Problem, setting: Setting) -> Callable:
    """``solve(params, inputs, probe=None) -> Solution``."""
    solve = rbpjax.rbp_solve(
        problem.f,
        forward=FORWARD[forward](setting.forward, problem.budget),
        backward=RULES[rule](setting.backward, problem.budget),
    )
    return lambda p, x, probe=None: solve(p, x, problem.h0, probe)


def _ours(forward: str, rule: str, problem: Problem, setting: Setting) -> Callable:
    if "Direct" in forward + rule and problem.h0.size > LARGEST:
        raise Refused(f"forms no Jacobian of {problem.h0.size} numbers")
    solve = ours(forward, rule, problem, setting)
    return lambda p, x: solve(p, x).value


def steps(name: str, problem: Problem, setting: Setting) -> dict[str, float]:
    """Steps of our forward solver and backward rule, by the report of the probe."""
    forward = next(
        f for f in reversed(FORWARD) if name.removeprefix("rbpjax ").startswith(f)
    )
    rule = name.removeprefix("rbpjax ").removeprefix(forward)
    solve = ours(forward, rule, problem, setting)

    def loss(params: Any, inputs: Any, probe: Any) -> tuple[jax.Array, jax.Array]:
        solution = solve(params, inputs, probe)
        return problem.loss(solution.value), solution.num_steps

    probe = rbpjax.AdjointReport.zeros()
    gradient = jax.jit(jax.grad(loss, 2, has_aux=True))
    report, taken = gradient(problem.params, problem.inputs, probe)
    return {"forward": int(taken), "backward": int(report.num_steps)}


# --- unrolled ------------------------------------------------------------------------


def _bptt(problem: Problem, setting: Setting) -> Callable:
    def solve(params: Any, inputs: Any) -> jax.Array:
        step = lambda h, _: (problem.f(params, inputs, h), None)
        return lax.scan(step, problem.h0, None, int(setting.forward))[0]

    return solve


def _tbptt(problem: Problem, setting: Setting) -> Callable:
    def solve(params: Any, inputs: Any) -> jax.Array:
        step = lambda h, _: (problem.f(params, inputs, h), None)
        first = int(setting.forward) - int(setting.backward)
        h = lax.stop_gradient(lax.scan(step, problem.h0, None, first)[0])
        return lax.scan(step, h, None, int(setting.backward))[0]

    return solve


# --- jax.lax -------------------------------------------------------------------------


def _custom_root(problem: Problem, setting: Setting) -> Callable:
    """Iteration to a relative step, and BiCGSTAB from jax.scipy."""

    def iterate(residual: Callable, h: jax.Array) -> jax.Array:
        def body(carry: tuple) -> tuple:
            h, _, k = carry
            r = residual(h)
            h = h + r
            return h, jnp.linalg.norm(r) > setting.forward * jnp.linalg.norm(h), k + 1

        more = lambda carry: carry[1] & (carry[2] < problem.budget)
        return lax.while_loop(more, body, (h, jnp.bool_(True), 0))[0]

    def tangent_solve(linear: Callable, b: jax.Array) -> jax.Array:
        solve = lambda apply, b: jax.scipy.sparse.linalg.bicgstab(
            apply, b, tol=setting.backward, maxiter=problem.budget
        )[0]
        return lax.custom_linear_solve(linear, b, solve, solve)

    def solve(params: Any, inputs: Any) -> jax.Array:
        residual = lambda h: problem.f(params, inputs, h) - h
        return lax.custom_root(residual, problem.h0, iterate, tangent_solve)

    return solve


# --- jaxopt --------------------------------------------------------------------------


def _jaxopt(solver: str, linear: str, problem: Problem, setting: Setting) -> Callable:
    import jaxopt

    f = lambda h, params, inputs: problem.f(params, inputs, h)
    options = {"tol": setting.backward, "maxiter": problem.budget}
    if linear == "gmres":  # counts restarts, of 20 steps each
        options |= {"maxiter": problem.budget // 20, "solve_method": "incremental"}
    inner = partial(getattr(jaxopt.linear_solve, f"solve_{linear}"), **options)
    made = getattr(jaxopt, solver)(
        f,
        maxiter=problem.budget,
        # Its tolerance is an absolute 2-norm: bring it to the scale of the others.
        tol=setting.forward * problem.h0.size**0.5,
        implicit_diff_solve=inner,
    )
    return lambda p, x: made.run(problem.h0, p, x).params


# --- optimistix ----------------------------------------------------------------------


def _optimistix(linear: str, problem: Problem, setting: Setting) -> Callable:
    import lineax as lx
    import optimistix as optx

    # lineax raises from compiled code, whatever `throw` says; we catch and record it.
    logging.getLogger("jax").setLevel(logging.CRITICAL)

    tolerances = {
        "rtol": setting.backward,
        "atol": setting.backward,
        "max_steps": problem.budget,
    }
    adjoints = {
        "default (LU)": lambda: optx.ImplicitAdjoint(),
        "GMRES": lambda: optx.ImplicitAdjoint(lx.GMRES(**tolerances)),
        "BiCGStab": lambda: optx.ImplicitAdjoint(lx.BiCGStab(**tolerances)),
        "Normal(CG)": lambda: optx.ImplicitAdjoint(lx.Normal(lx.CG(**tolerances))),
    }

    def solve(params: Any, inputs: Any) -> jax.Array:
        return optx.fixed_point(
            lambda h, args: problem.f(*args, h),
            optx.FixedPointIteration(max_steps=setting.forward, tol=setting.forward),
            problem.h0,
            args=(params, inputs),
            adjoint=adjoints[linear](),
            max_steps=problem.budget,
            throw=False,
        ).value

    return solve


# --- all -----------------------------------------------------------------------------


def methods() -> list[Method]:
    """Every method of every library, installed or not."""
    method = lambda library, name, make, **more: Method(
        library, f"{library} {name}", partial(compiled, make), **more
    )
    pairs = [("", rule) for rule in RULES if rule != "Neumann/4"]
    pairs += [
        ("Anderson + ", "BiCGSTAB"),
        ("RRE + ", "Adaptive"),
        ("RRE + ", "BiCGSTAB"),
        ("RRE + ", "RBP(RRE)"),
        ("Newton(BiCGSTAB) + ", "BiCGSTAB"),
        ("Newton(CG) + ", "CG"),
        ("Newton(Direct) + ", "Direct"),
        ("Iteration/4 + ", "Neumann/4"),
    ]
    made = [
        method("rbpjax", f + rule, partial(_ours, f, rule), forward=bool(f))
        for f, rule in pairs
    ]
    made += [
        method("jaxopt", title, partial(_jaxopt, solver, linear), forward=first != "")
        for solver, first in (
            ("FixedPointIteration", ""),
            ("AndersonAcceleration", "Anderson + "),
        )
        for linear, title in (
            ("normal_cg", f"{first}normal CG"),
            ("gmres", f"{first}GMRES"),
            ("bicgstab", f"{first}BiCGSTAB"),
        )
    ]
    made += [
        method("optimistix", linear, partial(_optimistix, linear), forward=False)
        for linear in ("default (LU)", "GMRES", "BiCGStab", "Normal(CG)")
    ]
    made += [
        method("jax", "custom_root", _custom_root, forward=False),
        method("jax", "BPTT", _bptt, unrolled=True, forward=False),
        method("jax", "TBPTT", _tbptt, unrolled=True, forward=False),
    ]
    from benchmarks.comparison import torch_peers as rules_torch

    made += [
        Method("torchdeq", f"torchdeq {title}", partial(rules_torch.program, solver))
        for solver, title in (
            ("fixed_point_iter", "fixed point"),
            ("anderson", "Anderson"),
            ("broyden", "Broyden"),
        )
    ]
    return made


def installed(library: str) -> str | None:
    """Why a library's methods are skipped, if they are."""
    extra = "peers-torch" if library == "torchdeq" else "peers"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(library)
    except ImportError:
        return f"{library} is not installed: pip install -e '.[{extra}]'"
    return None
