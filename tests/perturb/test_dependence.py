"""What is proved of a cell: that examples stay apart, that parameters act by nodes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import perturb
from rbpjax.perturb import NodePerturbation
from rbpjax.perturb.dependence import beside_nodes, rows_stay_apart
from tests.support.perturb import dense, distance, estimate, gradient, plain

W = jnp.array([[1.0, 0.5, 0.0], [0.2, 1.0, 0.1], [0.0, 0.3, 1.0]])
NOISE = jnp.zeros((3, 3))

APART = {
    "elementwise": lambda n, h: (jnp.sum(jnp.tanh(n + h) ** 2, -1), jnp.sin(n)),
    "product": lambda n, h: (jnp.mean((n + h) @ W.T, 1), jax.nn.relu(h @ W)),
    "einsum": lambda n, h: (jnp.einsum("bi,ij->bj", n, W).max(1), h),
    "vmap": lambda n, h: jax.vmap(lambda n, h: (jnp.sum(W @ n), jnp.tanh(W @ h)))(n, h),
    "softmax": lambda n, h: (jax.nn.logsumexp(n, 1) - n[:, 0], jax.nn.softmax(h)),
    "concatenate": lambda n, h: (jnp.sum(jnp.concatenate([n, h], 1), 1), h),
    "transposed": lambda n, h: (jnp.sum(n.T, 0), (n.T + h.T).T),
    "reshaped": lambda n, h: (n.reshape(3, 1, 3).sum((1, 2)), h),
    "scan": lambda n, h: (
        jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), n, jnp.stack([W, W]))[0][
            :, 0
        ],
        h,
    ),
    "checkpoint": lambda n, h: (jax.checkpoint(lambda n: jnp.sum(n @ W, 1))(n), h),
    "without noise": lambda n, h: (jnp.ones(3), h),
}
MIXED = {
    "outputs": lambda n, h: (W @ (n[0] + h[0]), h),
    "mean over the batch": lambda n, h: (
        jnp.sum(n - jnp.mean(n, 0, keepdims=True), 1),
        h,
    ),
    "sum": lambda n, h: (jnp.sum(n) * jnp.ones(3), h),
    "the state": lambda n, h: (jnp.sum(h, 1), n[::-1]),
    "two steps": lambda n, h: (jnp.sum(h, 1), n + jnp.sum(h)),
    "transposed": lambda n, h: (jnp.sum(n.T, 1), h),
    "rows of both": lambda n, h: (jnp.sum(n @ n.T, 1), h),
    "cumulated": lambda n, h: (jnp.cumsum(n, 0)[:, 0], h),
    "gathered": lambda n, h: (n[jnp.array([1, 2, 0]), 0], h),
}


@pytest.mark.parametrize("name", APART)
def test_rows_that_stay_apart(name):
    """Proved from the program; the Jacobian is that of a diagonal."""
    step = APART[name]
    assert rows_stay_apart(step, NOISE, jnp.ones((3, 3)))
    point = jnp.arange(9.0).reshape(3, 3) / 9
    jac = jax.jacrev(lambda n: step(n, point)[0])(point)
    assert np.all(np.abs(jac)[~np.eye(3, dtype=bool)] == 0)


@pytest.mark.parametrize("name", MIXED)
def test_rows_that_do_not(name):
    """No proof of what is not so."""
    assert not rows_stay_apart(MIXED[name], NOISE, jnp.ones((3, 3)))


def squares(o, y):
    return (o - y) ** 2


def test_one_loss_an_output_is_not_one_an_example():
    """As many units as outputs: refused; their mean is right."""

    def cell(w, x, h, n):
        a = w @ h + x + n
        return jnp.tanh(a), jnp.tanh(a), a

    key = iter(jax.random.split(jax.random.key(0), 9))
    normal = lambda *shape: jax.random.normal(next(key), shape)
    net = dense()._replace(
        cell=cell,
        loss=squares,
        params=normal(3, 3),
        inputs=normal(4, 3),
        h0=jnp.ones(3),
        targets=normal(4, 3),
    )
    rule = NodePerturbation(
        num_samples=12,
        difference=perturb.difference.Exact(),
        noise=perturb.noise.orthonormal,
    )
    with pytest.raises(ValueError, match=r"`loss` returns 3 losses.*examples=3"):
        estimate(net, rule)
    mean = net._replace(loss=lambda o, y: jnp.mean(squares(o, y)))
    assert distance(estimate(mean, rule), gradient(mean)) < 1e-12


def test_a_promise_stands_in_for_the_proof():
    """examples=: what the program does not show is believed, but must be possible."""
    net = dense(examples=3)
    order = jnp.array([0, 1, 2])
    hidden = net._replace(loss=lambda o, y: jnp.sum((o - y) ** 2, -1)[order])
    rule = NodePerturbation(
        num_samples=27,
        difference=perturb.difference.Exact(),
        noise=perturb.noise.orthonormal,
    )
    make = lambda **k: perturb.recurrent_value_and_grad(
        net.cell, hidden.loss, rule, **k
    )
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="examples=3"):
        make()(key, *net.data)
    grads = make(examples=3)(key, *net.data)[1]
    shown = net._replace(loss=lambda o, y: jnp.sum((o - y) ** 2, -1))
    assert distance(grads, estimate(shown, rule, key)) < 1e-12
    with pytest.raises(ValueError, match=r"`examples` = 2 asks.*returns 3"):
        make(examples=2)(key, *net.data)
    with pytest.raises(ValueError, match="`examples` must be None or"):
        make(examples=True)


def test_parameters_beside_the_nodes_are_refused():
    """A factor on the state: its gradient from nodes alone would be wrong."""

    def cell(p, x, h, n):
        h, out, nodes = plain(p, x, h, n)
        return p["gain"] * h, out, nodes

    net = dense()
    net = net._replace(cell=cell, params=net.params | {"gain": jnp.array(0.5)})
    with pytest.raises(ValueError, match=re.escape("`params` at ['gain'] act")):
        estimate(net, NodePerturbation())
    estimate(net, perturb.WeightPerturbation())  # which has no nodes


def test_parameters_that_act_by_nodes_are_found_to():
    """Through jit, a bias after the noise, and a gradient that is stopped."""
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}

    def cell(p, x, h, n):
        a = jax.nn.relu(p["w"]) @ h + x + n
        a = a + jax.lax.stop_gradient(jnp.tanh(p["b"])) + p["b"]
        return jax.nn.relu(a), a, a

    assert not beside_nodes(jax.jit(cell), params, *3 * (jnp.ones(2),))
    wrong = lambda p, x, h, n: (cell(p, x, h, n)[0], p["b"], cell(p, x, h, n)[2])
    assert beside_nodes(jax.jit(wrong), params, *3 * (jnp.ones(2),)) == ["['b']"]
