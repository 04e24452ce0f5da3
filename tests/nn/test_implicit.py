"""The implicit layer: gradients of the functional transform, trained and restored."""

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import rbpjax
from rbpjax.nn import FixedPoint
from tests.support.problems import FORWARD, IDENTITY_RTOL, assert_close

N = 5
X = jax.random.normal(jax.random.key(1), (3, N))
H0 = jnp.zeros((3, N))
RULE = rbpjax.CGNormal(tol=1e-12)


class Cell(nnx.Module):
    def __init__(self, rngs):
        init = nnx.initializers.normal(0.2)
        self.linear = nnx.Linear(
            N, N, kernel_init=init, param_dtype=jnp.float64, rngs=rngs
        )

    def __call__(self, x, h):
        return jnp.tanh(self.linear(h) + x)


def layer_of(seed=0, **strategies):
    return FixedPoint(Cell(nnx.Rngs(seed)), **strategies)


def test_gradients_are_those_of_the_functional_transform():
    """For the parameters, against rbp_solve on the bare arrays."""
    layer = layer_of(forward=FORWARD, backward=RULE)
    loss = lambda layer: jnp.sum(jnp.sin(layer(X, H0).value) * jnp.arange(5.0)[None])
    got = nnx.jit(nnx.grad(loss))(layer)["cell"]["linear"]
    linear = layer.cell.linear
    f = lambda p, x, h: jnp.tanh(h @ p["kernel"] + p["bias"][None] + x)
    solve = rbpjax.rbp_solve(f, forward=FORWARD, backward=RULE)
    params = {"kernel": linear.kernel[...], "bias": linear.bias[...]}
    value = lambda p: jnp.sum(jnp.sin(solve(p, X, H0).value) * jnp.arange(5.0)[None])
    want = jax.jit(jax.grad(value))(params)
    got = {"kernel": got["kernel"][...], "bias": got["bias"][...]}
    assert_close(got, want, IDENTITY_RTOL)


def test_the_report_comes_out_of_a_training_step():
    """value_and_grad over the split module: one step lowers the loss, and reports."""
    layer = layer_of()
    graph, params = nnx.split(layer, nnx.Param)

    @jax.jit
    def step(params):
        def loss(params, probe):
            layer = nnx.merge(graph, params)
            return jnp.mean((layer(X, H0, probe).value - 0.5) ** 2)

        value, grads, report = rbpjax.value_and_grad_with_report(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), report

    first, params, report = step(params)
    second, _, _ = step(params)
    assert second < first
    assert report.converged == 1 and report.num_steps > 0 and report.residual < 1e-11


def test_it_trains_and_is_restored_like_any_layer(tmp_path):
    """Five Adam steps by nnx.Optimizer; the layer out of orbax gives the same state."""
    layer = layer_of()
    optimizer = nnx.Optimizer(layer, optax.adam(0.05), wrt=nnx.Param)
    loss = lambda layer: jnp.mean((layer(X, H0).value - 0.5) ** 2)

    @nnx.jit
    def step(layer, optimizer):
        value, grads = nnx.value_and_grad(loss)(layer)
        optimizer.update(layer, grads)
        return value

    with jax.numpy_dtype_promotion("standard"):  # optax's Adam is not strict
        losses = [float(step(layer, optimizer)) for _ in range(5)]
    assert losses[-1] < 0.9 * losses[0]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", nnx.split(layer)[1])
        checkpointer.wait_until_finished()
        graph, blank = nnx.split(layer_of(seed=9))
        state = checkpointer.restore(tmp_path / "layer", blank)
    again = nnx.merge(graph, state)
    chex.assert_trees_all_equal(again(X, H0).value, layer(X, H0).value)


class Dropped(Cell):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, h):
        return self.dropout(super().__call__(x, h))


def test_a_cell_that_changes_its_state_is_refused():
    """Dropout inside the loop would draw one mask for ever: an error that says so."""
    layer = FixedPoint(Dropped(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"`cell` \(Dropped\) changes its own state"):
        layer(X, H0)
    with pytest.raises(ValueError, match="`cell` must be a module called as"):
        FixedPoint("tanh")


def test_a_tolerance_that_is_an_array_is_data_of_the_layer():
    """It may change between calls of one program, and takes no gradient."""

    @nnx.jit
    def steps(layer):
        return layer(X, H0).num_steps

    layer = layer_of(forward=rbpjax.FixedPointIteration(tol=jnp.array(1e-2)))
    few = steps(layer)
    layer.forward = nnx.data(rbpjax.FixedPointIteration(tol=jnp.array(1e-9)))
    assert steps(layer) > few
    grads = nnx.grad(lambda layer: jnp.sum(layer(X, H0).value))(layer)
    assert set(nnx.to_pure_dict(grads)) == {"cell"}
