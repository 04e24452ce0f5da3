"""``value_and_grad_with_report``: the arguments of JAX, and modules of all kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import sparse

import rbpjax
from rbpjax import value_and_grad_with_report
from rbpjax.nn import value_and_grad_with_report as nnx_value_and_grad

X = jnp.array([[0.4, -0.2, 0.1], [0.3, 0.9, -1.0]])
W = jnp.array([[0.3, -0.8, 0.0], [0.8, 0.3, 0.1], [0.0, 0.2, -0.5]]) * 0.7
SOLVE = rbpjax.rbp_solve(
    lambda w, x, h: jnp.tanh(h @ w + x),
    forward=rbpjax.FixedPointIteration(tol=1e-13),
    backward=rbpjax.Adaptive(tol=1e-12),
)


def loss(scale, w, x, probe=None):
    return scale * jnp.sum(SOLVE(w, x, jnp.zeros_like(X), probe).value ** 2)


@pytest.mark.parametrize("argnums", [0, 2, -1, -3, (1,), (0, -1), [2, 1], np.int64(1)])
def test_argnums_are_those_of_jax(argnums):
    """Positive, negative, several, NumPy's: what jax.value_and_grad gives."""
    args = (2.0, W, X)
    value, grads, report = jax.jit(value_and_grad_with_report(loss, argnums))(*args)
    want = jax.jit(jax.value_and_grad(loss, argnums))(*args)
    assert jax.tree.structure((value, grads)) == jax.tree.structure(want)
    for a, b in zip(
        jax.tree.leaves((value, grads)), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert report.converged == 1


@pytest.mark.parametrize("make", [value_and_grad_with_report, nnx_value_and_grad])
@pytest.mark.parametrize("argnums", [3, -4, (0, 3)])
def test_argnums_out_of_range_raise(make, argnums):
    """They do not wrap around; JAX's words for those beyond the last."""
    with pytest.raises(TypeError, match=r"argnums=(3|-4) requires at least 4 .*only 3"):
        make(loss, argnums)(2.0, W, X)
    if argnums == 3:
        with pytest.raises(TypeError, match="argnums=3 requires at least 4"):
            jax.value_and_grad(loss, argnums)(2.0, W, X)


def test_integers_alone_need_allow_int():
    """As in JAX; with it their gradient is float0."""
    counted = lambda n, w, probe: loss(1.0, w * n, X, probe)
    with pytest.raises(TypeError, match="allow_int"):
        value_and_grad_with_report(counted)(1, W)
    allowed = value_and_grad_with_report(counted, (0, 1), allow_int=True)
    _, (n_bar, w_bar), _ = allowed(1, W)
    assert n_bar.dtype == jax.dtypes.float0
    np.testing.assert_allclose(w_bar, jax.grad(loss, 1)(1.0, W, X), rtol=1e-10)


def test_leaves_without_a_gradient_are_set_aside():
    """Functions, strings, integers and keys beside arrays, with aux."""
    params = {
        "w": W,
        "post": lambda u: u,
        "name": "layer",
        "order": jnp.array([2, 0, 1]),
        "key": jax.random.key(0),
    }

    def of(params, probe):
        w = params["post"](params["w"][params["order"]])
        assert params["name"] == "layer"
        return loss(1.0, w, X, probe), jax.random.normal(params["key"])

    (_, draw), grad, report = value_and_grad_with_report(of, has_aux=True)(params)
    want = jax.grad(lambda w: loss(1.0, w[params["order"]], X))(W)
    np.testing.assert_allclose(grad["w"], want, rtol=1e-10)
    assert grad["post"] is None and grad["name"] is None and draw != 0
    assert grad["order"].dtype == grad["key"].dtype == jax.dtypes.float0
    assert report.converged == 1


def test_sparse_parameters():
    """A BCOO matrix among the params, eagerly and under jit: the dense gradient's."""
    w = sparse.BCOO.fromdense(W)
    dense = jax.grad(loss, 1)(1.0, W, X)
    for transform in (lambda f: f, jax.jit):
        run = transform(value_and_grad_with_report(loss, 1))
        _, bar, report = run(1.0, w, X)
        np.testing.assert_allclose(bar.data, dense[tuple(w.indices.T)], rtol=1e-10)
        assert report.converged == 1


class Network(nnx.Module):
    """Dropout and batch normalization before a solve, as a user would have them."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(
            3, 3, use_bias=False, param_dtype=jnp.float64, rngs=rngs
        )
        self.linear.kernel.set_value(W)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x, probe=None):
        x = self.norm(self.dropout(x.astype(jnp.float32)))  # as statistics are
        x = x.astype(jnp.float64)
        return SOLVE(self.linear.kernel[...], x, jnp.zeros_like(x), probe).value


def network_loss(network, probe=None):
    return jnp.sum(network(X, probe) ** 2)


@pytest.mark.parametrize("jit", [False, True])
def test_nnx_modules_that_change_themselves(jit):
    """As nnx.value_and_grad: gradients of the parameters, and the state moves on."""
    theirs, ours = Network(), Network()
    wrap = nnx.jit if jit else lambda f: f
    value, want = wrap(nnx.value_and_grad(network_loss))(theirs)
    got_value, got, report = wrap(nnx_value_and_grad(network_loss))(ours)
    np.testing.assert_allclose(got_value, value, rtol=1e-12)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    assert report.converged == 1
    assert ours.dropout.rngs.count[...] == 1
    np.testing.assert_allclose(ours.norm.mean[...], theirs.norm.mean[...])
    assert jnp.abs(ours.norm.mean[...]).max() > 0
    optimizer = nnx.Optimizer(ours, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(ours, got)
    moved = ours.linear.kernel[...] - theirs.linear.kernel[...]
    np.testing.assert_allclose(moved, -0.1 * want["linear"]["kernel"][...], atol=1e-12)


def test_nnx_filters():
    """DiffState selects, also from the end, beside an argument that is an array."""
    scaled = lambda scale, network, probe: scale * network_loss(network, probe)
    statistics = nnx.DiffState(-1, nnx.BatchStat)
    _, (scale_bar, state_bar), _ = nnx_value_and_grad(scaled, (0, statistics))(
        2.0, Network()
    )
    np.testing.assert_allclose(scale_bar, network_loss(Network()), rtol=1e-10)
    assert set(state_bar) == {"norm"} and set(state_bar["norm"]) == {"mean", "var"}


def test_an_nnx_module_as_a_pytree():
    """The function of rbpjax takes it as it is, and leaves it as it was."""
    network = Network()
    _, grad, report = value_and_grad_with_report(network_loss)(network)
    _, want = nnx.value_and_grad(network_loss)(Network())
    np.testing.assert_allclose(
        grad.linear.kernel[...], want["linear"]["kernel"][...], rtol=1e-10
    )
    assert report.converged == 1 and network.dropout.rngs.count[...] == 0


def test_a_report_can_be_exported():
    """Report and solution come out of a saved function as they went in."""
    pytest.importorskip("flatbuffers")

    def both(w, probe):
        solution = SOLVE(w, X, jnp.zeros_like(X), probe)
        return jnp.sum(solution.value), solution

    function = jax.jit(value_and_grad_with_report(both, has_aux=True))
    saved = jax.export.export(function)(W).serialize()
    got, want = jax.export.deserialize(saved).call(W), function(W)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
