"""Gradients of recurrent computations without their history, as JAX transforms."""

from rbpjax.fixed_point.adaptive import Adaptive
from rbpjax.fixed_point.anderson import Anderson
from rbpjax.fixed_point.backward import RBP, Neumann
from rbpjax.fixed_point.diagnose import (
    adjoint_residual,
    jacobian_norm,
    spectral_radius,
)
from rbpjax.fixed_point.forward import FixedPointIteration
from rbpjax.fixed_point.gmres import GMRES
from rbpjax.fixed_point.krylov import BiCGSTAB, CGNormal
from rbpjax.fixed_point.solve import (
    AdjointReport,
    rbp_jvp,
    rbp_solve,
    rbp_vjp,
    value_and_grad,
)
from rbpjax.fixed_point.unroll import bptt, tbptt
from rbpjax.types import BackwardRule, ForwardSolver, Solution, StepFn

__version__ = "0.1.0"

__all__ = [
    "GMRES",
    "RBP",
    "Adaptive",
    "AdjointReport",
    "Anderson",
    "BackwardRule",
    "BiCGSTAB",
    "CGNormal",
    "FixedPointIteration",
    "ForwardSolver",
    "Neumann",
    "Solution",
    "StepFn",
    "adjoint_residual",
    "bptt",
    "jacobian_norm",
    "rbp_jvp",
    "rbp_solve",
    "rbp_vjp",
    "spectral_radius",
    "tbptt",
    "value_and_grad",
]
