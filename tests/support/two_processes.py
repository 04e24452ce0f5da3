"""One of two processes that share a mesh; run by test_two_processes.py.

Prints, from process 0, the relative error of gradients of a sharded network against
those of this process alone: in float32, or, with ``parts``, in float64 of a state in
parts, with collectives in f, by every solver and rule.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rbpjax


def loss(w, x, h0, probe):
    f = lambda w, x, h: jnp.tanh(h @ w.T + x)
    return jnp.mean(rbpjax.rbp_solve(f)(w, x, h0, probe).value ** 2)


def place(a, mesh, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(np.shape(a), sharding, lambda i: a[i])


def sharded_arrays(process: int) -> None:
    random = np.random.default_rng(0)
    w = (0.8 * random.normal(size=(16, 16)) / 4).astype(np.float32)
    x = random.normal(size=(8, 16)).astype(np.float32)
    grad = jax.jit(jax.grad(loss, (0, 1, 3)))
    probe = rbpjax.AdjointReport.zeros()
    alone = grad(*jax.device_put((w, x, 0 * x), jax.local_devices()[0]), probe)

    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    gather = jax.jit(lambda a: a, out_shardings=NamedSharding(mesh, P()))

    shard = lambda a, spec: place(a, mesh, spec)
    for w_spec, x_spec in ((P(), P("d")), (P("d"), P())):
        args = (shard(w, w_spec), shard(x, x_spec), shard(0 * x, x_spec))
        *bars, report = grad(*args, probe)
        for got, want in zip(bars, alone[:2], strict=True):
            got = np.asarray(gather(got).addressable_data(0), np.float64)
            want = np.asarray(want, np.float64)
            error = np.linalg.norm(got - want) / np.linalg.norm(want)
            if process == 0:
                converged = float(report.converged.addressable_data(0))
                print("error", error, "converged", converged, flush=True)


def parts(process: int) -> None:
    """Gradients and reports of a batch in parts, a mean over all of it in f."""
    from tests.support import sharded
    from tests.support.problems import RULES, ZEROS

    layout = sharded.LAYOUTS["batch"]
    mesh, data = layout.mesh(), list(map(np.asarray, sharded.data()))
    w, x, weights = (
        place(a, mesh, spec)
        for a, spec in zip(data, (layout.w, layout.h, layout.h), strict=True)
    )
    zeros = lambda p: place(np.asarray(p), mesh, P("a"))
    probes = jax.tree.map(zeros, ZEROS(layout.shape))
    pairs = [("hybrid", rule) for rule in RULES if rule != "callable"]
    pairs += [(solver, "neumann") for solver in sharded.SOLVERS if solver != "hybrid"]
    for solver, rule in pairs:
        *want, one = sharded.alone(solver, rule)
        loss = sharded.in_parts(
            layout, sharded.SOLVERS[solver], sharded.rule_of(rule), True
        )
        w_bar, x_bar, report = jax.jit(jax.grad(loss, (0, 1, 3)))(w, x, weights, probes)
        pieces = [(w_bar.addressable_data(0), want[0])]
        pieces += [(s.data, want[1][s.index]) for s in x_bar.addressable_shards]
        errors = [
            np.linalg.norm(np.asarray(got) - right) / np.linalg.norm(right)
            for got, right in pieces
        ]
        flags = [s.data for s in report.converged.addressable_shards]
        converged = float(min(np.asarray(flag).min() for flag in flags))
        if process == 0:
            assert one.converged == 1
            print("error", max(errors), "converged", converged, flush=True)


def main(process: int, address: str, what: str) -> None:
    devices = 4 if what == "parts" else 2
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_enable_x64", what == "parts")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    assert jax.device_count() == 2 * devices and jax.process_count() == 2
    (parts if what == "parts" else sharded_arrays)(process)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
