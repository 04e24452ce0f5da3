"""Flax nnx modules over the rooms of the library."""

from rbpjax.nn.graph import Graph as Graph
from rbpjax.nn.graph import GraphCell as GraphCell
from rbpjax.nn.graph import normalized_adjacency as normalized_adjacency
from rbpjax.nn.implicit import FixedPoint as FixedPoint
from rbpjax.nn.unitary import UnitaryRNN as UnitaryRNN
