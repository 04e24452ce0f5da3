"""One training step on so many devices of so many processes: counted and timed.

Run by ``scaling``, in processes of its own: the number of virtual devices is fixed when
JAX starts. The network is that of ``examples/distributed``, with a fixed number of
steps, forward and backward, so that all of them can be counted.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rbpjax
from benchmarks.harness.measurement import spread
from benchmarks.scaling.counts import count

PIXELS, CLASSES = 784, 16


def network(solver_steps: int) -> Any:
    """``loss(params, images, labels)`` of a layer at equilibrium."""
    f = lambda w, x, h: jnp.tanh(h @ w + x)
    solve = rbpjax.rbp_solve(
        f,
        forward=rbpjax.FixedPointIteration(steps=solver_steps),
        backward=rbpjax.Neumann(steps=solver_steps),
    )

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        x = images @ params["encode"]
        scores = solve(params["w"], x, jnp.zeros_like(x)).value @ params["read"]
        terms = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
        return terms.mean()

    return loss


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """Counts of one step on one device, and its time on all."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    units, batch = asked["units"], asked["batch"]
    kind = lambda dtype, *shape: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, P("data"))
    )
    params = {
        "encode": kind(jnp.float32, PIXELS, units),
        "w": kind(jnp.float32, units, units),
        "read": kind(jnp.float32, units, CLASSES),
    }
    images, labels = kind(jnp.float32, batch, PIXELS), kind(jnp.int32, batch)
    loss = network(asked["solver_steps"])

    def update(params: Any, images: jax.Array, labels: jax.Array) -> Any:
        grads = jax.grad(loss)(params, images, labels)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)

    placed = jax.tree.map(lambda p: p.sharding, params)
    step = jax.jit(update, out_shardings=placed)
    compiled = step.lower(params, images, labels).compile()
    counts = count(compiled.as_text())
    analysis = compiled.cost_analysis() or {}
    # What XLA itself says, with each loop counted once.
    once = {k: analysis.get(k, 0.0) for k in ("flops", "bytes accessed")}
    return {
        **counts.plain(),
        "unknown_loops": counts.unknown,
        "cost_analysis": once,
    } | (timed(step, (params, images, labels), asked) if asked["repetitions"] else {})


def timed(step: Any, kinds: tuple, asked: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step, on small random arrays of those kinds."""
    random = np.random.default_rng(0)

    def place(kind: jax.ShapeDtypeStruct) -> jax.Array:
        values = random.normal(size=kind.shape) / kind.shape[0] ** 0.5
        values = values.astype(kind.dtype)  # labels are all of one class
        return jax.make_array_from_callback(
            kind.shape, kind.sharding, lambda i: values[i]
        )

    args, times = jax.tree.map(place, kinds), []
    for _ in range(asked["repetitions"] + 2):
        begin = time.perf_counter()
        jax.block_until_ready(step(*args))
        times.append(time.perf_counter() - begin)
    return {"seconds": spread(times[2:]) | {"least": min(times[2:])}}


def main() -> None:
    """``worker.py JSON``; process 0 prints the result as JSON in one line."""
    asked = json.loads(sys.argv[1])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", asked["devices"] // asked["processes"])
    if asked["processes"] > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            asked["address"], asked["processes"], asked["process"]
        )
    found = measure(asked)
    if jax.process_index() == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
