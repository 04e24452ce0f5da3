"""Strategies: value objects whose options are given by name and checked when made."""

import dataclasses
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest

import rbpjax
from rbpjax import GMRES, RBP, CGNormal, FixedPointIteration, Neumann, Newton, Solution
from rbpjax._core import strategy as specifiers
from rbpjax._core.strategy import REQUIRED, count, real, strategy, switch, tolerance
from tests.support.problems import PROBLEMS, RULES, readout

STRATEGIES = {
    **{name: rule for name, rule in RULES.items() if dataclasses.is_dataclass(rule)},
    "forward": FixedPointIteration(),
    "forward_steps": FixedPointIteration(steps=3),
    "forward_all": FixedPointIteration(max_steps=7, tol=1e-3, damping=0.25),
    "forward_anderson": rbpjax.Anderson(),
    "forward_broyden": rbpjax.Broyden(memory=4),
    "forward_rre": rbpjax.RRE(),
    "hybrid": rbpjax.Hybrid(),
    "newton": Newton(),
    "newton_nested": Newton(CGNormal(tol=1e-3), max_steps=7, tol=1e-4, warmup=2),
    "cg": rbpjax.CG(),
    "jfb": rbpjax.JFB(),
    "phantom": rbpjax.Phantom(steps=7),
    "cg_ridge": CGNormal(ridge=1e-5),
    "rbp_nested": RBP(FixedPointIteration(steps=2), seed=3),
}
strategies = pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
# A rule, a rule with a solver in it, and a solver; the others are in the long form.
few = pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            make,
            id=name,
            marks=[]
            if name in ("neumann", "rbp_nested", "forward")
            else pytest.mark.full,
        )
        for name, make in STRATEGIES.items()
    ],
)
FORWARD = (
    FixedPointIteration,
    rbpjax.Anderson,
    rbpjax.Broyden,
    rbpjax.RRE,
    rbpjax.Hybrid,
    Newton,
)


def test_every_public_strategy_is_in_the_table():
    """A new strategy must join STRATEGIES, and so the tests below."""
    public = {
        value
        for name in rbpjax.__all__
        if dataclasses.is_dataclass(value := getattr(rbpjax, name))
    }
    assert public == {type(s) for s in STRATEGIES.values()}


@strategies
def test_strategies_are_values(make):
    """Equal by value, hashable, printed as they were written, frozen, no leaves."""
    copy = dataclasses.replace(make)
    assert copy is not make and copy == make and hash(copy) == hash(make)
    assert eval(repr(make), vars(rbpjax)) == make
    assert jax.tree.leaves(make) == []
    assert jax.tree.structure(make) == jax.tree.structure(copy)
    field = next((field.name for field in dataclasses.fields(make)), "steps")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(make, field, None)


def test_different_strategies_are_different_keys():
    """No two rows of the table are equal, not even across classes."""
    assert len(set(STRATEGIES.values())) == len(STRATEGIES)
    assert Neumann(steps=20) != FixedPointIteration(steps=20)
    assert CGNormal(max_steps=20) != Neumann(max_steps=20)


def test_printed_as_written():
    """What has its default value is left out."""
    assert repr(Neumann()) == "Neumann()"
    assert repr(Neumann(steps=3, damping=0.5)) == "Neumann(steps=3, damping=0.5)"
    nested = "RBP(solver=Anderson(memory=3), seed=1)"
    assert repr(RBP(rbpjax.Anderson(memory=3), seed=1)) == nested


@few
def test_strategies_pass_through_jit_as_arguments(make):
    """A strategy is an argument of a jitted function like any other."""
    problem = PROBLEMS["linear"]
    slot = "forward" if isinstance(make, FORWARD) else "backward"

    @jax.jit
    def loss(strategy, w):
        solve = rbpjax.rbp_solve(problem.f, **{slot: strategy})
        return readout(solve(w, problem.inputs, problem.h0).value)

    closed_over = jax.jit(lambda w: loss(make, w))(problem.params)
    chex.assert_trees_all_equal(loss(make, problem.params), closed_over)


@strategies
def test_protocols_are_obeyed_by_all_strategies(make):
    """Every strategy returns a Solution: the state, and scalars of one kind each."""
    vector = {"a": jnp.ones(2), "b": jnp.ones((1, 3))}
    half = lambda v: jax.tree.map(lambda x: 0.5 * x, v)
    shift = lambda v: jax.tree.map(lambda x: 0.5 * x + 1, v)
    step = shift if isinstance(make, FORWARD) else half
    solution = jax.eval_shape(partial(make, step), vector)
    assert isinstance(solution, Solution)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        solution.value, jax.eval_shape(lambda v: v, vector)
    )
    kinds = {
        "num_steps": jnp.int32,
        "num_products": jnp.int32,
        "residual": jnp.float64,
        "status": jnp.int32,
        "converged": jnp.bool,
    }
    assert set(kinds) == set(Solution._fields) - {"value", "aux"}
    assert solution.aux is None
    for name, dtype in kinds.items():
        field = getattr(solution, name)
        assert (field.shape, field.dtype) == ((), dtype), name


