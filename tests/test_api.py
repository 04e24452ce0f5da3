"""What every public name keeps: sorted, documented, annotated; values; light imports.

Public are the names in ``__all__`` of rbpjax, of its rooms, and of the modules that
these list.
"""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import textwrap
import types
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import rbpjax
from rbpjax import nn, online

ROOT = Path(__file__).parents[1]


def modules() -> dict[str, types.ModuleType]:
    """The public modules by name."""
    found, waiting = {}, [rbpjax, nn]
    while waiting:
        module = waiting.pop()
        found[module.__name__] = module
        values = [getattr(module, name) for name in getattr(module, "__all__", ())]
        waiting += [
            v for v in values if inspect.ismodule(v) and v.__name__ not in found
        ]
    return dict(sorted(found.items()))


MODULES = modules()
# Each public class and function once, by the shortest path to it.
OBJECTS: dict[str, object] = {}
for module in sorted(MODULES.values(), key=lambda m: m.__name__.count(".")):
    for public in getattr(module, "__all__", ()):
        value = getattr(module, public)
        ours = getattr(value, "__module__", "").startswith("rbpjax")
        made_here = inspect.isclass(value) or inspect.isfunction(value)
        if ours and made_here and not any(value is v for v in OBJECTS.values()):
            OBJECTS[f"{module.__name__}.{public}"] = value
FUNCTIONS = {n: v for n, v in OBJECTS.items() if inspect.isfunction(v)}
# Classes made by ``strategy``: every field has a specifier.
STRATEGIES = {
    n: v
    for n, v in OBJECTS.items()
    if dataclasses.is_dataclass(v) and all(f.metadata for f in dataclasses.fields(v))
}

module_names = pytest.mark.parametrize("name", MODULES)
objects = pytest.mark.parametrize("name", OBJECTS)
functions = pytest.mark.parametrize("name", FUNCTIONS)
strategies = pytest.mark.parametrize("name", STRATEGIES)


def in_order(names: list[str]) -> list[str]:
    """Ruff's order: constants, classes, functions."""
    kind = lambda name: 0 if name.isupper() else 1 if name[0].isupper() else 2
    return sorted(names, key=lambda name: (kind(name), name))


@module_names
def test_all_is_complete_and_sorted(name):
    """__all__ holds each public name of the module once, and all can be had."""
    module = MODULES[name]
    assert module.__doc__ and module.__all__ == in_order(module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, public) for public in module.__all__)
    # Of a package, all that its __init__ imports of its own is public.
    if hasattr(module, "__path__"):
        visible = {
            n
            for n, v in vars(module).items()
            if not n.startswith("_")
            and not inspect.ismodule(v)
            and getattr(v, "__module__", "rbpjax").startswith("rbpjax")
            and (callable(v) or inspect.isclass(v))
        }
        assert visible <= set(module.__all__)


# Public names of the rooms that are no method: types, records, helpers.
NOT_METHODS = set(
    """
    AdjointReport BackwardRule BilevelDescent BilevelDirections BilevelState
    EquilibriumEstimate ForwardSolver Solution Solve Status StepFn diagnose
    value_and_grad_with_report
    Carry ElementwiseCell Estimator LayeredCell OnlineOutput PreactivationCell
    rank_one
    Advice Evolution EvolutionCarry EvolutionOutput Nodes Trajectory unroll
    CellParams CellWeights DenseParams FourierKernel HistoryReport MixedParams
    MixedState MixedWeights
    """.split()
)


def test_every_method_has_its_row():
    """docs/methods.md has each estimator, rule, solver and history, and no more."""
    page = (ROOT / "docs" / "methods.md").read_text()
    found = set()
    for line in page.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 5 and all(cells), line
            found |= {n.split(".")[-1] for n in re.findall(r"`([\w.]+)`", cells[0])}
    rooms = (rbpjax, online, rbpjax.perturb, rbpjax.unitary, rbpjax.unitary.history)
    public = {
        name: getattr(room, name)
        for room in rooms
        for name in room.__all__
        if not inspect.ismodule(getattr(room, name))
    }
    assert found == public.keys() - NOT_METHODS
    # The list cannot leave out rules, nor what makes an estimator or a solver.
    for name in NOT_METHODS & public.keys():
        value = public[name]
        rule = any(value is s for s in STRATEGIES.values())
        assert not rule or name.endswith("Cell"), name
        if inspect.isfunction(value):
            made = str(inspect.signature(value).return_annotation)
            assert made not in ("Estimator", "Evolution", "Solve"), name


@cache
def source(name: str) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(OBJECTS[name])))


def raises(name: str) -> bool:
    """Whether it raises, by itself or by a check of the core's, or is a strategy."""
    if name in STRATEGIES:
        return bool(dataclasses.fields(STRATEGIES[name]))
    checks = {"close", "convert", "as_state", "check_like"}
    return any(
        isinstance(node, ast.Raise)
        or (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in checks
        )
        for node in ast.walk(source(name))
    )


