"""Norm-preserving recurrence: unitary convolutions, history recomputed backwards."""

from rbpjax.unitary.cell import Activation as Activation
from rbpjax.unitary.cell import CellParams as CellParams
from rbpjax.unitary.cell import CellWeights as CellWeights
from rbpjax.unitary.cell import UnitaryCell as UnitaryCell
from rbpjax.unitary.cell import identity as identity
from rbpjax.unitary.cell import max_min as max_min
from rbpjax.unitary.cell import modulus as modulus
from rbpjax.unitary.cell import saturate as saturate
from rbpjax.unitary.expm import expm_skew as expm_skew
from rbpjax.unitary.kernel import FourierKernel as FourierKernel
from rbpjax.unitary.kernel import conv_exp as conv_exp
from rbpjax.unitary.kernel import fourier_kernel as fourier_kernel
from rbpjax.unitary.recompute import HistoryReport as HistoryReport
from rbpjax.unitary.recompute import Inverse as Inverse
from rbpjax.unitary.recompute import Replay as Replay
from rbpjax.unitary.recompute import recomputed_scan as recomputed_scan
