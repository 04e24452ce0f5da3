"""Looks for gradients that are wrong without a word: random problems, dense answers.

Every problem is a network h = tanh(W h + x) + c at a known fixed point, with a Jacobian
of a drawn family, in a drawn dtype and state structure, with a cotangent of a drawn
magnitude; its adjoint is solved by a drawn rule through ``rbp_solve``, as a user's
gradient is, and by LU in float64. A problem is *silently wrong* if the report says
converged and the error exceeds ten times the tolerance times the condition number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rbpjax
from benchmarks.comparison.jacobians import FAMILIES
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.options import Count, Natural
from benchmarks.harness.progress import say
from benchmarks.harness.results import record, write_json
from benchmarks.harness.tables import table
from benchmarks.harness.training import train

Random = np.random.Generator
Rule = rbpjax.BackwardRule

TOLERANCES = {
    "float64": (None, 1e-2, 1e-5, 1e-8, 1e-11),
    "float32": (None, 1e-1, 1e-3, 1e-5, 1e-7),
    "bfloat16": (None, 1e-1, 1e-2),
    "complex128": (None, 1e-2, 1e-5, 1e-8, 1e-11),
    "complex64": (None, 1e-1, 1e-3, 1e-5, 1e-7),
}

# Budgets are small, so that some problems are out of reach, and must be reported so.
RULES: dict[str, Callable[[Random, float | None], Rule]] = {
    "Adaptive": lambda _, tol: rbpjax.Adaptive(tol=tol, max_steps=400),
    "Neumann": lambda _, tol: rbpjax.Neumann(tol=tol, max_steps=300),
    "Neumann, damped": lambda random, tol: rbpjax.Neumann(
        tol=tol,
        max_steps=300,
        damping=float(random.uniform(0.1, 0.8)),
        check_every=int(random.integers(1, 5)),
    ),
    "Neumann(K)": lambda random, _: rbpjax.Neumann(steps=int(random.integers(0, 200))),
    "CGNormal": lambda _, tol: rbpjax.CGNormal(tol=tol, max_steps=200),
    "BiCGSTAB": lambda _, tol: rbpjax.BiCGSTAB(tol=tol, max_steps=200),
    "GMRES": lambda random, tol: rbpjax.GMRES(
        tol=tol, max_steps=200, restart=int(random.integers(1, 20))
    ),
    "RBP": lambda random, tol: rbpjax.RBP(
        rbpjax.FixedPointIteration(tol=tol, max_steps=300),
        seed=[None, 0][random.integers(2)],
    ),
    "RBP(Anderson)": lambda random, tol: rbpjax.RBP(
        rbpjax.Anderson(tol=tol, max_steps=200, memory=int(random.integers(1, 8)))
    ),
    "RBP(RRE)": lambda random, tol: rbpjax.RBP(
        rbpjax.RRE(tol=tol, max_steps=200, memory=int(random.integers(1, 8)))
    ),
    "Direct": lambda _, tol: rbpjax.Direct(tol=tol),
}


def at_fixed_point(step: Callable, h0: Any) -> rbpjax.Solution:
    """The forward solver: h0 is the fixed point already."""
    return rbpjax.Solution(
        value=h0,
        num_steps=jnp.int32(0),
        residual=jnp.float32(0),
        converged=jnp.bool_(True),
    )


class Group(NamedTuple):
    """Problems that share a compilation, and what they share.

    Attributes:
      name: of the rule.
      rule: the rule.
      tol: its tolerance, or that of the dtype.
      dtype: of the state.
      n: number of real entries of the state.
      unravel: a flat real vector of n entries -> the state.
      together: ``vmap`` over the problems, or one after the other.
    """

    name: str
    rule: Rule
    tol: float
    dtype: str
    n: int
    unravel: Callable[[jax.Array], Any]
    together: bool


class Outcome(NamedTuple):
    """What came of the problems of a group; arrays, one entry a problem.

    Attributes:
      rule: index into RULES.
      converged: what the report said.
      excess: error ÷ (10 · tolerance · condition); above 1 is wrong.
      false_alarm: not converged was said of what is well within the tolerance.
      misreported: the reported residual is less than half of the true one.
    """

    rule: np.ndarray
    converged: np.ndarray
    excess: np.ndarray
    false_alarm: np.ndarray
    misreported: np.ndarray


def draw_group(random: Random) -> Group:
    """A rule, a tolerance, a dtype, a structure and a size."""
    name = list(RULES)[random.integers(len(RULES))]
    dtype = list(TOLERANCES)[random.integers(len(TOLERANCES))]
    tol = TOLERANCES[dtype][random.integers(len(TOLERANCES[dtype]))]
    rule = RULES[name](random, tol)
    eps = float(jnp.finfo(dtype).eps)
    # What the dtype cannot resolve cannot be asked for. A fixed count has no tolerance.
    asked = eps**0.75 if tol is None or name == "Neumann(K)" else max(tol, eps)
    n = int(
        2 * random.choice([1, 2, 3, 5, 8, 12, 30])
    )  # even: complex numbers are pairs
    unravel = _structure(random, n, dtype)
    return Group(name, rule, asked, dtype, n, unravel, bool(random.integers(2)))


def _structure(random: Random, n: int, dtype: str) -> Callable[[jax.Array], Any]:
    """How a flat real vector becomes a state: an array, a matrix, or a nest."""
    kind, cut = random.integers(3), int(random.integers(0, n // 2))

    def unravel(v: jax.Array) -> Any:
        if dtype.startswith("complex"):
            v = jax.lax.complex(v[: n // 2], v[n // 2 :])
        else:
            v = v.astype(dtype)
        if kind == 0:
            return v
        if kind == 1:
            return v.reshape(1, -1)
        return {"a": v[:cut], "b": (v[cut:-1], v[-1])}  # with an empty leaf if cut = 0

    return unravel


def ravel(h: Any) -> jax.Array:
    """The flat real vector of a state, in its own real dtype."""
    flat = jnp.concatenate([jnp.ravel(u) for u in jax.tree.leaves(h)])
    if jnp.iscomplexobj(flat):
        return jnp.concatenate([flat.real, flat.imag])
    return flat


def draw_problem(random: Random, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(W, h*, g)`` with tanh'(·) W of a drawn family, and g of any magnitude."""
    make = list(FAMILIES.values())[random.integers(len(FAMILIES))]
    jac = make(random, n) * random.choice([1.0, 1.0, 0.5, 0.1, 0.0, 30.0])
    h = random.uniform(-0.9, 0.9, n)
    g = random.normal(size=n) * random.choice([1.0, 1.0, 1.0, 0.0], size=n)
    return jac / (1 - h**2)[:, None], h, g * 10.0 ** random.uniform(-30, 30)


