"""The graph cell's fixed point and gradient, against a dense solve."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rbpjax
from rbpjax.nn import FixedPoint, Graph, GraphCell, normalized_adjacency

NODES, UNITS = 7, 3
EDGES = np.array([[0, 1], [1, 2], [2, 0], [2, 3], [4, 5], [0, 1]])  # one twice
BOTH = np.concatenate([EDGES, EDGES[:, ::-1]])


def dense() -> np.ndarray:
    """Â from its definition."""
    a = np.eye(NODES)
    a[BOTH[:, 0], BOTH[:, 1]] = 1
    root = np.diag(a.sum(1) ** -0.5)
    return root @ a @ root


def test_adjacency_is_the_definition():
    graph = normalized_adjacency(BOTH, NODES)
    assert np.all(np.diff(graph.receivers) >= 0), "sorted, as propagate promises"
    matrix = graph.propagate(jnp.eye(NODES, dtype=jnp.float32))
    np.testing.assert_allclose(matrix, dense(), rtol=1e-6)  # weights are float32


def test_messages_go_from_sender_to_receiver():
    """A directed edge (receiver, sender): a symmetric graph would hide the order."""
    graph = normalized_adjacency(np.array([[0, 1]]), 2)
    h = jnp.array([[0.0], [1.0]], jnp.float32)
    got = graph.propagate(h)
    assert got[0, 0] > 0, "node 0 receives what node 1 sends"
    np.testing.assert_allclose(got[1, 0], 1.0)


def test_fixed_point_and_gradient_are_those_of_a_dense_solve():
    """h = Âh W + d, or (I - Wᵀ ⊗ Â) vec h = vec d, W far from symmetric."""
    graph = normalized_adjacency(BOTH, NODES)
    wide = graph.weights.astype(jnp.float64)
    graph = dataclasses.replace(graph, weights=wide)
    random = np.random.default_rng(0)
    cell = GraphCell(UNITS, gain=0.9)
    kernel = random.normal(size=(UNITS, UNITS))
    cell.kernel = nnx.Param(jnp.asarray(0.8 * kernel / np.linalg.norm(kernel, 2)))
    drive = jnp.asarray(random.normal(size=(NODES, UNITS)))
    layer = FixedPoint(
        cell,
        forward=rbpjax.FixedPointIteration(tol=1e-14),
        backward=rbpjax.Adaptive(tol=1e-13),
    )

    def truth(kernel, drive):
        # Row-major vec: vec(ÂhW) = (Â ⊗ Wᵀ) vec(h).
        system = jnp.eye(NODES * UNITS) - jnp.kron(jnp.asarray(dense()), kernel.T)
        return jnp.linalg.solve(system, drive.ravel()).reshape(NODES, UNITS)

    def loss(layer, drive):
        return jnp.sum(layer((graph, drive), jnp.zeros_like(drive)).value ** 3)

    kernel = layer.cell.kernel[...]
    expected = jax.jit(truth)(kernel, drive)
    # Weights of Â are float32 numbers: 6e-8 relative, times κ(I - J) of at most 19.
    np.testing.assert_allclose(
        nnx.jit(lambda layer, d: layer((graph, d), jnp.zeros_like(d)).value)(
            layer, drive
        ),
        expected,
        rtol=0,
        atol=3e-6,
    )
    grads, drive_bar = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(layer, drive)
    dense_loss = lambda k, d: jnp.sum(truth(k, d) ** 3)
    kernel_bar, dense_bar = jax.jit(jax.grad(dense_loss, (0, 1)))(kernel, drive)
    scale = float(jnp.abs(kernel_bar).max())
    np.testing.assert_allclose(
        grads.cell.kernel[...], kernel_bar, rtol=0, atol=1e-5 * scale
    )
    scale = float(jnp.abs(dense_bar).max())
    np.testing.assert_allclose(drive_bar, dense_bar, rtol=0, atol=1e-5 * scale)


def test_contracts_whatever_the_kernel():
    graph = normalized_adjacency(BOTH, NODES)
    cell = GraphCell(UNITS, gain=0.7, activation=jnp.tanh)
    noise = jax.random.normal(jax.random.key(0), (UNITS, UNITS), jnp.float32)
    cell.kernel = nnx.Param(50 * noise)
    keys = jax.random.split(jax.random.key(1), 3)
    shape = (NODES, UNITS)
    drive, a, b = (jax.random.normal(k, shape, jnp.float32) for k in keys)
    distance = jnp.linalg.norm(cell((graph, drive), a) - cell((graph, drive), b))
    assert distance <= 0.7 * jnp.linalg.norm(a - b) * (1 + 1e-5)


@pytest.mark.parametrize(
    ("edges", "words"),
    [
        (np.zeros((3, 3), int), r"integer array \[edge, 2\]; got int64\[3, 3\]"),
        (np.zeros((3, 2)), "integer array"),
        (np.array([[0, 7]]), "nodes 0 … 6; got 0 … 7"),
        (np.array([[-1, 0]]), "nodes 0 … 6; got -1 … 0"),
    ],
)
def test_bad_edges_are_named(edges, words):
    with pytest.raises(ValueError, match=words):
        normalized_adjacency(edges, NODES)


@pytest.mark.parametrize("gain", [0.0, 1.0, -1.0])
def test_a_gain_that_does_not_contract_is_refused(gain):
    with pytest.raises(ValueError, match="`gain` must be in"):
        GraphCell(2, gain=gain)


@pytest.mark.parametrize("shape", [(2, 4), (5, 4), (3,), (2, 3, 4), ()])
def test_states_of_other_nodes_are_refused(shape):
    """Fewer, more, no feature axis, a batch: gathers would clamp or mix them."""
    graph = normalized_adjacency(np.array([[0, 1], [1, 2]]), 3)
    with pytest.raises(
        ValueError, match="`h` must be \\[node, feature\\] with 3 nodes"
    ):
        graph.propagate(jnp.ones(shape, jnp.float32))
    h = jnp.ones((7, 3, 2), jnp.float32)
    assert jax.jit(jax.vmap(graph.propagate))(h).shape == h.shape


def test_graphs_that_are_none_are_refused():
    """Numbers of nodes that are none, and edges of several lengths."""
    edges = jnp.arange(2)
    for count in (0, 2.0, True, None):
        with pytest.raises(ValueError, match="`num_nodes` must be a Python int"):
            Graph(edges, edges, jnp.ones(2), num_nodes=count)
    with pytest.raises(ValueError, match="one entry for each edge"):
        Graph(edges, edges, jnp.ones(3), num_nodes=2)
    with pytest.raises(ValueError, match="`num_nodes` must be a Python int"):
        normalized_adjacency(np.array([[0, 1]]), 2.0)
