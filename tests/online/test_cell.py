"""The cell that exposes its pre-activations, against dense Jacobians."""

import chex
import jax
import numpy as np
import pytest

from rbpjax import online
from rbpjax.online.cell import unit_jacobians
from tests.support.online import lstm

TIGHT = dict(rtol=1e-12, atol=1e-12)


def test_row_norms_of_a_cell_are_those_of_its_jacobian():
    """‖Fᵢ‖ in closed form against the rows of ∂f/∂θ (a rearranging kernel)."""
    system = lstm()
    x = system.xs[0]
    norms = jax.jit(system.f.row_norms)(system.params, x, system.h0)
    rows = jax.jit(jax.jacrev(system.f))(system.params, x, system.h0)
    for leaf, parts in rows.items():
        square = sum(np.sum(p.reshape(2, -1) ** 2, 1) for p in parts.values())
        chex.assert_trees_all_close(norms[leaf], np.sqrt(square), **TIGHT)


def test_unit_jacobians_are_blocks_of_the_whole():
    """∂h'/∂z and ∂h'/∂h within units, new state first, against dense Jacobians."""
    system = lstm(n=2)
    x, h = system.xs[0], system.h0
    whole = jax.vmap(system.f.activate, (1, 0))

    @jax.jit
    def blocks_and_whole(params):
        inside = unit_jacobians(system.f, params, x, h)
        z = system.f.kernel(params) @ inside.features
        return inside, jax.jacrev(whole)(z, h), jax.jacrev(whole, 1)(z, h)

    inside, by_z, by_h = blocks_and_whole(system.params)
    for s, new in enumerate(("c", "h")):
        for i in range(2):
            chex.assert_trees_all_close(inside.gates[s, i], by_z[new][i, :, i])
            for t, old in enumerate(("c", "h")):
                chex.assert_trees_all_close(inside.local[s, t, i], by_h[new][old][i, i])


@pytest.mark.parametrize("make", [online.kf_rtrl, online.snap1, online.rflo])
def test_plain_functions_are_refused(make):
    """Without pre-activations there is an error with the remedy."""
    with pytest.raises(ValueError, match=r"PreactivationCell.*uoro or nobacktrack"):
        make(lambda p, x, h: h, lambda p, h, y: 0.0)


def test_kernel_of_a_wrong_shape_is_refused():
    """A forgotten gate axis is named."""
    cell = online.PreactivationCell(
        kernel=lambda p: p, features=lambda x, h: h, activate=lambda z, h: z[0]
    )
    with pytest.raises(ValueError, match=r"kernel\[None\]"):
        cell(np.ones((2, 2)), None, np.ones(2))


def test_parts_of_a_cell_are_named_functions():
    """No value without a name, and nothing that cannot be called."""
    with pytest.raises(TypeError, match=r"by name.*kernel=…, features=…, activate=…"):
        online.PreactivationCell(lambda p: p, lambda x, h: h, lambda z, h: z[0])
    with pytest.raises(ValueError, match="`kernel` must be a callable"):
        online.PreactivationCell(
            kernel=np.ones((1, 2, 2)), features=lambda x, h: h, activate=lambda z, h: z
        )
