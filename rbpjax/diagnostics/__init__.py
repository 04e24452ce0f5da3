"""Whether a fixed point can be differentiated, how well, and by which rule.

``diagnose`` answers in words and numbers; the others are the numbers one by one.
``diagnose_recurrence`` says of a sequence which of the four regimes it is in.
"""

from rbpjax.diagnostics.diagnose import Diagnosis, diagnose
from rbpjax.diagnostics.errors import (
    adjoint_residual,
    gradient_error_bound,
    loop_cut_error,
    neumann_error_bound,
)
from rbpjax.diagnostics.history import History, residual_history
from rbpjax.diagnostics.recurrence import Recurrence, diagnose_recurrence
from rbpjax.diagnostics.spectrum import jacobian_norm, spectral_radius

__all__ = [
    "Diagnosis",
    "History",
    "Recurrence",
    "adjoint_residual",
    "diagnose",
    "diagnose_recurrence",
    "gradient_error_bound",
    "jacobian_norm",
    "loop_cut_error",
    "neumann_error_bound",
    "residual_history",
    "spectral_radius",
]
