"""Gradients of recurrent computations without their history, as JAX transforms.

The convergent regime is here: ``rbp_solve``, its forward solvers and backward rules.
Beside it, each a namespace of its own:

* ``rbpjax.diagnostics``: can a fixed point be differentiated, and by which rule;
* ``rbpjax.regularizers``: what keeps a network convergent while it is trained;
* ``rbpjax.online``: streaming gradients, the influence carried forward;
* ``rbpjax.perturb``: forward-only gradients, from perturbed passes;
* ``rbpjax.unitary``: norm-preserving recurrence, its history recomputed;
* ``rbpjax.nn``: flax nnx modules over all of them (needs ``pip install rbpjax[nn]``).
"""

import importlib
from typing import TYPE_CHECKING

from rbpjax import diagnostics, regularizers
from rbpjax.bilevel import (
    BilevelDescent,
    BilevelDirections,
    BilevelState,
    optimizer_step,
    soba,
)
from rbpjax.diagnostics.diagnose import diagnose
from rbpjax.fixed_point.backward.adaptive import Adaptive
from rbpjax.fixed_point.backward.bicgstab import BiCGSTAB
from rbpjax.fixed_point.backward.cg import CG
from rbpjax.fixed_point.backward.cg_normal import CGNormal
from rbpjax.fixed_point.backward.direct import Direct
from rbpjax.fixed_point.backward.gmres import GMRES
from rbpjax.fixed_point.backward.jfb import JFB
from rbpjax.fixed_point.backward.neumann import Neumann
from rbpjax.fixed_point.backward.phantom import Phantom
from rbpjax.fixed_point.backward.rbp import RBP
from rbpjax.fixed_point.derivatives import rbp_jvp, rbp_vjp
from rbpjax.fixed_point.forward.anderson import Anderson
from rbpjax.fixed_point.forward.broyden import Broyden
from rbpjax.fixed_point.forward.hybrid import Hybrid
from rbpjax.fixed_point.forward.iteration import FixedPointIteration
from rbpjax.fixed_point.forward.rre import RRE
from rbpjax.fixed_point.implicit import from_args, rbp_fixed_point, rbp_root
from rbpjax.fixed_point.newton import Newton
from rbpjax.fixed_point.phantom import unrolled_phantom
from rbpjax.fixed_point.propagation import (
    EquilibriumEstimate,
    equilibrium_propagation,
)
from rbpjax.fixed_point.report import AdjointReport, value_and_grad_with_report
from rbpjax.fixed_point.reversible import reversible
from rbpjax.fixed_point.solve import rbp_solve
from rbpjax.fixed_point.states import rbp_states
from rbpjax.fixed_point.unroll import bptt
from rbpjax.types import (
    BackwardRule,
    ForwardSolver,
    Solution,
    Solve,
    Status,
    StepFn,
)

if TYPE_CHECKING:
    from rbpjax import nn as nn
    from rbpjax import online, perturb, unitary

__version__ = "0.2.0"

__all__ = [
    "CG",
    "GMRES",
    "JFB",
    "RBP",
    "RRE",
    "Adaptive",
    "AdjointReport",
    "Anderson",
    "BackwardRule",
    "BiCGSTAB",
    "BilevelDescent",
    "BilevelDirections",
    "BilevelState",
    "Broyden",
    "CGNormal",
    "Direct",
    "EquilibriumEstimate",
    "FixedPointIteration",
    "ForwardSolver",
    "Hybrid",
    "Neumann",
    "Newton",
    "Phantom",
    "Solution",
    "Solve",
    "Status",
    "StepFn",
    "bptt",
    "diagnose",
    "diagnostics",
    "equilibrium_propagation",
    "from_args",
    "online",
    "optimizer_step",
    "perturb",
    "rbp_fixed_point",
    "rbp_jvp",
    "rbp_root",
    "rbp_solve",
    "rbp_states",
    "rbp_vjp",
    "regularizers",
    "reversible",
    "soba",
    "unitary",
    "unrolled_phantom",
    "value_and_grad_with_report",
]

_ON_FIRST_USE = frozenset({"nn", "online", "perturb", "unitary"})
"""Packages that import optax or flax, half a second and more: loaded on first use."""


def __getattr__(name: str) -> object:
    """Loads a package on its first use (PEP 562)."""
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"rbpjax.{name}")
    raise AttributeError(f"module 'rbpjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """All public names, and the package that needs flax."""
    return [*__all__, "nn"]
