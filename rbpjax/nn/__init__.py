"""Flax nnx modules over all parts of the library; imported on first use.

* ``FixedPoint``: any cell as an implicit layer;
* ``ConvCell``: a convolution with a bounded kernel, the first choice on grids;
* ``GraphCell``, on a ``Graph`` such as ``normalized_adjacency`` makes: a contraction;
* ``HopfieldCell`` and ``SoftmaxHopfieldCell``: associative memories;
* ``MonotoneCell``: one fixed point whatever the weights;
* ``UnitaryRNN``: a norm-preserving cell over a sequence: convolutional, dense, or
  beside fading units;
* ``value_and_grad_with_report``: as that of rbpjax, with nnx filters and mutable state;
  ``report_metrics``: its report for a log.

Example:
  >>> import jax.numpy as jnp, numpy as np
  >>> from flax import nnx
  >>> from rbpjax.nn import FixedPoint, GraphCell, normalized_adjacency
  >>> graph = normalized_adjacency(np.array([[0, 1], [1, 0]]), 2)
  >>> layer = FixedPoint(GraphCell(4, gain=0.5, rngs=nnx.Rngs(0)))
  >>> drive = jnp.ones((2, 4), jnp.float32)
  >>> layer((graph, drive), jnp.zeros_like(drive)).value.shape
  (2, 4)
"""

from rbpjax.nn.convolution import ConvCell
from rbpjax.nn.graph import Graph, GraphCell, normalized_adjacency
from rbpjax.nn.hopfield import HopfieldCell, SoftmaxHopfieldCell
from rbpjax.nn.implicit import FixedPoint
from rbpjax.nn.monotone import MonotoneCell
from rbpjax.nn.report import report_metrics, value_and_grad_with_report
from rbpjax.nn.unitary import UnitaryRNN

__all__ = [
    "ConvCell",
    "FixedPoint",
    "Graph",
    "GraphCell",
    "HopfieldCell",
    "MonotoneCell",
    "SoftmaxHopfieldCell",
    "UnitaryRNN",
    "normalized_adjacency",
    "report_metrics",
    "value_and_grad_with_report",
]
