"""Graphs with features, labels and what each node is for."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from benchmarks.data.planetoid import planetoid
from rbpjax.nn import Graph, normalized_adjacency

CLASSES = 4


@dataclasses.dataclass(frozen=True)
class Nodes:
    """A graph; the last three are the numbers of its nodes for each purpose."""

    graph: Graph
    features: np.ndarray
    labels: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @property
    def sizes(self) -> tuple[int, int]:
        """How many features, and how many classes."""
        return self.features.shape[1], int(self.labels.max()) + 1


def cora() -> Nodes:
    """2,708 papers, the words in them, and seven fields, of which 140 are known."""
    found = planetoid("cora")
    features = np.asarray(found.features.todense(), np.float32)
    features /= np.maximum(features.sum(1, keepdims=True), 1e-9)
    graph = normalized_adjacency(found.edges, len(found.labels))
    parts = found.train, found.validation, found.test
    return Nodes(graph, features, found.labels, *parts)


def planted(seed: int = 0, count: int = 300) -> Nodes:
    """A graph without a download: three groups that cite themselves, faint features."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % 3
    same = labels[:, None] == labels
    ties = np.triu(rng.uniform(size=same.shape) < np.where(same, 0.06, 0.006), 1)
    edges = np.argwhere(ties | ties.T)
    features = rng.normal(size=(count, 30)) + 1.5 * np.eye(3, 30)[labels]
    nodes = rng.permutation(count)
    graph = normalized_adjacency(edges, count)
    parts = nodes[:30], nodes[30:100], nodes[100:]
    return Nodes(graph, features.astype(np.float32), labels, *parts)


def chains(count: int, length: int, seed: int | tuple[int, ...]) -> Nodes:
    """Chains whose first node alone shows the class, of all of its nodes.

    The others show nothing. Messages go down the chain, one edge a round.
    """
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, CLASSES, count)
    features = np.zeros((count, length, CLASSES), np.float32)
    features[:, 0] = np.eye(CLASSES)[classes]
    nodes = np.arange(count * length, dtype=np.int32).reshape(count, length)
    ends = nodes[:, :-1].ravel(), nodes[:, 1:].ravel()
    senders, receivers = map(jnp.asarray, ends)
    ones = jnp.ones(len(senders), jnp.float32)
    graph = Graph(senders, receivers, ones, num_nodes=count * length)
    far = nodes[:, 50:].ravel()
    labels = np.repeat(classes, length).astype(np.int32)
    features = features.reshape(count * length, -1)
    return Nodes(graph, features, labels, nodes.ravel(), far, far)
