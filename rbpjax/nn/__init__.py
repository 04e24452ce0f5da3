"""Flax nnx modules over the rooms of the library."""

from rbpjax.nn.implicit import FixedPoint as FixedPoint
from rbpjax.nn.unitary import UnitaryRNN as UnitaryRNN
