"""Measurements of the unitary room: cost of the kernel, norms, memory of histories."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.measurement import interleaved_times, spread, temporary_bytes
from rbpjax.unitary import UnitaryCell, conv_exp, fourier_kernel, recomputed_scan
from rbpjax.unitary.activation import identity, modulus, saturate
from rbpjax.unitary.history import HistoryReport, Inverse, Replay

# --- cost ----------------------------------------------------------------------------


def cost(largest: int) -> dict[str, Any]:
    """Time of the kernel, of its gradient, and of one iteration, by lattice size."""
    sides = [2**i for i in range(4, int(math.log2(largest)) + 1)]
    cases = {
        "real, 1 channel": (None, False, "taylor"),
        "complex, 1 channel": (None, True, "taylor"),
        "real, 4 channels": (4, False, "taylor"),
        "real, 4 channels, Cayley": (4, False, "cayley"),
    }
    result: dict[str, Any] = {}
    for title, (channels, is_complex, method) in cases.items():
        result[title] = {}
        for side in sides if channels is None else sides[:-2]:
            cell = UnitaryCell(
                lattice=(side, side),
                channels=channels,
                complex_valued=is_complex,
                activation=identity,
                method=method,
            )
            weights = jax.jit(partial(cell.init, radius=1))(jax.random.key(0))
            kernel = weights.kernel
            if is_complex:
                kernel = jax.lax.complex(kernel[..., 0], kernel[..., 1])
            prepare = jax.jit(
                lambda w, n=side, method=method: conv_exp(w, (n, n), method=method)
            )
            params = jax.block_until_ready(jax.jit(cell.prepare)(weights))
            h = jax.random.normal(jax.random.key(1), cell.field_shape)
            h = h.astype(cell.start().dtype)
            pull = jax.jit(
                lambda w, u, f=prepare: jax.vjp(lambda w: f(w).hat, w)[1](u)[0]
            )
            times = interleaved_times(
                {
                    "kernel": partial(prepare, kernel),
                    "kernel_gradient": partial(pull, kernel, params.kernel.hat),
                    "iteration": partial(jax.jit(cell), params, None, h),
                },
                repetitions=max(5, min(30, 2**23 // (side**2 * (channels or 1) ** 2))),
            )
            ratios = np.array(times["kernel"]) / np.array(times["iteration"])
            result[title][str(side)] = {k: spread(v) for k, v in times.items()} | {
                "ratio": spread(list(ratios))
            }
    return {"cases": result}


# --- norms ---------------------------------------------------------------------------

PROBES = 41  # logarithmically spaced steps at which norms are kept


def norm_networks(key: jax.Array) -> dict[str, tuple[Callable, jax.Array]]:
    """Step functions h -> h on 64 sites, 8 channels (or one complex), with a start."""
    keys = jax.random.split(key, 4)
    shape = (64, 8)
    real = jax.random.normal(keys[0], shape)
    cells = {
        "unitary, linear": (UnitaryCell(lattice=(64,), activation=identity), 1.0),
        "unitary, linear, float32": (
            UnitaryCell(lattice=(64,), activation=identity),
            1.0,
        ),
        "orthogonal, modulus": (
            UnitaryCell(
                lattice=(64,), channels=8, complex_valued=False, activation=modulus
            ),
            1.0,
        ),
        "unitary, φ at amplitude 1": (
            UnitaryCell(lattice=(64,), activation=saturate),
            1.0,
        ),
        "unitary, φ at amplitude 0.01": (
            UnitaryCell(lattice=(64,), activation=saturate),
            0.01,
        ),
    }
    made: dict[str, tuple[Callable, jax.Array]] = {}
    for title, (cell, amplitude) in cells.items():
        dtype = "float32" if "float32" in title else "float64"
        cast = lambda x, dtype=dtype: x.astype(dtype)
        weights = cell.init(keys[1], radius=1, scale=1.0)
        params = cell.prepare(jax.tree.map(cast, weights))
        h = cast(jax.random.normal(keys[2], (*cell.field_shape, 2)) / math.sqrt(2))
        h = jax.lax.complex(h[..., 0], h[..., 1]) if cell.complex_valued else h[..., 0]
        made[title] = (partial(cell, params, None), amplitude * h)
    plain = jax.nn.initializers.lecun_normal()(keys[3], (3, 8, 8))
    start = jax.nn.initializers.delta_orthogonal()(keys[3], (3, 8, 8))
    moved = start + 0.01 * jax.random.normal(keys[3], start.shape)
    made["ConvRNN, tanh, plain start"] = (_conv(plain, jnp.tanh), real)
    made["ConvRNN, linear, plain start"] = (_conv(plain, lambda z: z), real)
    made["ConvRNN, tanh, orthogonal start"] = (_conv(start, jnp.tanh), real)
    made["ConvRNN, linear, orthogonal start, moved by 0.01"] = (
        _conv(moved, lambda z: z),
        real,
    )
    return made


def _conv(kernel: jax.Array, activation: Callable) -> Callable:
    convolve = fourier_kernel(jnp.swapaxes(kernel, 1, 2), (64,))
    return lambda h: activation(convolve(h))


def norms(steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    """‖h_t‖/‖h_0‖, and ‖∂L/∂h_{T-k}‖ for a unit gradient at T; float64 but for one."""
    at = np.unique(np.geomspace(1, steps, PROBES).astype(int))
    size = lambda z: jnp.linalg.norm(z.ravel())

    def measure(step: Callable, h: jax.Array, g: jax.Array) -> Any:
        forth = lambda h, _: (step(h), (h, size(step(h))))
        back = lambda g, h: (jax.vjp(step, h)[1](g)[0],) * 2
        _, (states, of_state) = jax.lax.scan(forth, h, None, steps)
        _, grads = jax.lax.scan(back, g / size(g), states, reverse=True)
        return of_state / size(h), jax.vmap(size)(grads)[::-1]

    result: dict[str, Any] = {}
    with jax.enable_x64(True):
        for seed in seeds:
            key = jax.random.key(seed)
            for title, (step, h) in norm_networks(key).items():
                g = jax.random.normal(jax.random.fold_in(key, 9), h.shape)
                ratios = jax.jit(partial(measure, step))(h, g.astype(h.dtype))
                entry = result.setdefault(title, {})
                for name, ratio in zip(("state", "gradient"), ratios, strict=True):
                    entry.setdefault(name, []).append(np.asarray(ratio)[at - 1])
                    # Six digits of a ratio near 1 would not show how near.
                    off = float(jnp.max(jnp.abs(ratio - 1)))
                    entry.setdefault(f"{name}_deviation", []).append(off)
    return {"steps": at, "networks": result}


# --- memory --------------------------------------------------------------------------


def memory(longest: int) -> dict[str, Any]:
    """Temporary bytes, time and error of one gradient, by T and kind of history."""
    lengths = [100 * 10**i for i in range(6) if 100 * 10**i <= longest]
    result: dict[str, Any] = {}
    with jax.enable_x64(True):
        for title, activation in (("linear", identity), ("modulus", modulus)):
            cell = UnitaryCell(lattice=(64,), activation=activation)
            weights = cell.init(jax.random.key(0), radius=2)
            h0 = jax.random.normal(jax.random.key(1), (64, 2))
            h0 = jax.lax.complex(h0[:, 0], h0[:, 1])
            for steps in lengths:
                kinds = histories(cell, steps)
                grads = {
                    kind: jax.jit(jax.grad(partial(_ramp, cell, run), (0, 1, 2)))
                    for kind, run in kinds.items()
                }
                args = (weights, h0, HistoryReport.zeros())
                calls = {k: partial(g, *args) for k, g in grads.items()}
                times = interleaved_times(calls, 5)
                exact = jax.tree.leaves(calls["stored"]()[:2])
                for kind, call in calls.items():
                    *got, report = call()
                    error = max(
                        float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
                        for a, b in zip(jax.tree.leaves(got), exact, strict=True)
                    )
                    row = result.setdefault(f"{title}: {kind}", {})
                    row[str(steps)] = {
                        "temporary_bytes": temporary_bytes(grads[kind], *args),
                        "seconds": spread(times[kind]),
                        "error": error,
                        "drift": float(report.drift),
                    }
    return {"state_bytes": 64 * 16, "histories": result}


def _ramp(cell: UnitaryCell, run: Callable, weights: Any, h0: Any, probe: Any) -> Any:
    h = run(cell.prepare(weights), h0, probe)
    return jnp.sum(h.real**2 * jnp.arange(64.0))


def histories(cell: UnitaryCell, steps: int) -> dict[str, Callable]:
    """``run(params, h0, probe) -> h_T`` for each way to get the states back."""

    def stored(params: Any, h0: jax.Array, _: Any) -> jax.Array:
        return jax.lax.scan(
            lambda h, _: (cell(params, None, h), None), h0, None, steps
        )[0]

    def checkpointed(params: Any, h0: jax.Array, _: Any) -> jax.Array:
        inner = 10 ** (len(str(steps)) // 2)  # about √T
        step = lambda h, _: (cell(params, None, h), None)
        segment = jax.checkpoint(lambda h: jax.lax.scan(step, h, None, inner)[0])
        outer = lambda h, _: (segment(h), None)
        return jax.lax.scan(outer, h0, None, steps // inner)[0]

    def recomputed(history: Any, params: Any, h0: jax.Array, probe: Any) -> jax.Array:
        return recomputed_scan(
            cell, params, None, h0, history=history, length=steps, probe=probe
        )[0]

    made = {"stored": stored, "checkpointed (√T)": checkpointed}
    made["Replay(32)"] = partial(recomputed, Replay(slots=32))
    if cell.activation.inverse is not None:
        made["Inverse"] = partial(recomputed, Inverse(inverse=cell.inverse))
        made["Inverse, 10 anchors"] = partial(
            recomputed, Inverse(inverse=cell.inverse, anchors=10)
        )
    return made
