"""Which backward rule when: nine families of Jacobians × sizes × dtypes × rules.

For each rule, the products with J or Jᵀ until its own tolerance, the true error against
a dense float64 solve, and whether its report tells the truth. The default rule's
thresholds were chosen from this table and that of ``rules``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import rbpjax
from benchmarks.comparison.jacobians import FAMILIES
from benchmarks.harness.measurement import interleaved_times, spread
from benchmarks.harness.options import Seeds, Within
from benchmarks.harness.progress import progress, say
from benchmarks.harness.results import read_json, record, write_json
from benchmarks.harness.tables import table

# The rules at a tolerance.
RULES: dict[str, Callable[[float | None], rbpjax.BackwardRule]] = {
    "Neumann": lambda tol: rbpjax.Neumann(tol=tol, max_steps=3000),
    "RBP(Anderson)": lambda tol: rbpjax.RBP(
        rbpjax.Anderson(tol=tol, max_steps=3000, memory=5)
    ),
    "CGNormal": lambda tol: rbpjax.CGNormal(tol=tol, max_steps=3000),
    "BiCGSTAB": lambda tol: rbpjax.BiCGSTAB(tol=tol, max_steps=1500),
    "GMRES(20)": lambda tol: rbpjax.GMRES(tol=tol, max_steps=3000),
    "Adaptive": lambda tol: rbpjax.Adaptive(tol=tol, max_steps=4000),
}


@dataclasses.dataclass(frozen=True)
class Families:
    """Compare all backward rules on nine families of Jacobians."""

    name: ClassVar[str] = "families"

    sizes: Annotated[tuple[int, ...], Within(2)] = (50, 500)
    """Numbers of units."""
    seeds: Seeds = (0, 1, 2)
    """Each seed draws a Jacobian and a cotangent."""

    def run(self) -> dict[str, Any]:
        """Writes ``results/families.json`` and prints the table of products."""
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
        result = record(
            "families",
            "families",
            dataclasses.asdict(self),
            tolerance={"float64": 1e-6, "float32": "the rules' default"},
            entries=entries,
            adaptive_over_neumann=overhead,
        )
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
        for name, make in RULES.items():
            rule = make(1e-6 if dtype == "float64" else None)
            products, errors, converged, residuals = [], [], [], []
            solve = jax.jit(lambda jac, g, rule=rule: rule(lambda v: jac.T @ v, g))
            for jac, g in problems:
                exact = np.linalg.solve(np.eye(n) - jac.T, g)
                jac, g = jnp.asarray(jac, dtype), jnp.asarray(g, dtype)
                solution = solve(jac, g)
                value = np.asarray(solution.value, np.float64)
                error = np.linalg.norm(value - exact) / np.linalg.norm(exact)
                products.append(int(solution.num_products))
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
                name: partial(jax.jit(partial(_values, RULES[name](None))), jac, g)
                for name in ("Neumann", "Adaptive")
            }
            times = interleaved_times(calls, 50)
            ratio = np.array(times["Adaptive"]) / np.array(times["Neumann"])
            result[str(n)] = spread(ratio.tolist())
        return result


def _values(rule: rbpjax.BackwardRule, jac: jax.Array, gs: jax.Array) -> jax.Array:
    return jax.lax.map(lambda g: rule(lambda v: jac.T @ v, g).value, gs)


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
