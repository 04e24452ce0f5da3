"""What every public name keeps: documented, sorted, hashable, printable, light."""

import dataclasses
import inspect
import subprocess
import sys
import types
from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest

import rbpjax
from rbpjax import RBP, CGNormal, FixedPointIteration, Neumann
from tests.support.problems import PROBLEMS, RULES, readout

PUBLIC = {name: getattr(rbpjax, name) for name in rbpjax.__all__}
FUNCTIONS = {k: v for k, v in PUBLIC.items() if isinstance(v, types.FunctionType)}
STRATEGIES = {
    **{name: rule for name, rule in RULES.items() if dataclasses.is_dataclass(rule)},
    "forward": FixedPointIteration(),
    "forward_steps": FixedPointIteration(steps=3),
    "forward_all": FixedPointIteration(max_steps=7, tol=1e-3, damping=0.25),
    "anderson": rbpjax.Anderson(),
    "rre": rbpjax.RRE(),
    "newton": rbpjax.Newton(),
    "newton_nested": rbpjax.Newton(CGNormal(tol=1e-3), 7, 1e-4, 2),
    "cg": rbpjax.CG(),
    "cg_ridge": CGNormal(ridge=1e-5),
    "rbp_nested": RBP(FixedPointIteration(steps=2), seed=3),
}
strategies = pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)


def test_all_is_complete_and_sorted():
    """__all__ holds each public name of the package once, in ruff's order."""
    kind = lambda name: 0 if name.isupper() else 1 if name[0].isupper() else 2
    assert rbpjax.__all__ == sorted(rbpjax.__all__, key=lambda n: (kind(n), n))
    visible = {
        name
        for name, value in vars(rbpjax).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert visible == set(rbpjax.__all__)


@pytest.mark.parametrize("name", [n for n in PUBLIC if n != "StepFn"])
def test_public_names_are_documented(name):
    """Classes and functions have docstrings; what one calls has a runnable example."""
    doc = inspect.getdoc(PUBLIC[name])
    assert doc and len(doc.splitlines()[0]) > 10
    if name in FUNCTIONS or dataclasses.is_dataclass(PUBLIC[name]):
        assert ">>> " in doc
    if name in FUNCTIONS:
        for section in ("Args:", "Returns:"):
            assert section in doc
        for parameter in inspect.signature(PUBLIC[name]).parameters:
            assert f"\n  {parameter}: " in doc
    if dataclasses.is_dataclass(PUBLIC[name]):
        for field in dataclasses.fields(PUBLIC[name]):
            assert f"\n  {field.name}: " in doc


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_annotated_and_ordered(name):
    """Everything public is annotated; arguments come as f, params, inputs, state."""
    signature = inspect.signature(FUNCTIONS[name])
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
    order = ["f", "params", "inputs"]
    taken = [p for p in signature.parameters if p in order]
    assert taken == order[: len(taken)] == list(signature.parameters)[: len(taken)]


def test_every_public_strategy_is_in_the_table():
    """A new strategy must join STRATEGIES, and so the tests below."""
    public = {v for v in PUBLIC.values() if dataclasses.is_dataclass(v)}
    assert public == {type(s) for s in STRATEGIES.values()}


@strategies
def test_strategies_are_values(make):
    """Equal by value, hashable, printed as they were written, frozen, no leaves."""
    copy = dataclasses.replace(make)
    assert copy is not make and copy == make and hash(copy) == hash(make)
    assert eval(repr(make), vars(rbpjax)) == make
    assert jax.tree.leaves(make) == []
    assert jax.tree.structure(make) == jax.tree.structure(copy)
    field = dataclasses.fields(make)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(make, field, None)


def test_different_strategies_are_different_keys():
    """No two rows of the table are equal, not even across classes."""
    assert len(set(STRATEGIES.values())) == len(STRATEGIES)
    assert Neumann(20) != FixedPointIteration(20) and CGNormal(20) != Neumann(20)


@strategies
def test_strategies_pass_through_jit_as_arguments(make):
    """A strategy is an argument of a jitted function like any other."""
    problem = PROBLEMS["linear"]
    slot = "forward" if isinstance(make, FixedPointIteration) else "backward"

    @jax.jit
    def loss(strategy, w):
        solve = rbpjax.rbp_solve(problem.f, **{slot: strategy})
        return readout(solve(w, problem.inputs, problem.h0).value)

    closed_over = jax.jit(lambda w: loss(make, w))(problem.params)
    chex.assert_trees_all_equal(loss(make, problem.params), closed_over)


def test_protocols_are_obeyed_by_all_strategies():
    """Every strategy returns a Solution with a scalar count, residual and verdict."""
    vector = {"a": jnp.ones(2), "b": jnp.ones((1, 3))}
    half = lambda v: jax.tree.map(lambda x: 0.5 * x, v)
    shift = lambda v: jax.tree.map(lambda x: 0.5 * x + 1, v)
    for strategy in STRATEGIES.values():
        step = shift if isinstance(strategy, FixedPointIteration) else half
        solution = jax.eval_shape(partial(strategy, step), vector)
        assert isinstance(solution, rbpjax.Solution)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            solution.value, jax.eval_shape(lambda v: v, vector)
        )
        assert (solution.num_steps.shape, solution.num_steps.dtype) == ((), jnp.int32)
        assert solution.residual.shape == () and solution.residual.dtype == jnp.float64
        assert (solution.converged.shape, solution.converged.dtype) == ((), bool)


def test_import_is_light():
    """``import rbpjax`` loads neither flax nor what plots, saves or tests."""
    heavy = {"flax", "matplotlib", "orbax", "chex", "sklearn", "pooch", "tqdm"}
    code = (
        "import sys, jax, optax; before = set(sys.modules); import rbpjax; "
        f"print(sorted({heavy} & (set(sys.modules) - before)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]", run.stdout