def step(params: Any, c: Any, h: Any) -> Any:
    """H ↦ tanh(W h + x) + c on the flat real vector; the gradient for c is z."""
    w, x, unravel = params
    return jax.tree.map(jnp.add, unravel(jnp.tanh(w @ ravel(h) + x)), c)


def run_group(random: Random, size: int) -> Outcome:
    """Draws a group and ``size`` problems, and compares them with dense answers."""
    group = draw_group(random)
    drawn = [draw_problem(random, group.n) for _ in range(size)]
    real = jnp.finfo(group.dtype).dtype
    w, h, g = (jnp.asarray(np.stack(part), real) for part in zip(*drawn, strict=True))
    solve = rbpjax.rbp_solve(
        lambda p, c, h: step((*p, group.unravel), c, h),
        forward=at_fixed_point,
        backward=group.rule,
    )

    def adjoint(w: jax.Array, h: jax.Array, g: jax.Array) -> Any:
        """The gradient for c of Re⟨g, h*⟩, the report, and J as f's dtype has it."""
        x = jnp.arctanh(h) - w @ h
        start = group.unravel(h)
        zero = jax.tree.map(jnp.zeros_like, start)

        def loss(c: Any, probe: rbpjax.AdjointReport) -> jax.Array:
            return jnp.vdot(g, ravel(solve((w, x), c, start, probe).value))

        c_bar, report = jax.grad(loss, (0, 1))(zero, rbpjax.AdjointReport.zeros())
        again = lambda v: ravel(step((w, x, group.unravel), zero, group.unravel(v)))
        # JAX's gradient for a complex number is the conjugate of the pair's.
        z = ravel(jax.tree.map(jnp.conj, c_bar))
        return z, report, jax.jacrev(again)(h)

    mapped = jax.vmap(adjoint) if group.together else partial(_one_by_one, adjoint)
    z, report, jac = jax.jit(mapped)(w, h, g)
    with np.errstate(over="ignore", invalid="ignore"):
        return _judge(group, *jax.device_get((jac, g, z, report)))


def _one_by_one(f: Callable, *arrays: jax.Array) -> Any:
    return jax.lax.map(lambda args: f(*args), arrays)


