"""Two recurrent graph networks, and two classifiers without recurrence."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse
from flax import nnx
from jax.experimental import sparse

import rbpjax
from benchmarks.data.planetoid import Planetoid
from benchmarks.harness.options import require
from rbpjax.nn import Graph, GraphCell, normalized_adjacency

Solve = Callable[..., rbpjax.Solution]


def step(cell: nnx.Module, inputs: tuple, h: jax.Array) -> jax.Array:
    """The step function of any cell: the module is the parameters."""
    return cell(inputs, h)


class Convergent(nnx.Module):
    """Â h W + drive at its fixed point, ‖W‖₂ ≤ 0.9; the drive is a layer of features.

    A network that has what the implicit gradient asks for: the features enter in every
    step and ρ(J) ≤ 0.9 whatever training does. Dropout is applied to the features, the
    drive and the fixed point, outside the recurrence, which so stays one function.
    """

    hidden, units, gain, dropout, decay = 64, 32, 0.9, 0.7, 2e-2

    def __init__(self, num_features: int, num_classes: int, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.glorot_uniform()
        linear = lambda m, n, bias: nnx.Linear(
            m, n, use_bias=bias, kernel_init=init, rngs=rngs
        )
        self.encoder = nnx.Param(init(rngs.params(), (num_features, self.hidden)))
        self.bias = nnx.Param(jnp.zeros(self.hidden))
        self.drive = linear(self.hidden, self.units, False)
        self.cell = GraphCell(self.units, gain=self.gain)
        self.readout = linear(self.units, num_classes, True)

    @staticmethod
    def inputs(graph: Planetoid) -> tuple[Graph, sparse.BCOO]:
        """The normalized adjacency, and the features with rows of sum 1."""
        features = graph.features.astype(np.float32)
        size = np.maximum(np.asarray(features.sum(1)).ravel(), 1e-9)
        features = scipy.sparse.diags_array(1 / size) @ features
        edges = normalized_adjacency(graph.edges, len(graph.labels))
        return edges, sparse.BCOO.from_scipy_sparse(scipy.sparse.csr_array(features))

    @staticmethod
    def optimizer(learning_rate: float) -> optax.GradientTransformation:
        """Adam, with a tenth of the step for W: it starts where it is useful."""
        is_cell = lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: "cell" in jax.tree_util.keystr(path), params
        )
        slower = optax.masked(optax.scale(0.1), is_cell)
        return optax.chain(optax.adam(learning_rate), slower)

    def problem(
        self, inputs: tuple[Graph, sparse.BCOO], key: jax.Array | None
    ) -> tuple[nnx.Module, tuple[Graph, jax.Array], jax.Array]:
        """(params, inputs, h0) of the step function; no dropout without a key."""
        graph, features = inputs
        keys = [None, None] if key is None else jax.random.split(key)
        data = _drop(keys[0], features.data, self.dropout)
        features = sparse.BCOO(
            (data, features.indices),
            shape=features.shape,
            indices_sorted=True,
            unique_indices=True,
        )
        hidden = jax.nn.relu(features @ self.encoder[...] + self.bias[...][None])
        drive = self.drive(_drop(keys[1], hidden, self.dropout))
        return self.cell, (graph, drive), jnp.zeros_like(drive)

    def logits(self, h: jax.Array, key: jax.Array | None) -> jax.Array:
        """Classes ``[node, class]`` of the state."""
        return self.readout(_drop(key, h, self.dropout))

    def penalty(self) -> jax.Array:
        """Weight decay of the encoder, as in GCN and APPNP: of the first layer only."""
        return 0.5 * self.decay * jnp.sum(self.encoder[...] ** 2)


class Paper(nnx.Module):
    """The GRU network of Liao et al.'s public code, which is at no fixed point.

    h₀ are the features, reduced to ``units`` principal components; a node's message is
    the sum of its neighbors' states, the update a GRU of message and state. The
    features enter at the start only, and nothing bounds ρ(J). The code keeps repeated
    edges (302 of Cora's 10,858); here an edge counts once.
    """

    units = 64

    def __init__(self, num_features: int, num_classes: int, rngs: nnx.Rngs) -> None:
        del num_features
        init = nnx.initializers.kaiming_normal()
        self.cell = SumGRU(self.units, init, rngs)
        self.readout = nnx.Linear(self.units, num_classes, kernel_init=init, rngs=rngs)

    @classmethod
    def inputs(cls, graph: Planetoid) -> tuple[Graph, jax.Array]:
        """The adjacency, and the principal components of the features."""
        from sklearn.decomposition import PCA

        require(graph.complete, "the paper's model needs the features of all nodes")
        reduced = PCA(cls.units, random_state=1234).fit_transform(
            graph.features.toarray()
        )
        receivers, senders = graph.edges[np.lexsort(graph.edges.T[::-1])].T
        ones = np.ones(len(senders), np.float32)
        arrays = map(jnp.asarray, (senders, receivers, ones))
        edges = Graph(*arrays, num_nodes=len(graph.labels))
        return edges, jnp.asarray(reduced, jnp.float32)

    @staticmethod
    def optimizer(learning_rate: float) -> optax.GradientTransformation:
        """SGD with momentum 0.9 and weight decay 5e-4, as in the paper's code."""
        sgd = optax.sgd(learning_rate, momentum=0.9)
        return optax.chain(optax.add_decayed_weights(5e-4), sgd)

    def problem(
        self, inputs: tuple[Graph, jax.Array], key: jax.Array | None
    ) -> tuple[nnx.Module, Graph, jax.Array]:
        """(params, inputs, h0) of the step function."""
        graph, features = inputs
        return self.cell, graph, features

    def logits(self, h: jax.Array, key: jax.Array | None) -> jax.Array:
        """Classes ``[node, class]`` of the state."""
        return self.readout(h)

    def penalty(self) -> jax.Array:
        """None: the optimizer decays all weights."""
        return jnp.zeros(())


class SumGRU(nnx.Module):
    """A GRU whose input is the sum of the neighbors' states."""

    def __init__(self, units: int, init: Callable, rngs: nnx.Rngs) -> None:
        self.gru = nnx.GRUCell(
            units, units, kernel_init=init, recurrent_kernel_init=init, rngs=rngs
        )

    def __call__(self, graph: Graph, h: jax.Array) -> jax.Array:
        """One round of messages."""
        return self.gru(h, graph.propagate(h))[0]


def _drop(key: jax.Array | None, x: jax.Array, rate: float) -> jax.Array:
    """Dropout; none without a key."""
    if key is None:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


# --- without recurrence --------------------------------------------------------------

# Inverse penalties tried; the one that is best on the validation nodes is taken.
PENALTIES = tuple(10.0**k for k in range(-2, 5))


def linear_baselines(graph: Planetoid, split: tuple) -> dict[str, float]:
    """Test accuracy of softmax on the features, and of SGC: on features two hops on.

    SGC: Wu et al., "Simplifying Graph Convolutional Networks", ICML 2019.
    """
    from sklearn.linear_model import LogisticRegression

    adjacency, bag = Convergent.inputs(graph)
    nodes = len(graph.labels)
    entries = (adjacency.weights, (adjacency.receivers, adjacency.senders))
    matrix = scipy.sparse.csr_array(
        jax.tree.map(np.asarray, entries), shape=(nodes, nodes)
    )
    entries = (np.asarray(bag.data), tuple(np.asarray(bag.indices).T))
    features = scipy.sparse.csr_array(entries, shape=bag.shape)
    train, validation, test = split
    result = {}
    for name, x in {"softmax": features, "sgc": matrix @ (matrix @ features)}.items():
        scores = []
        for penalty in PENALTIES:
            model = LogisticRegression(C=penalty, max_iter=1000)
            model.fit(x[train], graph.labels[train])
            score = lambda nodes, m=model, x=x: m.score(x[nodes], graph.labels[nodes])
            scores.append((score(validation), score(test)))
        result[name] = max(scores, key=lambda s: s[0])[1]
    return result
