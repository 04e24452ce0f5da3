"""A recurrent graph network that settles: message passing kept a contraction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rbpjax.regularizers import spectral_normalize


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["senders", "receivers", "weights"],
    meta_fields=["num_nodes"],
)
@dataclasses.dataclass(frozen=True)
class Graph:
    """A sparse matrix Â over nodes: one entry an edge, sorted by receiver.

    A pytree with three arrays as its leaves.

    Attributes:
      senders: ``int32[edge]``, where a message comes from: the column.
      receivers: ``int32[edge]``, where it goes: the row, in ascending order.
      weights: ``float[edge]``, the entry.
      num_nodes: how many nodes there are, a Python int.

    Raises:
      ValueError: ``num_nodes`` is no Python int of at least 1, or the arrays are not
        three vectors of one length; by `propagate`, for a state of other nodes.

    Example:
      >>> import jax.numpy as jnp
      >>> from rbpjax.nn import Graph
      >>> edge = lambda *nodes: jnp.array(nodes, jnp.int32)
      >>> graph = Graph(edge(1, 2), edge(0, 1), jnp.array([1.0, 2.0]), num_nodes=3)
      >>> graph.propagate(jnp.array([[1.0], [2.0], [3.0]])).ravel().tolist()
      [2.0, 6.0, 0.0]
    """

    senders: jax.Array
    receivers: jax.Array
    weights: jax.Array
    num_nodes: int

    def __post_init__(self) -> None:
        count = self.num_nodes
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(
                f"Graph: `num_nodes` must be a Python int of at least 1; got {count!r}."
            )
        arrays = (self.senders, self.receivers, self.weights)
        # JAX makes graphs of other things than arrays, such as axes and shapes.
        if all(isinstance(a, (jax.Array, np.ndarray)) for a in arrays):
            shapes = [jnp.shape(a) for a in arrays]
            if len(set(shapes)) != 1:
                raise ValueError(
                    "Graph: `senders`, `receivers` and `weights` must have one entry "
                    f"for each edge; got shapes {shapes}."
                )

    def propagate(self, h: jax.Array) -> jax.Array:
        """Âh for ``h [node, feature]``: sums over incoming edges, of that shape.

        Cost: one gather and one sorted segment sum over the edges; no dense matrix.
        AD modes: all.

        Raises:
          ValueError: ``h`` is not ``[num_nodes, feature]``.
        """
        if jnp.ndim(h) != 2 or len(h) != self.num_nodes:
            raise ValueError(
                f"`h` must be [node, feature] with {self.num_nodes} nodes; got shape "
                f"{jnp.shape(h)}. Add an axis for a single feature, and use jax.vmap "
                "for leading batch axes."
            )
        messages = self.weights[:, None] * h[self.senders]
        return jax.ops.segment_sum(
            messages, self.receivers, len(h), indices_are_sorted=True
        )


def normalized_adjacency(edges: np.ndarray, num_nodes: int) -> Graph:
    """Â = D^(-1/2) (A + I) D^(-1/2), the symmetric normalization with self-loops.

    Its eigenvalues are in (-1, 1], so that ‖Â‖₂ = 1. Made with NumPy, once, outside of
    compiled code; cost: a sort of the edges. Not differentiable.

    Args:
      edges: ``int[edge, 2]``, directed; give both directions for an undirected graph,
        without which Â is not symmetric and the bound does not hold. Repeated edges and
        self-loops count once.
      num_nodes: number of nodes.

    Returns:
      A `Graph` with ``float32`` weights.

    Raises:
      ValueError: if ``edges`` is not an integer array of pairs of nodes (a row an edge;
        two edges as [2, edge] look the same, and are read as rows), or ``num_nodes`` is
        no Python int of at least 1.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from rbpjax.nn import normalized_adjacency
      >>> graph = normalized_adjacency(np.array([[0, 1], [1, 0]]), 3)
      >>> graph.propagate(jnp.eye(3, dtype=jnp.float32)).round(3).tolist()
      [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]

    References:
      Kipf and Welling, "Semi-Supervised Classification with Graph Convolutional
      Networks", ICLR 2017, the renormalization trick, https://arxiv.org/abs/1609.02907.
    """
    if isinstance(num_nodes, bool) or not isinstance(num_nodes, (int, np.integer)):
        raise ValueError(f"`num_nodes` must be a Python int; got {num_nodes!r}.")
    edges = np.asarray(edges)
    pairs = edges.ndim == 2 and edges.shape[1] == 2
    if not (pairs and np.issubdtype(edges.dtype, np.integer)):
        raise ValueError(
            "`edges` must be an integer array [edge, 2]; got "
            f"{edges.dtype}{list(edges.shape)}."
        )
    if edges.size and not (0 <= edges.min() and edges.max() < num_nodes):
        raise ValueError(
            f"`edges` must name nodes 0 … {num_nodes - 1}; got {edges.min()} … "
            f"{edges.max()}. Raise `num_nodes` or renumber the nodes."
        )
    loops = np.repeat(np.arange(num_nodes)[:, None], 2, axis=1)
    # Sorted by the first column, the receiver.
    edges = np.unique(np.concatenate([edges, loops]), axis=0)
    degree = np.bincount(edges[:, 0], minlength=num_nodes)
    weights = (degree[edges[:, 0]] * degree[edges[:, 1]]) ** -0.5
    return Graph(
        jnp.asarray(edges[:, 1], jnp.int32),
        jnp.asarray(edges[:, 0], jnp.int32),
        jnp.asarray(weights, jnp.float32),
        int(num_nodes),
    )


class GraphCell(nnx.Module):
    """h ← φ(Â h W + drive) with ‖W‖₂ ≤ gain: one round of message passing.

    With ‖Â‖₂ ≤ 1, |φ′| ≤ 1 and ``gain`` below 1 this is a contraction whatever training
    does to W, so that `rbpjax.nn.FixedPoint` of it always has one fixed point, and
    Neumann's series converges at the rate ``gain``. The drive enters in every step:
    without it the fixed point would not depend on the features of the nodes.

    W starts as the identity: the first network is φ of a diffusion of the drive, as in
    personalized PageRank. The singular value decomposition of W is taken once a solve.
    Cost of a round: one pass over the edges, one product with W. AD modes: all.

    Args:
      units: size of a node's state.
      gain: bound on ‖W‖₂, in (0, 1).
      activation: φ, with a slope of at most 1 in magnitude.
      rngs: accepted as by other modules; nothing is drawn.

    Raises:
      ValueError: if ``gain`` is not in (0, 1).

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from flax import nnx
      >>> from rbpjax.nn import FixedPoint, GraphCell, normalized_adjacency
      >>> graph = normalized_adjacency(np.array([[0, 1], [1, 0]]), 2)
      >>> layer = FixedPoint(GraphCell(4, gain=0.5, rngs=nnx.Rngs(0)))
      >>> drive = jnp.ones((2, 4), jnp.float32)  # h = 0.5 h + 1
      >>> layer((graph, drive), jnp.zeros_like(drive)).value.round(3)[0].tolist()
      [2.0, 2.0, 2.0, 2.0]

    References:
      Scarselli et al., "The Graph Neural Network Model", 2009, for graph networks at a
      fixed point; Liao et al. 2018, section 5.2, for their training; the contraction by
      norms is that of Gu et al., "Implicit Graph Neural Networks", NeurIPS 2020,
      https://arxiv.org/abs/2009.06211.
    """

    def __init__(
        self,
        units: int,
        *,
        gain: float = 0.9,
        activation: Callable[[jax.Array], jax.Array] = lambda h: h,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        if not 0 < gain < 1:
            raise ValueError(
                f"GraphCell: `gain` must be in (0, 1), or nothing settles; got {gain}."
            )
        del rngs
        self.gain = gain
        self.activation = activation
        self.kernel = nnx.Param(jnp.eye(units, dtype=jnp.float32))

    def __call__(self, inputs: tuple[Graph, jax.Array], h: jax.Array) -> jax.Array:
        """One round: the next state, ``[node, unit]``.

        Args:
          inputs: ``(graph, drive)``, with ``drive [node, unit]``.
          h: the state, ``[node, unit]``.
        """
        graph, drive = inputs
        kernel = spectral_normalize(self.kernel[...], self.gain)
        return self.activation(graph.propagate(h) @ kernel + drive)
