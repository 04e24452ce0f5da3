"""The unitary cell on eight devices: batches and channels in parts.

Not the lattice: XLA ends the process where an FFT's own axis is divided (jaxlib 0.10).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rbpjax.unitary import UnitaryCell
from tests.support.problems import assert_close

SPECS = {"batch": P("d"), "channels": P(None, None, "d")}


@pytest.mark.full
@pytest.mark.parametrize("name", SPECS)
def test_a_sharded_state_runs_as_on_one_device(name):
    """Value and gradient after 20 steps: a batch of 8, 32 sites, 8 channels."""
    cell = UnitaryCell(lattice=(32,), channels=8)
    weights = cell.init(jax.random.key(0), radius=2, inputs=3)
    weights = jax.tree.map(lambda w: w.astype(jnp.float64), weights)
    h = jax.random.normal(jax.random.key(1), (8, *cell.start().shape))
    h = jax.lax.complex(h, 0.5 * h[::-1])
    spec = SPECS[name]

    def loss(weights, h):
        params = cell.prepare(weights)
        step = lambda _, h: jax.vmap(lambda h: cell(params, None, h))(h)
        last = jax.lax.fori_loop(0, 20, step, h)
        return jnp.sum(
            jnp.sin(last.real + 2 * last.imag)
            * jnp.linspace(0, 1, h.size).reshape(h.shape)
        )

    grad = jax.jit(jax.value_and_grad(loss))
    want = grad(weights, h)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    got = jax.device_get(
        grad(jax.tree.map(lambda w: put(w, P()), weights), put(h, spec))
    )
    np.testing.assert_allclose(got[0], want[0], rtol=1e-11)
    leaves = lambda tree: [x for x in jax.tree.leaves(tree) if np.any(np.asarray(x))]
    assert_close(leaves(got[1]), leaves(want[1]), 1e-11)
