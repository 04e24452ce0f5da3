"""Flax nnx modules over the rooms of the library."""

from rbpjax.nn.unitary import UnitaryRNN as UnitaryRNN
