"""Is a second path for forward mode worth having? The one that JAX would allow.

``rbp_solve`` is a ``custom_vjp``: reverse mode of every order, reports, ``shard_map``.
The alternative is a ``custom_jvp`` around ``lax.custom_linear_solve``, which has
forward mode and ``jax.hessian`` too, but no report of the adjoint. Here both are built
on the same rules and measured on the same network.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import rbpjax
from benchmarks.harness.measurement import interleaved_times, spread, temporary_bytes
from benchmarks.harness.options import Count, Natural, Within
from benchmarks.harness.progress import say
from benchmarks.harness.results import record, write_json
from benchmarks.harness.tables import table

Function = Callable[..., Any]


def any_mode(
    f: rbpjax.StepFn, forward: rbpjax.ForwardSolver, rule: rbpjax.BackwardRule
) -> Function:
    """``solve(params, inputs, h0) -> h*`` in every mode of differentiation."""

    @partial(jax.custom_jvp, nondiff_argnums=(2,))
    def solve(params: Any, inputs: Any, h0: jax.Array) -> jax.Array:
        return forward(lambda h: f(params, inputs, h), h0).value

    @solve.defjvp
    def _(h0: jax.Array, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        h = solve(*primals, h0)
        drive = jax.jvp(lambda *args: f(*args, h), primals, tangents)[1]
        jvp = jax.linearize(lambda h: f(*primals, h), h)[1]
        solved = lambda apply, b: rule(lambda v: v - apply(v), b).value
        h_dot = jax.lax.custom_linear_solve(
            lambda v: v - jvp(v), drive, solved, transpose_solve=solved
        )
        return h, h_dot

    return solve


@dataclasses.dataclass(frozen=True)
class Modes:
    """Measure rbp_solve and rbp_jvp against a custom_jvp in every mode."""

    name: ClassVar[str] = "modes"

    size: Annotated[int, Within(2)] = 64
    """Units of the network; the Hessian is that of a loss of so many inputs."""
    repetitions: Count = 30
    """Of each timing."""
    seed: Natural = 0
    """Of weights and inputs."""

    def run(self) -> dict[str, Any]:
        """Writes ``results/modes.json`` and prints a row a derivative."""
        with jax.enable_x64(True):
            derivatives = self.measure()
        kept = dataclasses.asdict(self)
        result = record("modes", "modes", kept, derivatives=derivatives)
        path = write_json("modes", result)
        say(table(rows(result)))
        say(f"\nWritten: {path.name}")
        return result

    def measure(self) -> dict[str, Any]:
        """Each derivative by both paths: error, time, compile time, bytes."""
        n = self.size
        random = np.random.default_rng(self.seed)
        w = jnp.asarray(0.5 * random.normal(size=(n, n)) / np.sqrt(n))
        x, direction = jnp.asarray(random.normal(size=(2, n)))
        h0 = jnp.zeros(n)
        f = lambda w, x, h: jnp.tanh(w @ h + x)
        forward = rbpjax.FixedPointIteration(tol=1e-13)
        rule = rbpjax.Adaptive(tol=1e-12)
        reverse = rbpjax.rbp_solve(f, forward=forward, backward=rule)
        ours = lambda x: reverse(w, x, h0).value
        every = any_mode(f, forward, rule)
        other = lambda x: every(w, x, h0)
        loss = lambda solve: lambda x: jnp.sum(jnp.sin(solve(x)) ** 2)

        def ours_jvp(x: jax.Array, direction: jax.Array) -> jax.Array:
            h = ours(x)
            tangents = (jnp.zeros_like(w), direction)
            return rbpjax.rbp_jvp(f, w, x, h, tangents, backward=rule).value

        ours_jacobian = lambda x: jax.vmap(partial(ours_jvp, x), out_axes=1)(jnp.eye(n))
        pairs = {
            "gradient": (jax.grad(loss(ours)), jax.grad(loss(other))),
            "directional derivative": (
                lambda x: ours_jvp(x, direction),
                lambda x: jax.jvp(other, (x,), (direction,))[1],
            ),
            "Jacobian, forward": (ours_jacobian, jax.jacfwd(other)),
            "Hessian": (jax.jacrev(jax.grad(loss(ours))), jax.hessian(loss(other))),
        }
        found = {}
        for name, (first, second) in pairs.items():
            compiled, entry = {}, {}
            for path, function in (("rbpjax", first), ("custom_jvp", second)):
                start = time.perf_counter()
                compiled[path] = jax.jit(function).lower(x).compile()
                seconds = time.perf_counter() - start
                entry[path] = {
                    "compile_s": seconds,
                    "bytes": temporary_bytes(function, x),
                }
            calls = {path: partial(call, x) for path, call in compiled.items()}
            times = interleaved_times(calls, self.repetitions)
            for path, measured in times.items():
                entry[path]["seconds"] = spread(measured)
            ratio = np.array(times["rbpjax"]) / np.array(times["custom_jvp"])
            values = [np.asarray(call()) for call in calls.values()]
            entry["time_ratio"] = spread(ratio.tolist())
            gap = np.linalg.norm(values[0] - values[1]) / np.linalg.norm(values[1])
            entry["difference"] = float(gap)
            found[name] = entry
        return found


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row a derivative."""
    made = []
    for name, entry in result["derivatives"].items():
        ours, other = entry["rbpjax"], entry["custom_jvp"]
        ratio = entry["time_ratio"]
        made.append(
            {
                "derivative": name,
                "rbpjax": f"{1e3 * ours['seconds']['median']:.3g} ms",
                "custom_jvp": f"{1e3 * other['seconds']['median']:.3g} ms",
                "time ratio": f"{ratio['median']:.2f} "
                f"[{ratio['q25']:.2f}, {ratio['q75']:.2f}]",
                "compile": f"{ours['compile_s']:.2f} / {other['compile_s']:.2f} s",
                "memory": f"{ours['bytes'] / 1e3:.0f} / {other['bytes'] / 1e3:.0f} kB",
                "difference": f"{entry['difference']:.0e}",
            }
        )
    return made
