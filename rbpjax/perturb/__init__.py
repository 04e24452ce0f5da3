"""Forward-only gradients: from perturbed forward passes and a scalar.

A rule says what is perturbed; its fields say what that estimates. How to choose:

* ``WeightPerturbation``: any loss; variance grows with the number of weights.
* ``NodePerturbation``: a cell that shows its nodes; unbiased with ``causal`` credit;
  variance grows with nodes × steps × examples.
* ``ActivityPerturbation``: the same passes; not the gradient, but one preconditioned by
  the covariance of the activity's change; step sizes do not depend on σ.

``OneSided`` and ``Central`` use passes alone, ``Exact`` a forward derivative.
``instant`` credit estimates the gradient truncated to one step, ``causal`` that of
BPTT.
"""

from rbpjax.perturb.activity import (
    ActivityPerturbation,
    per_layer_step,
    per_sequence,
    per_step,
)
from rbpjax.perturb.cell import DenseCell, Nodes
from rbpjax.perturb.credit import Trace, causal, instant, total
from rbpjax.perturb.decorrelate import Decorrelation, decorrelate
from rbpjax.perturb.difference import Central, Exact, OneSided
from rbpjax.perturb.node import NodePerturbation
from rbpjax.perturb.noise import (
    Noise,
    coordinate,
    normal,
    orthonormal,
    rademacher,
    sphere,
)
from rbpjax.perturb.paper_code import PaperCode, paper_code
from rbpjax.perturb.recurrent import Trajectory, recurrent_value_and_grad, unroll
from rbpjax.perturb.weight import WeightPerturbation, value_and_grad

__all__ = [
    "ActivityPerturbation",
    "Central",
    "Decorrelation",
    "DenseCell",
    "Exact",
    "NodePerturbation",
    "Nodes",
    "Noise",
    "OneSided",
    "PaperCode",
    "Trace",
    "Trajectory",
    "WeightPerturbation",
    "causal",
    "coordinate",
    "decorrelate",
    "instant",
    "normal",
    "orthonormal",
    "paper_code",
    "per_layer_step",
    "per_sequence",
    "per_step",
    "rademacher",
    "recurrent_value_and_grad",
    "sphere",
    "total",
    "unroll",
    "value_and_grad",
]
