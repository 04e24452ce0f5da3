"""Streaming estimators on eight devices: sequences, copies and units over them."""

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rbpjax import online
from tests.support.online import vanilla
from tests.support.problems import rows

ESTIMATORS = {
    "uoro": online.uoro,
    "rtrl": online.rtrl,
    "nobacktrack": online.nobacktrack,
    "snap1": lambda f, loss: online.snap1(f, loss),
    "rflo": lambda f, loss: online.rflo(f, loss),
    "kf_rtrl": lambda f, loss: online.kf_rtrl(f, loss),
}
MESH = lambda: jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
EXACT = dict(rtol=1e-12, atol=1e-12)


def outputs(est, params, h0, xs, ys, place=lambda carry: carry):
    """The gradients of all steps, and the last carry; noise of one key a step."""

    @jax.jit
    def whole(params, h0, xs, ys):
        def body(carry, data):
            x, y, key = data
            carry, out = est.step(params, carry, x, y, est.noise(key, carry))
            return place(carry), out.grads

        keys = jax.random.split(jax.random.key(3), len(xs))
        return jax.lax.scan(body, place(est.init(params, h0)), (xs, ys, keys))

    return jax.device_get(whole(params, h0, xs, ys))


def put(x, *spec):
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(MESH(), P(*spec))), x)


@pytest.mark.parametrize("name", rows(ESTIMATORS.keys(), ["uoro"]))
def test_sequences_over_devices(name):
    """``per_sequence``, eight of them, on a device each; parameters on all."""
    system = vanilla(n=3, steps=4)
    est = online.combine.per_sequence(ESTIMATORS[name](system.f, system.loss))
    scale = jnp.linspace(0.5, 2, 8)[:, None]
    h0, xs = scale * system.h0[None], scale[None] * system.xs[:, None]
    ys = jnp.broadcast_to(system.ys[:, None], (4, 8, *system.ys.shape[1:]))
    want = outputs(est, system.params, h0, xs, ys)
    args = put(system.params), put(h0, "d"), put(xs, None, "d"), put(ys, None, "d")
    chex.assert_trees_all_close(outputs(est, *args), want, **EXACT)


@pytest.mark.full
@pytest.mark.parametrize("name", ["uoro", "nobacktrack"])
def test_copies_over_devices(name):
    """``average`` of eight copies, the influence of each on a device of its own."""
    system = vanilla(n=3, steps=4)
    est = online.combine.average(ESTIMATORS[name](system.f, system.loss), 8)
    args = system.params, system.h0, system.xs, system.ys
    want = outputs(est, *args)

    def place(carry):
        each = NamedSharding(MESH(), P("d"))
        influence = jax.lax.with_sharding_constraint(carry.influence, each)
        return carry._replace(influence=influence)

    got = outputs(est, *map(put, args), place=place)
    chex.assert_trees_all_close(got, want, **EXACT)


@pytest.mark.full
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["uoro", "rtrl", "snap1"])
def test_a_sequence_on_each_device_of_a_shard_map(name, check_vma):
    """Parameters that all share: each device's own estimates, and their mean."""
    system = vanilla(n=3, steps=4)
    est = ESTIMATORS[name](system.f, system.loss)
    scale = jnp.linspace(0.5, 2, 8)
    one = lambda c: outputs_inside(est, system, c)
    want = jax.tree.map(lambda g: g.mean(0), jax.vmap(one)(scale))
    mapped = jax.shard_map(
        lambda c: jax.lax.pmean(one(c[0]), "d"),
        mesh=MESH(),
        in_specs=P("d"),
        out_specs=P(),
        check_vma=check_vma,
    )
    chex.assert_trees_all_close(jax.jit(mapped)(scale), want, **EXACT)


def outputs_inside(est, system, c):
    """The gradients of all steps, of data times ``c``."""
    carry, grads = est.init(system.params, c * system.h0), []
    for x, y, k in zip(system.xs, system.ys, range(4), strict=True):
        noise = est.noise(jax.random.key(k), carry)
        carry, out = est.step(system.params, carry, c * x, y, noise)
        grads.append(out.grads)
    return grads
