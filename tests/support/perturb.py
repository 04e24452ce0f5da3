"""Small networks with plain-loop oracles, and noise given as data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rbpjax import perturb


class Network(NamedTuple):
    cell: Callable
    loss: Callable
    params: Any
    h0: Any
    xs: Any
    ys: Any

    @property
    def data(self):
        return self.params, self.h0, self.xs, self.ys


def squared(out, y):
    """One loss an example, or a scalar for a single example."""
    return (out - y) ** 2 @ jnp.array([1.0, 2.0])[: out.shape[-1]]


def dense(units=2, outputs=1, inputs=1, steps=3, examples=None, seed=0, cell=None):
    """A tanh network: R is not symmetric, gradients of order one."""
    cell = cell or perturb.DenseCell()
    keys = jax.random.split(jax.random.key(seed), 5)
    params = cell.init(keys[0], inputs, units, outputs)
    params["recurrent"] = params["recurrent"] + 0.5 * jnp.eye(units)[::-1]
    rows = () if examples is None else (examples,)
    # Means that are not zero: noise shared over a batch must show (see the trap test).
    xs = 0.5 + jax.random.normal(keys[1], (steps, *rows, inputs))
    ys = jax.random.normal(keys[2], (steps, *rows, outputs))
    h0 = 0.3 * jax.random.normal(keys[3], (*rows, units))
    return Network(cell, squared, params, h0, xs, ys)


def plain(params, x, h, noise):
    """``DenseCell`` as a function, its nodes a dictionary of its own."""
    a = params["input"] @ x + params["recurrent"] @ h + noise["hidden"]
    h = jnp.tanh(a)
    b = params["readout"] @ h + noise["out"]
    return h, b, {"hidden": a, "out": b}


def gated(units=3, steps=4, seed=1):
    """A GRU, four leaves of nodes: candidate hangs on reset, readout on all."""
    draw = jax.random.normal
    keys = jax.random.split(jax.random.key(seed), 8)
    weights = {"reset": 1, "update": 2, "candidate": 3}
    params = {n: 0.5 * draw(keys[i], (units, units + 2)) for n, i in weights.items()}
    params["readout"] = draw(keys[4], (2, units))

    def cell(params, x, h, noise):
        z = jnp.concatenate([h, x])
        reset = params["reset"] @ z + noise.recurrent["reset"]
        update = params["update"] @ z + noise.recurrent["update"]
        z = jnp.concatenate([jax.nn.sigmoid(reset) * h, x])
        candidate = params["candidate"] @ z + noise.recurrent["candidate"]
        gate = jax.nn.sigmoid(update)
        h = gate * h + (1 - gate) * jnp.tanh(candidate)
        out = params["readout"] @ h + noise.readout
        nodes = {"reset": reset, "update": update, "candidate": candidate}
        return h, out, perturb.Nodes(nodes, out)

    xs, ys = draw(keys[5], (steps, 2)), draw(keys[6], (steps, 2))
    return Network(cell, squared, params, 0.5 * draw(keys[7], (units,)), xs, ys)


def silent(net):
    """Zero noise like the nodes of all steps."""
    shape = jax.eval_shape(lambda: perturb.unroll(net.cell, *net.data[:3]).nodes)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)


def losses(net, params, noise, truncated=False):
    """Mean losses of all steps, in a plain loop."""
    h, made = net.h0, []
    for t in range(len(net.ys)):
        h = jax.lax.stop_gradient(h) if truncated else h
        n = jax.tree.map(lambda a, t=t: a[t], noise)
        h, out, _ = net.cell(params, net.xs[t], h, n)
        made.append(jnp.mean(net.loss(out, net.ys[t])))
    return jnp.stack(made)


def gradient(net, truncated=False):
    """The gradient through time, or truncated to one step."""
    total = lambda p: jnp.sum(losses(net, p, silent(net), truncated))
    return jax.grad(total)(net.params)


def node_gradient(net, truncated=False):
    """dL/da of all nodes: through time, or of each node's own step alone."""
    total = lambda n: jnp.sum(losses(net, net.params, n, truncated))
    return jax.grad(total)(silent(net))


def table(rows):
    """Noise given as data: sample i is row i."""

    def noise(key, indices, size, dtype):
        assert rows.shape[1] == size
        return rows[indices].astype(dtype)

    return noise


def signs(size):
    """All 2^size sign vectors."""
    bits = jnp.arange(2**size)[:, None] >> jnp.arange(size)[None]
    return (1 - 2 * (bits & 1)).astype(float)


def estimate(net, rule, key=None):
    """Gradient of one call."""
    key = jax.random.key(0) if key is None else key
    f = perturb.recurrent_value_and_grad(net.cell, net.loss, rule)
    return jax.jit(f)(key, *net.data)[1]


def estimates(net, rule, count, seed=0):
    """Independent gradients of ``count`` keys, leaves ``[count, …]``."""
    f = perturb.recurrent_value_and_grad(net.cell, net.loss, rule)
    keys = jax.random.split(jax.random.key(seed), count)
    return jax.jit(jax.vmap(lambda k: f(k, *net.data)[1]))(keys)


def flat(tree):
    """A tree as a vector."""
    return jax.flatten_util.ravel_pytree(tree)[0]


def rows_of(tree):
    """Leaves ``[count, …]`` as a matrix ``[count, d]``."""
    leaves = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(leaves, axis=1)


def distance(a, b):
    """‖a - b‖ / ‖b‖."""
    return float(jnp.linalg.norm(flat(a) - flat(b)) / jnp.linalg.norm(flat(b)))
