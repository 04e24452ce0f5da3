"""Streaming gradients: the influence carried forward, no history stored.

An estimator is an optax-like triple of pure functions (see ``Estimator``). How to
choose, for n units and P parameters:

* ``uoro``: any step function, O(n² + P) a step, unbiased, noisy; the default.
* ``nobacktrack``, ``kalman_nobacktrack``: scales for each unit; O(n P) in general.
* ``kf_rtrl``: a ``PreactivationCell``, O(n³), unbiased, far less noise.
* ``snap1``, ``rflo``: a ``PreactivationCell``, O(P), no noise, biased.
* ``rtrl``: exact, O(n² P): small networks, and the oracle for all others.
* ``bptt``, ``tbptt``: the baselines, over a whole sequence.
"""

from rbpjax.online.bptt import bptt, tbptt
from rbpjax.online.cell import PreactivationCell
from rbpjax.online.combine import (
    average,
    over_batch,
    per_sequence,
    renormalize,
    reset,
)
from rbpjax.online.estimator import Carry, Estimator, OnlineOutput
from rbpjax.online.kalman import kalman_nobacktrack
from rbpjax.online.kf_rtrl import Kronecker, kf_rtrl
from rbpjax.online.local import snap1
from rbpjax.online.metric import scale_by_quasi_diagonal
from rbpjax.online.nobacktrack import nobacktrack
from rbpjax.online.noise import all_signs
from rbpjax.online.rank_one import (
    RankOne,
    rank_one,
    rank_one_scales,
    rank_one_variance,
)
from rbpjax.online.rflo import rflo
from rbpjax.online.rtrl import rtrl
from rbpjax.online.uoro import uoro

__all__ = [
    "Carry",
    "Estimator",
    "Kronecker",
    "OnlineOutput",
    "PreactivationCell",
    "RankOne",
    "all_signs",
    "average",
    "bptt",
    "kalman_nobacktrack",
    "kf_rtrl",
    "nobacktrack",
    "over_batch",
    "per_sequence",
    "rank_one",
    "rank_one_scales",
    "rank_one_variance",
    "renormalize",
    "reset",
    "rflo",
    "rtrl",
    "scale_by_quasi_diagonal",
    "snap1",
    "tbptt",
    "uoro",
]
