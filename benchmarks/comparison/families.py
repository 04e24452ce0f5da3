"""Which backward rule when: nine families of Jacobians × sizes × dtypes × rules.

For each rule, the products with J or Jᵀ until its own tolerance, the true error against
a dense float64 solve, and whether its report tells the truth. The default rule's
thresholds were chosen from this table and that of ``rules``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rbpjax
from benchmarks.harness import (
    environment,
    interleaved_times,
    progress,
    read_json,
    require,
    say,
    spread,
    table,
    write_json,
)
from rbpjax._core import tree
from rbpjax.fixed_point.backward.neumann import begin
from rbpjax.types import LinearMap, PyTree

Random = np.random.Generator


def _basis(random: Random, n: int) -> np.ndarray:
    return np.linalg.qr(random.normal(size=(n, n)))[0]


def _symmetric(low: float, high: float) -> Callable[[Random, int], np.ndarray]:
    def make(random: Random, n: int) -> np.ndarray:
        q = _basis(random, n)
        return (q * np.linspace(low, high, n)) @ q.T

    return make


def _ginibre(rho: float) -> Callable[[Random, int], np.ndarray]:
    def make(random: Random, n: int) -> np.ndarray:
        a = random.normal(size=(n, n))
        return rho * a / np.abs(np.linalg.eigvals(a)).max()

    return make


def _non_normal(random: Random, n: int) -> np.ndarray:
    """Eigenvalues within ±0.5 under a strictly triangular part of norm 2."""
    a = np.triu(random.normal(size=(n, n)), 1)
    a = 2 * a / np.linalg.norm(a, 2) + np.diag(random.uniform(-0.5, 0.5, n))
    q = _basis(random, n)
    return q @ a @ q.T


FAMILIES: dict[str, Callable[[Random, int], np.ndarray]] = {
    "symmetric [0, 0.9]": _symmetric(0.0, 0.9),
    "symmetric [-0.99, 0.99]": _symmetric(-0.99, 0.99),
    "0.95 × orthogonal": lambda random, n: 0.95 * _basis(random, n),
    "Ginibre, ρ = 0.5": _ginibre(0.5),
    "Ginibre, ρ = 0.95": _ginibre(0.95),
    "Ginibre, ρ = 0.99": _ginibre(0.99),
    "non-normal, ρ = 0.5": _non_normal,
    "symmetric [-1.5, 0.9]": _symmetric(-1.5, 0.9),
    "Ginibre, ρ = 1.5": _ginibre(1.5),
}

# The rule at a tolerance, and its products with J or Jᵀ a step.
RULES: dict[str, tuple[Callable[[float | None], rbpjax.BackwardRule], int]] = {
    "Neumann": (lambda tol: rbpjax.Neumann(tol=tol, max_steps=3000), 1),
    "RBP(Anderson)": (lambda tol: rbpjax.RBP(rbpjax.Anderson(5, 3000, tol)), 1),
    "CGNormal": (lambda tol: rbpjax.CGNormal(3000, tol), 2),
    "BiCGSTAB": (lambda tol: rbpjax.BiCGSTAB(1500, tol), 2),
    "GMRES(20)": (lambda tol: rbpjax.GMRES(3000, tol), 1),
    "Adaptive": (lambda tol: rbpjax.Adaptive(tol, 4000), 0),
}


@dataclasses.dataclass(frozen=True)
class Families:
    """Compare all backward rules on nine families of Jacobians."""

    sizes: tuple[int, ...] = (50, 500)
    """Numbers of units."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed draws a Jacobian and a cotangent."""

    def run(self) -> dict[str, Any]:
        """Writes ``results/families.json`` and prints the table of products."""
        require(bool(self.sizes) and min(self.sizes) >= 2, "sizes must be 2 or more")
        require(bool(self.seeds), "give at least one seed")
        cases = [
            (dtype, n, family)
            for dtype in ("float64", "float32")
            for n in self.sizes
            for family in FAMILIES
        ]
        entries = []
        with jax.enable_x64(True):
            for dtype, n, family in progress(cases, len(cases), "families"):
                entries.append(self.measure(dtype, n, family))
            overhead = self.overhead()
        result = {
            "experiment": "families",
            "command": "python -m benchmarks families",
            "options": dataclasses.asdict(self),
            "environment": environment(),
            "tolerance": {"float64": 1e-6, "float32": "the rules' default"},
            "entries": entries,
            "adaptive_over_neumann": overhead,
        }
        path = write_json("families", result)
        for dtype in ("float64", "float32"):
            say(f"\n{dtype}, n = {max(self.sizes)}: products (! not converged)\n")
            say(table(rows(read_json("families"), dtype, max(self.sizes))))
        say(f"\nAdaptive ÷ Neumann, time: {overhead}\nWritten: {path.name}")
        return result

    def measure(self, dtype: str, n: int, family: str) -> dict[str, Any]:
        """All rules on one family: products, errors and verdicts, by seed."""
        entry: dict[str, Any] = {"dtype": dtype, "n": n, "family": family, "rules": {}}
        problems = []
        for seed in self.seeds:
            random = np.random.default_rng(seed)
            jac = FAMILIES[family](random, n)
            problems.append((jac, random.normal(size=n)))
        entry["condition"] = [np.linalg.cond(np.eye(n) - jac) for jac, _ in problems]
        for name, (make, cost) in RULES.items():
            rule = make(1e-6 if dtype == "float64" else None)
            products, errors, converged, residuals = [], [], [], []
            solve = jax.jit(partial(_counted, rule))
            for jac, g in problems:
                exact = np.linalg.solve(np.eye(n) - jac.T, g)
                solution, count = solve(jnp.asarray(jac, dtype), jnp.asarray(g, dtype))
                value = np.asarray(solution.value, np.float64)
                error = np.linalg.norm(value - exact) / np.linalg.norm(exact)
                products.append(int(solution.num_steps) * cost if cost else int(count))
                errors.append(float(error))
                converged.append(bool(solution.converged))
                residuals.append(float(solution.residual))
            entry["rules"][name] = {
                "products": products,
                "error": errors,
                "converged": converged,
                "residual": residuals,
            }
        return entry

    def overhead(self) -> dict[str, Any]:
        """Time of the default ÷ time of Neumann where ρ(J) = 0.5.

        A hundred solves in one call, so that starting the call does not count.
        """
        result = {}
        for n in self.sizes:
            random = np.random.default_rng(self.seeds[0])
            jac = jnp.asarray(FAMILIES["Ginibre, ρ = 0.5"](random, n), jnp.float32)
            g = jnp.asarray(random.normal(size=(100, n)), jnp.float32)
            calls = {
                name: partial(jax.jit(partial(_values, RULES[name][0](None))), jac, g)
                for name in ("Neumann", "Adaptive")
            }
            times = interleaved_times(calls, 50)
            ratio = np.array(times["Adaptive"]) / np.array(times["Neumann"])
            result[str(n)] = spread(ratio.tolist())
        return result


