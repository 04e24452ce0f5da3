"""Norm-preserving recurrence: unitary convolutions, history recomputed backwards.

* ``UnitaryCell`` is the step, over the kernels of ``conv_exp``;
* ``DenseCell`` is the dense one, over ``orthogonal_exp``, ``orthogonal_cayley`` or
  ``orthogonal_householder``;
* ``MixedCell`` puts units that forget beside either of them;
* ``recomputed_scan`` runs any step over time, to be differentiated without its history;
* ``Coupling``, ``Leapfrog``, ``Momentum`` make steps of pairs that have an inverse;
* lattices are periodic or reflect at their edges (``boundary``);
* ``graph_exp`` is unitary convolution on a graph, over ``normalized_adjacency``;
* ``activation`` holds nonlinearities, ``history`` the ways back and their report.

Example:
  >>> import jax, jax.numpy as jnp
  >>> from rbpjax.unitary import UnitaryCell, history, recomputed_scan
  >>> cell = UnitaryCell(lattice=(32,))
  >>> params = cell.prepare(cell.init(jax.random.key(0), radius=2, inputs=3))
  >>> back, inputs = history.Replay(slots=8), jnp.ones((100, 3))
  >>> h, _ = recomputed_scan(cell, params, inputs, cell.start(), history=back)
  >>> h.shape
  (32,)
"""

from rbpjax.unitary import activation, history
from rbpjax.unitary.cell import CellParams, CellWeights, UnitaryCell
from rbpjax.unitary.dense import DenseCell, DenseParams
from rbpjax.unitary.expm import expm_skew
from rbpjax.unitary.graph import graph_exp, normalized_adjacency
from rbpjax.unitary.kernel import FourierKernel, conv_exp, fourier_kernel
from rbpjax.unitary.mixed import MixedCell, MixedParams, MixedState, MixedWeights
from rbpjax.unitary.orthogonal import (
    orthogonal_cayley,
    orthogonal_exp,
    orthogonal_householder,
)
from rbpjax.unitary.recompute import recomputed_scan
from rbpjax.unitary.reversible import Coupling, Leapfrog, Momentum

__all__ = [
    "CellParams",
    "CellWeights",
    "Coupling",
    "DenseCell",
    "DenseParams",
    "FourierKernel",
    "Leapfrog",
    "MixedCell",
    "MixedParams",
    "MixedState",
    "MixedWeights",
    "Momentum",
    "UnitaryCell",
    "activation",
    "conv_exp",
    "expm_skew",
    "fourier_kernel",
    "graph_exp",
    "history",
    "normalized_adjacency",
    "orthogonal_cayley",
    "orthogonal_exp",
    "orthogonal_householder",
    "recomputed_scan",
]
