"""Gradients of recurrent computations without their history, as JAX transforms."""

from rbpjax.bilevel import optimizer_step
from rbpjax.diagnostics.diagnose import Diagnosis, diagnose
from rbpjax.diagnostics.errors import gradient_error_bound, neumann_error_bound
from rbpjax.diagnostics.spectrum import (
    adjoint_residual,
    jacobian_norm,
    loop_cut_error,
    spectral_radius,
)
from rbpjax.fixed_point.backward.adaptive import Adaptive
from rbpjax.fixed_point.backward.cg import CG
from rbpjax.fixed_point.backward.cg_normal import BiCGSTAB, CGNormal
from rbpjax.fixed_point.backward.direct import Direct
from rbpjax.fixed_point.backward.gmres import GMRES
from rbpjax.fixed_point.backward.neumann import RBP, Neumann
from rbpjax.fixed_point.forward.anderson import Anderson
from rbpjax.fixed_point.forward.iteration import FixedPointIteration
from rbpjax.fixed_point.forward.rre import RRE
from rbpjax.fixed_point.newton import Newton
from rbpjax.fixed_point.report import AdjointReport, value_and_grad
from rbpjax.fixed_point.solve import rbp_jvp, rbp_solve, rbp_vjp
from rbpjax.fixed_point.unroll import bptt, tbptt
from rbpjax.regularizers import (
    contraction_penalty,
    jacobian_penalty,
    spectral_normalize,
)
from rbpjax.types import BackwardRule, ForwardSolver, Solution, StepFn

__version__ = "0.1.0"

__all__ = [
    "CG",
    "GMRES",
    "RBP",
    "RRE",
    "Adaptive",
    "AdjointReport",
    "Anderson",
    "BackwardRule",
    "BiCGSTAB",
    "CGNormal",
    "Diagnosis",
    "Direct",
    "FixedPointIteration",
    "ForwardSolver",
    "Neumann",
    "Newton",
    "Solution",
    "StepFn",
    "adjoint_residual",
    "bptt",
    "contraction_penalty",
    "diagnose",
    "gradient_error_bound",
    "jacobian_norm",
    "jacobian_penalty",
    "loop_cut_error",
    "neumann_error_bound",
    "optimizer_step",
    "rbp_jvp",
    "rbp_solve",
    "rbp_vjp",
    "spectral_normalize",
    "spectral_radius",
    "tbptt",
    "value_and_grad",
]
