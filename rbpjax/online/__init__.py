"""Streaming gradients: the influence carried forward, no history stored.

An estimator is a triple of pure functions, as in optax (see ``Estimator``). How to
choose, for n units and P parameters:

* ``uoro``: any step function, O(n² + P) a step, unbiased, noisy; the default.
* ``nobacktrack``, ``kalman_nobacktrack``: scales for each unit; O(n P) in general,
  O(n² + P) where units own their parameters and ``rows`` says so.
* ``kf_rtrl``: a ``PreactivationCell``, O(n³), unbiased, far less noise.
* ``ok_rtrl``: the same with several products and least variance, O(r n³) for r.
* ``snap1``, ``rflo``: a ``PreactivationCell``, O(P), no noise, biased. Of spiking units
  ``rflo`` is e-prop; its feedback may be random.
* ``snap``: the same over n steps of a sparse recurrence, less biased, dearer.
* ``diagonal_rtrl``: an ``ElementwiseCell``, whose units do not see each other, O(P),
  no noise, exact; of a ``LayeredCell`` biased below the top layer.
* ``rtrl``: exact, O(n² P): small networks, and the oracle for all others.
* ``bptt``: the baseline, over a whole sequence, truncated or not.

``cells`` has vanilla, leaky, spiking, GRU, LSTM and linear recurrent units, ready for
these.
``combine`` makes estimators from estimators: averages, batches, resets, a bound on the
influence. ``rank_one`` is the trick beneath, by itself.
"""

from rbpjax.online import cells, combine, rank_one
from rbpjax.online.bptt import bptt
from rbpjax.online.cell import PreactivationCell
from rbpjax.online.diagonal import diagonal_rtrl
from rbpjax.online.elementwise import ElementwiseCell, LayeredCell
from rbpjax.online.estimator import Carry, Estimator, OnlineOutput
from rbpjax.online.kalman import kalman_nobacktrack
from rbpjax.online.kf_rtrl import kf_rtrl
from rbpjax.online.local import rflo, snap1
from rbpjax.online.metric import scale_by_quasi_diagonal
from rbpjax.online.nobacktrack import nobacktrack
from rbpjax.online.ok_rtrl import ok_rtrl
from rbpjax.online.rtrl import rtrl
from rbpjax.online.snap import snap
from rbpjax.online.uoro import uoro

__all__ = [
    "Carry",
    "ElementwiseCell",
    "Estimator",
    "LayeredCell",
    "OnlineOutput",
    "PreactivationCell",
    "bptt",
    "cells",
    "combine",
    "diagonal_rtrl",
    "kalman_nobacktrack",
    "kf_rtrl",
    "nobacktrack",
    "ok_rtrl",
    "rank_one",
    "rflo",
    "rtrl",
    "scale_by_quasi_diagonal",
    "snap",
    "snap1",
    "uoro",
]