@objects
def test_public_names_are_documented(name):
    """What it is, an example, the errors it raises, and the source it is from."""
    value, doc = OBJECTS[name], inspect.getdoc(OBJECTS[name])
    assert len(doc.splitlines()[0]) > 10
    if name in FUNCTIONS or name in STRATEGIES:
        assert "Example:\n  >>> " in doc
        assert re.search(r"^References:|Source|source", doc, re.M)
    if raises(name) and (name in FUNCTIONS or name in STRATEGIES):
        assert re.search(r"^Raises:", doc, re.M)
    if name in FUNCTIONS:
        assert "\nReturns:\n" in doc
        if inspect.signature(value).parameters:
            assert "\nArgs:\n" in doc
    described = set()
    if name in FUNCTIONS:
        described = set(inspect.signature(value).parameters)
    elif dataclasses.is_dataclass(value):
        described = {field.name for field in dataclasses.fields(value)}
    elif hasattr(value, "_fields"):
        described = set(value._fields)
    for part in described:
        assert re.search(rf"^  \*{{0,2}}{part}(, \w+)*: |, {part}: ", doc, re.M), part


@functions
def test_functions_say_shapes(name):
    """Words for what goes in and comes out."""
    words = (
        r"pytree|scalar|shape|arrays?\b|axis|axes|function|``\(|of a step|number|key"
    )
    assert re.search(words, inspect.getdoc(FUNCTIONS[name]))


ORDER = ["key", "f", "params", "inputs"]


@functions
def test_functions_are_annotated_and_ordered(name):
    """Everything public is annotated; arguments come as key, f, params, inputs."""
    signature = inspect.signature(FUNCTIONS[name])
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter
    # A cell is a step function that shows its nodes.
    names = ["f" if n == "cell" else n for n in signature.parameters]
    taken = [n for n in names if n in ORDER]
    assert taken == sorted(taken, key=ORDER.index) == names[: len(taken)]


@objects
def test_no_annotation_is_any(name):
    """``PyTree`` is the only word for what may be anything."""
    for node in ast.walk(source(name)):
        if isinstance(node, ast.FunctionDef):
            if node.name.startswith("_") and node.name not in ("__init__", "__call__"):
                continue
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            annotations = [a.annotation for a in every] + [node.returns]
        elif isinstance(node, ast.AnnAssign):
            annotations = [node.annotation]
        else:
            continue
        for annotation in filter(None, annotations):
            names = {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}
            assert "Any" not in names, ast.unparse(node).splitlines()[0]


# What to give where an option has no default.
GIVEN = {
    "apply": jnp.tanh,
    "inverse": jnp.arctanh,
    "num_samples": 4,
    "sigma": 1e-3,
    "decay": 0.5,
    "slots": 8,
    "lattice": (4,),
    "first": lambda params, inputs, b: b,
    "second": lambda params, inputs, a: a,
    "force": lambda params, inputs, q: -q,
    "dt": 0.1,
    "size": 4,
    "cell": rbpjax.unitary.DenseCell(size=4),
    "fading": 2,
    "kernel": lambda params: params[None],
    "features": lambda x, h: h,
    "activate": lambda z, h: jnp.tanh(z[0]),
    "cells": (
        online.ElementwiseCell(
            kernel=lambda params: params[None],
            features=lambda x: x,
            activate=lambda own, z, h: h + z[0],
        ),
    ),
    "between": (),
}


def example(cls: type):
    """An instance, made by names alone."""
    missing = [f.name for f in dataclasses.fields(cls) if no_default(f)]
    assert set(missing) <= set(GIVEN), "say in GIVEN what to give"
    return cls(**{name: GIVEN[name] for name in missing})


def no_default(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


@strategies
def test_strategies_are_values(name):
    """Frozen, hashable, equal by value, without leaves, printed as they were made."""
    made = example(STRATEGIES[name])
    copy = dataclasses.replace(made)
    assert copy is not made and copy == made and hash(copy) == hash(made)
    assert jax.tree.leaves(made) == []
    scope: dict = {}
    for module in MODULES.values():
        scope |= vars(module)
    if "<" not in repr(made):  # functions do not print as they were written
        assert eval(repr(made), scope) == made
    fields = dataclasses.fields(made)
    if fields:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, fields[0].name, getattr(made, fields[0].name))


@strategies
def test_strategies_take_names_only(name):
    """Too many values without a name are a TypeError that says the names."""
    cls = STRATEGIES[name]
    fields = dataclasses.fields(cls)
    assert sum(not f.kw_only for f in fields) <= 1, "a strategy in a strategy, at most"
    with pytest.raises(TypeError, match=fields[0].name if fields else None):
        cls(*[3] * (len(fields) + 1))
    for field in fields:
        assert field.metadata.get("meaning"), f"{field.name} has no specifier"


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return done.stdout.strip()


def test_import_is_light():
    """``import rbpjax`` loads nothing that a room needs, plots, saves or tests."""
    heavy = {"flax", "optax", "chex", "matplotlib", "orbax", "sklearn", "pooch", "tqdm"}
    code = (
        "import sys, jax; before = set(sys.modules); import rbpjax; "
        f"print(sorted({heavy} & (set(sys.modules) - before)))"
    )
    assert run(code) == "[]"


def test_rooms_are_there_after_one_import():
    """All of them, and flax only with nn."""
    code = """
import sys, rbpjax
rooms = (rbpjax.online, rbpjax.perturb, rbpjax.unitary, rbpjax.diagnostics)
names = [room.__name__ for room in (*rooms, rbpjax.regularizers)]
before = "flax" in sys.modules
rbpjax.nn.FixedPoint
print(names, before, "flax" in sys.modules, set(rbpjax.__all__) <= set(dir(rbpjax)))
"""
    rooms = ["online", "perturb", "unitary", "diagnostics", "regularizers"]
    assert run(code) == f"{[f'rbpjax.{room}' for room in rooms]} False True True"


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'hoisting'"):
        _ = rbpjax.hoisting