# --- options by name -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rbpjax.Adaptive(400), "Adaptive(tol=…, max_steps=…, patience=…)"),
        (lambda: rbpjax.Adaptive(400), "got Adaptive(400)"),
        (lambda: Neumann(20), "Neumann(tol=…, max_steps=…, steps=…, damping=…"),
        (lambda: rbpjax.Anderson(5, 100), "got Anderson(5, 100)"),
        (lambda: RBP(FixedPointIteration(), 3), "RBP(solver=…, seed=…)"),
        (lambda: Newton(GMRES(), 1e-3), "Newton(backward=…, tol=…, max_steps=…"),
        (lambda: Neumann(toll=1e-3), "toll"),
    ],
)
def test_a_value_without_a_name_is_a_type_error(make, message):
    """It says which options there are, and what was written."""
    with pytest.raises(TypeError, match=re.escape(message)):
        make()


def test_a_strategy_in_a_strategy_needs_no_name():
    assert RBP(rbpjax.Anderson()) == RBP(solver=rbpjax.Anderson())
    assert Newton(GMRES()) == Newton(backward=GMRES())


def test_tolerance_and_budget_come_first():
    """One order everywhere: a strategy within, tol, max_steps, then their own."""
    for cls in {type(make) for make in STRATEGIES.values()}:
        names = [f.name for f in dataclasses.fields(cls) if f.kw_only]
        common = [n for n in ("tol", "max_steps") if n in names]
        assert names[: len(common)] == common, cls


# --- what the specifiers refuse ------------------------------------------------------


@strategy
class Sample:
    """An option of each kind."""

    tol: float | None = tolerance(default=None)
    steps: int | None = count(default=None, minimum=2, excludes="tol")
    share: float = real(default=0.5, above=0.0, below=1.0)
    flag: bool = switch(default=False)
    size: int = count(default=REQUIRED)


@pytest.mark.parametrize("tol", [0, 0.0, 1e-300, 0.999, None])
def test_tolerances_may_be(tol):
    """In [0, 1), or the default."""
    assert Sample(tol=tol, size=1).tol == tol


REFUSED = {
    "tol_one": ({"tol": 1.0}, "`tol` must be a relative tolerance.*[0, 1).*got 1.0"),
    "tol_large": ({"tol": 400}, "`tol`.*[0, 1).*got 400"),
    "tol_negative": ({"tol": -1e-3}, "`tol`.*got -0.001"),
    "tol_nan": ({"tol": float("nan")}, "`tol`.*got nan"),
    "tol_bool": ({"tol": False}, "`tol`.*got False"),
    "tol_text": ({"tol": "1e-3"}, "`tol`.*got '1e-3'"),
    "count_small": ({"steps": 1}, "`steps` must be a Python int of at least 2; got 1"),
    "count_float": ({"steps": 3.0}, "`steps`.*got 3.0"),
    "count_bool": ({"size": True}, "`size`.*at least 1; got True"),
    "count_none": ({"size": None}, "`size`.*got None"),
    "real_low": ({"share": 0.0}, "`share` must be.*(0.0, 1.0).*got 0.0"),
    "real_high": ({"share": 1.0}, "`share`.*(0.0, 1.0).*got 1.0"),
    "real_none": ({"share": None}, "`share`.*got None"),
    "switch": ({"flag": 1}, "`flag` must be True or False; got 1"),
    "both": (
        {"tol": 0.1, "steps": 3},
        "give `steps` or `tol`, not both; got steps=3, tol=0.1",
    ),
    "array": ({"share": jnp.array(0.5)}, "`share`.*Array.*cannot be options"),
    "numpy": ({"size": jnp.int32(3)}, "`size`.*cannot be options"),
}


@pytest.mark.parametrize(("options", "pattern"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(options, pattern):
    """ValueError with the class, the option, what it may be, and the value."""
    parts = map(re.escape, pattern.split(".*"))
    with pytest.raises(ValueError, match="Sample: .*" + ".*".join(parts)):
        Sample(**{"size": 1} | options)


def test_what_has_no_default_must_be_given():
    with pytest.raises(TypeError, match="size"):
        Sample(tol=0.1)


def test_a_field_without_a_specifier_is_refused():
    """Nothing is an option that nothing checks."""

    @strategy
    class Loose:
        size: int = 3

    with pytest.raises(TypeError, match=r"Loose.size has no specifier.*count\(\)"):
        Loose()


def test_a_check_of_several_fields_comes_after_the_single_ones():
    """``__post_init__`` sees only values that passed."""
    seen = []

    @strategy
    class Pair:
        low: int = count(default=1)
        high: int = count(default=2)

        def __post_init__(self):
            seen.append((self.low, self.high))
            if self.low > self.high:
                raise ValueError("Pair: `low` above `high`")

    Pair()
    with pytest.raises(ValueError, match="`low` must be a Python int"):
        Pair(low="a")
    with pytest.raises(ValueError, match="above"):
        Pair(low=3)
    assert seen == [(1, 2), (3, 2)]


def test_specifiers_say_their_ranges():
    """In words, as the messages have them."""
    words = lambda field: field.metadata["meaning"]
    assert words(real()) == "a Python number in [0.0, inf)"
    assert words(real(maximum=1.0)) == "a Python number in [0.0, 1.0]"
    assert words(real(above=0.0)) == "a Python number in (0.0, inf)"
    assert words(count(minimum=0)) == "a Python int of at least 0"
    called = specifiers.function(meaning="a norm", call="norm(x) -> scalar")
    assert words(called) == "a norm, called as norm(x) -> scalar"
