"""``num_products`` is what was executed: counted by callbacks, the report read."""

import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax import (
    CG,
    GMRES,
    RBP,
    RRE,
    Adaptive,
    Anderson,
    BiCGSTAB,
    Broyden,
    CGNormal,
    Direct,
    FixedPointIteration,
    Neumann,
    Newton,
)
from tests.support.counters import counted_evaluations, counted_products
from tests.support.families import FAMILIES
from tests.support.problems import rows

N = 12
RULES = {
    "neumann": Neumann(tol=1e-9),
    "neumann_every": Neumann(tol=1e-9, check_every=5),
    "neumann_damped": Neumann(tol=1e-9, damping=0.3),
    "neumann_steps": Neumann(steps=7),
    "neumann_none": Neumann(steps=0),
    "rbp": RBP(FixedPointIteration(tol=1e-9)),
    "rbp_steps": RBP(FixedPointIteration(steps=7), seed=3),
    "anderson": RBP(Anderson(tol=1e-9)),
    "rre": RBP(RRE(tol=1e-9)),
    "cg": CG(tol=1e-9),
    "cg_normal": CGNormal(tol=1e-9),
    "cg_ridge": CGNormal(tol=1e-9, ridge=1e-3),
    "cg_budget": CGNormal(tol=1e-9, max_steps=4),
    "bicgstab": BiCGSTAB(tol=1e-9),
    "gmres": GMRES(tol=1e-9, restart=5),
    "gmres_budget": GMRES(tol=1e-9, restart=5, max_steps=7),
    "adaptive": Adaptive(tol=1e-9),
    "adaptive_budget": Adaptive(tol=1e-9, max_steps=6),
    "direct": Direct(),
}
# One of each kind; their variants are in the long form.
SHORT = (
    "neumann",
    "neumann_steps",
    "rbp",
    "anderson",
    "rre",
    "cg",
    "cg_normal",
    "cg_ridge",
    "bicgstab",
    "gmres",
    "adaptive",
    "direct",
)
SPECTRA = ("symmetric [0, 0.9]", "Ginibre, ρ = 0.5", "Ginibre, ρ = 1.5")


@pytest.mark.parametrize("family", rows(SPECTRA, ("Ginibre, ρ = 1.5",)))
@pytest.mark.parametrize("name", rows(RULES.keys(), SHORT))
def test_products_of_a_rule(name, family):
    """With J and with Jᵀ, the last one for the residual that is reported."""
    jac = jnp.asarray(FAMILIES[family](np.random.default_rng(0), N))
    g = jnp.asarray(np.random.default_rng(1).normal(size=N))
    made, solution = counted_products(RULES[name], lambda h: jac @ h, g, g)
    assert made == int(solution.num_products) > 0


@pytest.mark.parametrize(
    "name",
    rows(
        ["neumann", "neumann_steps", "rbp", "cg_normal", "cg_ridge", "adaptive"],
        ["neumann", "cg_ridge"],
    ),
)
def test_products_from_a_start(name):
    """One more, which fits the start's size."""
    jac = jnp.asarray(FAMILIES["Ginibre, ρ = 0.5"](np.random.default_rng(0), N))
    g, start = jnp.asarray(np.random.default_rng(1).normal(size=(2, N)))
    made, solution = counted_products(RULES[name], lambda h: jac @ h, g, g, start)
    assert made == int(solution.num_products)


SOLVERS = {
    "iteration": FixedPointIteration(tol=1e-9),
    "iteration_every": FixedPointIteration(tol=1e-9, check_every=5),
    "iteration_damped": FixedPointIteration(tol=1e-9, damping=0.3),
    "iteration_steps": FixedPointIteration(steps=7),
    "iteration_none": FixedPointIteration(steps=0),
    "iteration_budget": FixedPointIteration(tol=1e-9, max_steps=5),
    "anderson": Anderson(tol=1e-9),
    "broyden": Broyden(tol=1e-9),
    "broyden_budget": Broyden(tol=1e-9, max_steps=8),
    "rre": RRE(tol=1e-9),
    "rre_budget": RRE(tol=1e-9, max_steps=8),
    "newton": Newton(BiCGSTAB(tol=1e-2), tol=1e-9),
    "newton_normal": Newton(CGNormal(tol=1e-2), tol=1e-9, warmup=3),
    "newton_direct": Newton(Direct(), tol=1e-9),
    "newton_default": Newton(tol=1e-9),
    "newton_budget": Newton(Neumann(steps=1), tol=1e-9, max_steps=2),
}


@pytest.mark.parametrize(
    "name",
    rows(
        SOLVERS.keys(),
        ("iteration", "iteration_steps", "anderson", "rre", "newton", "newton_direct"),
    ),
)
def test_evaluations_of_a_solver(name):
    """Of f, the one that measures the residual too; Newton's have products beside."""
    w = jnp.asarray(FAMILIES["Ginibre, ρ = 0.95"](np.random.default_rng(0), N))
    x = jnp.asarray(np.random.default_rng(1).normal(size=N))
    made, solution = counted_evaluations(
        SOLVERS[name], lambda h: jnp.tanh(w @ h + x), jnp.zeros(N)
    )
    assert made == int(solution.num_products) > 0


def test_newton_that_shortens_its_steps():
    """Steps taken back cost an evaluation each, and no product."""
    step = lambda h: h - 5 - jnp.arctan(h - 5) + 5
    solver = Newton(Direct(), tol=1e-6)
    made, solution = counted_evaluations(solver, step, jnp.full(1, 8.0))
    assert solution.converged and made == int(solution.num_products)
