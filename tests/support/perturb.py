"""Small networks with plain-loop oracles, and noise given as data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rbpjax import perturb
from rbpjax.perturb import ActivityPerturbation, NodePerturbation, WeightPerturbation
from rbpjax.perturb.difference import Exact, OneSided

COUNT = 40_000
TIGHT = 1e-12  # sums of up to 512 float64 numbers of order one


class Network(NamedTuple):
    cell: Callable
    loss: Callable
    params: Any
    inputs: Any
    h0: Any
    targets: Any

    @property
    def data(self):
        """What a step function takes, and the targets."""
        return self.params, self.inputs, self.h0, self.targets


def squared(out, y):
    """One loss an example, or a scalar for a single example."""
    return (out - y) ** 2 @ jnp.array([1.0, 2.0])[: out.shape[-1]]


def dense(units=2, outputs=1, inputs=1, steps=3, examples=None, seed=0, cell=None):
    """A tanh network: R is not symmetric, gradients of order one."""
    cell = cell or perturb.DenseCell()
    keys = jax.random.split(jax.random.key(seed), 5)
    params = cell.init(keys[0], inputs=inputs, units=units, outputs=outputs)
    params["recurrent"] = params["recurrent"] + 0.5 * jnp.eye(units)[::-1]
    rows = () if examples is None else (examples,)
    # Means that are not zero: noise shared over a batch must show (see the trap test).
    xs = 0.5 + jax.random.normal(keys[1], (steps, *rows, inputs))
    ys = jax.random.normal(keys[2], (steps, *rows, outputs))
    h0 = 0.3 * jax.random.normal(keys[3], (*rows, units))
    return Network(cell, squared, params, xs, h0, ys)


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
    return Network(cell, squared, params, xs, 0.5 * draw(keys[7], (units,)), ys)


def silent(net):
    """Zero noise like the nodes of all steps."""
    shape = jax.eval_shape(lambda: perturb.unroll(net.cell, *net.data[:3]).nodes)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)


def losses(net, params, noise, truncated=False):
    """Mean losses of all steps, in a plain loop."""
    h, made = net.h0, []
    for t in range(len(net.targets)):
        h = jax.lax.stop_gradient(h) if truncated else h
        n = jax.tree.map(lambda a, t=t: a[t], noise)
        h, out, _ = net.cell(params, net.inputs[t], h, n)
        made.append(jnp.mean(net.loss(out, net.targets[t])))
    return jnp.stack(made)


def compiled(f):
    """``f(static, *arrays)``, compiled once for equal ``static`` and alike arrays."""
    fast = jax.jit(f, static_argnums=0)

    def call(static, *arrays):
        try:
            hash(static)
        except TypeError:  # a cell with arrays in it
            return jax.jit(lambda *arrays: f(static, *arrays))(*arrays)
        return fast(static, *arrays)

    return call


@compiled
def gradients(static, data, noise):
    """Of the loss, by parameters and by nodes, in a plain loop."""
    cell, loss, truncated = static

    def total(params, noise):
        net = Network(cell, loss, params, *data[1:])
        return jnp.sum(losses(net, params, noise, truncated))

    return jax.grad(total, (0, 1))(data[0], noise)


def gradient(net, truncated=False):
    """The gradient through time, or truncated to one step."""
    return gradients((net.cell, net.loss, truncated), net.data, silent(net))[0]


def node_gradient(net, truncated=False):
    """dL/da of all nodes: through time, or of each node's own step alone."""
    return gradients((net.cell, net.loss, truncated), net.data, silent(net))[1]


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


@compiled
def one_estimate(static, key, data):
    """Value and gradient by ``(cell, loss, rule)``."""
    return perturb.recurrent_value_and_grad(*static)(key, *data)


@compiled
def many_estimates(static, keys, data):
    """The gradients of many keys."""
    f = perturb.recurrent_value_and_grad(*static)
    return jax.vmap(lambda key: f(key, *data)[1])(keys)


def estimate(net, rule, key=None):
    """Gradient of one call."""
    key = jax.random.key(0) if key is None else key
    return one_estimate((net.cell, net.loss, rule), key, net.data)[1]


def estimates(net, rule, count, seed=0):
    """Independent gradients of ``count`` keys, leaves ``[count, …]``."""
    keys = jax.random.split(jax.random.key(seed), count)
    return many_estimates((net.cell, net.loss, rule), keys, net.data)


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


def variance(samples, mean):
    """Total variance about the true mean, and its standard error."""
    squares = jnp.sum((rows_of(samples) - flat(mean)[None]) ** 2, axis=1)
    return jnp.mean(squares), jnp.std(squares) / len(squares) ** 0.5


def check_variance(samples, mean, formula):
    """Within 5 %, and the sample large enough to tell."""
    measured, error = variance(samples, mean)
    assert 4 * error < 0.05 * formula
    assert abs(measured / formula - 1) < 0.05


def check_unbiased(samples, mean):
    """Each entry within 5 standard errors, which are small against the gradient."""
    rows, g = rows_of(samples), flat(mean)
    error = rows.std(0) / len(rows) ** 0.5
    assert jnp.max(jnp.abs(rows.mean(0) - g) / error) < 5
    assert jnp.linalg.norm(error) < 0.1 * jnp.linalg.norm(g)


def layer(examples=8):
    """One linear layer, one step, a batch whose means are not zero."""
    keys = jax.random.split(jax.random.key(5), 3)
    cell = lambda w, x, h, n: (h, x @ w.T + n, x @ w.T + n)
    x = 1 + jax.random.normal(keys[0], (1, examples, 3))
    y = 1 + jax.random.normal(keys[1], (1, examples, 2))
    w = jax.random.normal(keys[2], (2, 3))
    return Network(cell, lambda o, y: jnp.sum((o - y) ** 2, -1), w, x, jnp.zeros(()), y)


COARSE = OneSided(sigma=1e-4)
"""Rounding, which order and compilation change, is 1e-12 of the gradient."""

RULES = [
    NodePerturbation(num_samples=2, difference=COARSE),
    ActivityPerturbation(num_samples=2, difference=COARSE),
    WeightPerturbation(num_samples=2, difference=COARSE),
    WeightPerturbation(num_samples=2, difference=COARSE, every_step=True),
]
"""One of each kind."""

ALL = dict(num_samples=512, difference=Exact(), noise=table(signs(9)))
"""All 512 signs of nine nodes: the expectation, without chance."""
