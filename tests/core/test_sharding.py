"""What a state that is split over devices has in common, one function at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rbpjax._core import sharding, tree


def in_parts(f, x):
    """``f`` of each half of ``x``, coupled: a row of results for each."""
    mesh = jax.make_mesh((2,), ("m",), axis_types=(AxisType.Auto,))

    def part(x):
        with sharding.coupled(("m",)):
            return jax.tree.map(lambda u: u[None], f(x))

    mapped = jax.shard_map(part, mesh=mesh, in_specs=P("m"), out_specs=P("m"))
    return jax.jit(mapped)(x)


@pytest.mark.parametrize("where", [0, 3, None])
def test_one_bad_part_is_seen_by_all(where):
    """A NaN in one half: neither half is finite; alone, each judges itself."""
    x = jnp.arange(4.0)
    x = x if where is None else x.at[where].set(jnp.nan)
    found = in_parts(tree.all_finite, x)
    assert found.tolist() == [where is None] * 2


def test_parts_draw_other_numbers():
    """A direction is of the whole state: of norm one there, no half like the other."""
    draw = lambda x: tree.random_unit(jax.random.key(0), x)
    first, second = np.split(np.ravel(in_parts(draw, jnp.ones(6))), 2)
    assert not np.any(first == second)
    np.testing.assert_allclose(np.sum(first**2) + np.sum(second**2), 1, rtol=1e-14)


def test_sums_and_maxima_are_of_the_whole():
    """Each half has the sum and the largest entry of all."""
    x = jnp.array([1.0, 2.0, 3.0, -5.0])
    both = lambda x: (sharding.total(jnp.sum(x)), sharding.largest(jnp.max(x)))
    total, largest = in_parts(both, x)
    assert total.tolist() == [1.0, 1.0]
    assert largest.tolist() == [3.0, 3.0]