def _judge(
    group: Group,
    jac: np.ndarray,
    g: np.ndarray,
    z: np.ndarray,
    report: rbpjax.AdjointReport,
) -> Outcome:
    """Compares with LU in float64, for the J and the g that the rule was given."""
    wide = lambda a: np.asarray(a, np.float64)
    jac, g, z = map(wide, (jac, g, z))
    matrix = np.eye(group.n) - np.swapaxes(jac, 1, 2)  # I - Jᵀ
    size = np.linalg.norm(g, axis=1)
    unit = g / np.where(size == 0, 1, size)[:, None]
    exact = np.linalg.solve(matrix, unit[:, :, None])[:, :, 0]
    found = z / np.where(size == 0, 1, size)[:, None]
    length = np.linalg.norm(exact, axis=1)
    error = np.linalg.norm(found - exact, axis=1) / np.where(size == 0, 1, length)
    error = np.where(np.isfinite(found).all(1), error, np.inf)
    residual = np.linalg.norm(
        unit - np.einsum("bij,bj->bi", matrix, np.nan_to_num(found)), axis=1
    )
    sigma = np.linalg.svd(matrix, compute_uv=False)
    condition = sigma[:, 0] / sigma[:, -1]
    least = 1.0
    if group.name.startswith("RBP"):  # its tolerance is relative to ‖z‖, not to ‖g‖
        condition = np.maximum(condition, 1 / sigma[:, -1])
        least = np.minimum(1.0, np.linalg.norm(found, axis=1))
    converged = wide(report.converged) == 1
    # What rounding alone leaves in a residual of this dtype.
    eps = float(jnp.finfo(group.dtype).eps)
    noise = 4 * eps * group.n * (1 + np.linalg.norm(found, axis=1) * sigma[:, 0])
    noise = np.where(np.isfinite(noise), noise, np.inf)
    well_within = (residual + noise <= least * group.tol / 2) & (error <= group.tol)
    return Outcome(
        rule=np.full(len(z), list(RULES).index(group.name)),
        converged=converged,
        excess=error / (10 * group.tol * condition),
        false_alarm=~converged & well_within,
        misreported=wide(report.residual) < residual / 2 - noise,
    )


@dataclasses.dataclass(frozen=True)
class Fuzz:
    """Count gradients that are wrong although the report says converged."""

    name: ClassVar[str] = "fuzz"

    problems: Count = 20_000
    """How many; rounded up to whole groups."""
    seed: Natural = 0
    """Of the generator."""
    group: Count = 40
    """Problems that share a rule, a dtype and a structure, and so a compilation."""
    fresh: bool = False
    """Forget what an interrupted run left."""

    def run(self) -> dict[str, Any]:
        """Writes ``results/fuzz.json`` and prints a row a rule."""
        groups = -(-self.problems // self.group)
        options = dataclasses.asdict(self) | {"fresh": None}
        checkpoints = Checkpoints("fuzz", options, self.fresh)
        with jax.enable_x64(True):
            blank = jnp.zeros((groups, self.group))

            def look(found: Outcome, i: int) -> Outcome:
                random = np.random.default_rng((self.seed, i))
                new = run_group(random, self.group)
                return Outcome(
                    *(a.at[i].set(b) for a, b in zip(found, new, strict=True))
                )

            start = Outcome(*5 * (blank,))
            found = train(checkpoints, "outcomes", start, look, groups, every=25)
            found = Outcome(*map(np.asarray, found))
        kept = dataclasses.asdict(self)
        result = record("fuzz", "fuzz", kept, **summary(found))
        path = write_json("fuzz", result)
        say(table(rows(result)))
        say(f"\nWritten: {path.name}")
        checkpoints.clear()
        return result


def summary(found: Outcome) -> dict[str, Any]:
    """Counts of each verdict by rule, and the worst problem of all."""
    excess = np.where(found.converged == 1, found.excess, 0.0)
    by_rule = {}
    for i, name in enumerate(RULES):
        mine = found.rule == i
        by_rule[name] = {
            "problems": int(mine.sum()),
            "converged": int(found.converged[mine].sum()),
            "silently_wrong": int((excess[mine] > 1).sum()),
            "false_alarms": int(found.false_alarm[mine].sum()),
            "misreported": int(found.misreported[mine].sum()),
            "worst": float(excess[mine].max(initial=0.0)),
        }
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    return {
        "problems": found.rule.size,
        "rules": by_rule,
        "worst": {
            "group": int(worst[0]),
            "problem": int(worst[1]),
            "rule": list(RULES)[int(found.rule[worst])],
            "error ÷ (10 · tolerance · condition)": float(excess[worst]),
        },
    }


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row a rule."""
    return [
        {
            "rule": name,
            "problems": f"{r['problems']}",
            "said converged": f"{r['converged']}",
            "silently wrong": f"{r['silently_wrong']}",
            "false alarms": f"{r['false_alarms']}",
            "residual misreported": f"{r['misreported']}",
            "worst error ÷ bound": f"{r['worst']:.2g}",
        }
        for name, r in result["rules"].items()
    ]
