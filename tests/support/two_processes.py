"""One of two processes that share a mesh; run by test_two_processes.py.

Prints, from process 0, the relative error of gradients of a sharded network against
those of this process alone, in float32.
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


def main(process: int, address: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    assert jax.device_count() == 4 and jax.process_count() == 2

    random = np.random.default_rng(0)
    w = (0.8 * random.normal(size=(16, 16)) / 4).astype(np.float32)
    x = random.normal(size=(8, 16)).astype(np.float32)
    grad = jax.jit(jax.grad(loss, (0, 1, 3)))
    probe = rbpjax.AdjointReport.zeros()
    alone = grad(*jax.device_put((w, x, 0 * x), jax.local_devices()[0]), probe)

    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    gather = jax.jit(lambda a: a, out_shardings=NamedSharding(mesh, P()))

    def shard(a, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(a.shape, sharding, lambda i: a[i])

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


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
