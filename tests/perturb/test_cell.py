"""Cells: gradients from node errors within a step, and cells that are none."""

import chex
import jax
import jax.numpy as jnp
import pytest

from rbpjax import perturb
from rbpjax.perturb.cell import local_pullback
from tests.support.perturb import (
    RULES,
    TIGHT,
    dense,
    distance,
    estimate,
    gated,
    gradient,
    node_gradient,
    plain,
    silent,
)


def test_assembly_from_tap_gradients():
    """True node errors give the true gradient: outer products and local derivatives."""
    net = dense(units=3, outputs=2, inputs=2, examples=4)
    run = perturb.unroll(net.cell, *net.data[:3])
    before = jnp.concatenate([net.h0[None], run.states[:-1]])
    errors = node_gradient(net)
    outer = net.cell.pullback(net.params, net.inputs, before, run.states, errors)
    local = jax.jit(local_pullback, static_argnums=0)(
        net.cell, net.params, net.inputs, before, silent(net), errors
    )
    assert distance(outer, gradient(net)) < TIGHT
    assert distance(local, gradient(net)) < TIGHT


def test_assembly_keeps_nodes_of_a_step_apart():
    """With nodes that hang on nodes, no path within a step is counted twice."""
    net = gated()
    run = perturb.unroll(net.cell, *net.data[:3])
    before = jnp.concatenate([net.h0[None], run.states[:-1]])
    errors = node_gradient(net)
    local = jax.jit(local_pullback, static_argnums=0)(
        net.cell, net.params, net.inputs, before, silent(net), errors
    )
    assert distance(local, gradient(net)) < TIGHT
    one = jax.vmap(lambda p, n, x, h: net.cell(p, x, h, n)[2], (None, 0, 0, 0))
    _, twice = jax.vjp(lambda p: one(p, silent(net), net.inputs, before), net.params)
    assert distance(twice(errors)[0], gradient(net)) > 0.1  # what it would be


def test_local_derivatives_do_not_run_the_network_backwards():
    """For a dense cell the local derivative is all steps at once."""
    net = dense()._replace(cell=plain)
    f = lambda e, xs, before: local_pullback(
        plain, net.params, xs, before, silent(net), e
    )
    args = silent(net), net.inputs, jnp.zeros((3, 2))
    text = jax.jit(f).lower(*args).compile().as_text()
    assert "while" not in text  # all steps at once


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (lambda p, x, h, n: (h, h), "must return"),
        (lambda p, x, h, n: (h + n["a"], h, {"b": h + n["a"]}), "another structure"),
        (lambda p, x, h, n: (h + n, h, h), "without the noise added"),
        (lambda p, x, h, n: (h[:1], h, h + n), "`cell`'s state must have.*of `h0`"),
        (lambda p, x, h, n: (h, h, ()), "no nodes"),
        (
            lambda p, x, h, n: (h, h, jax.tree.map(jnp.add, {"a": h}, n)),
            "leaf by leaf",
        ),
    ],
)
def test_cells_that_are_none(cell, message):
    """What a cell gets wrong is said when it is first called."""
    net = dense()._replace(cell=cell)
    for rule in RULES[:3]:
        with pytest.raises(ValueError, match=message):
            estimate(net, rule)
    with pytest.raises(ValueError, match=message):
        perturb.unroll(cell, *net.data[:3])


def test_unroll_runs_function_cells():
    """Zero noise of the right structure is found for cells that ask by any name."""
    net = dense()._replace(cell=plain)
    run = perturb.unroll(plain, *net.data[:3])
    want = perturb.unroll(perturb.DenseCell(), *net.data[:3])
    chex.assert_trees_all_close(run.nodes["hidden"], want.nodes.recurrent)
    chex.assert_trees_all_close(run.outputs, want.outputs)