def _values(rule: rbpjax.BackwardRule, jac: jax.Array, gs: jax.Array) -> jax.Array:
    return jax.lax.map(lambda g: rule(lambda v: jac.T @ v, g).value, gs)


def _counted(
    rule: rbpjax.BackwardRule, jac: jax.Array, g: jax.Array
) -> tuple[rbpjax.Solution, jax.Array]:
    """The solution, and its products."""
    vjp = lambda v: jac.T @ v
    solution = rule(vjp, g)
    if isinstance(rule, rbpjax.Adaptive):
        return solution, default_products(rule, vjp, g)
    return solution, solution.num_steps


def default_products(rule: rbpjax.Adaptive, vjp: LinearMap, g: PyTree) -> jax.Array:
    """Products of the default: Neumann's steps have one, all others two."""
    unit, _ = tree.to_unit(g)
    tol = tree.default_tol(g) if rule.tol is None else rule.tol
    (_, _, steps, _), terms = rule.solve(vjp, unit, begin(vjp, unit, None), tol)
    return 2 * steps - terms


def rows(result: dict[str, Any], dtype: str, n: int) -> list[dict[str, str]]:
    """A row a family: mean products of each rule, ! where it did not converge."""
    made = []
    for entry in result["entries"]:
        if entry["dtype"] != dtype or entry["n"] != n:
            continue
        row = {"J": entry["family"], "κ(I - J)": f"{np.mean(entry['condition']):.0f}"}
        for name, r in entry["rules"].items():
            mark = "" if all(r["converged"]) else "!"
            row[name] = f"{np.mean(r['products']):.0f}{mark}"
        made.append(row)
    return made
