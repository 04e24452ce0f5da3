"""``on_failure`` and ``progress``: eagerly, compiled, mapped, forward and backward."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import (
    AdjointReport,
    Anderson,
    CGNormal,
    FixedPointIteration,
    Neumann,
    rbp_fixed_point,
    rbp_root,
    rbp_solve,
)

X, H = jnp.ones(2), jnp.zeros(2)
FEW = FixedPointIteration(max_steps=20)  # enough for a = 0.1, not for a = 0.9


def f(a, x, h):
    return a * h + x


def block(value):
    value = jax.block_until_ready(value)
    jax.effects_barrier()
    return value


TRANSFORMS = {
    "eager": lambda g: g,
    "jit": jax.jit,
    "vmap": lambda g: lambda a: jax.vmap(g)(a[None]),
    "jit of vmap": lambda g: lambda a: jax.jit(jax.vmap(g))(a[None]),
    "scan": lambda g: lambda a: jax.lax.scan(lambda c, b: (c, g(b)), 0, a[None])[1],
}
transforms = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
GOOD, BAD = jnp.array(0.1), jnp.array(0.9)


def forward(on_failure):
    solve = rbp_solve(f, forward=FEW, on_failure=on_failure)
    return lambda a: solve(a, X, H).value


def backward(on_failure, rule=Neumann(max_steps=20)):
    """Only the adjoint fails: the forward solver is exact."""
    exact = lambda step, h0: rbpjax.Anderson()(step, h0)
    solve = rbp_solve(f, forward=exact, backward=rule, on_failure=on_failure)
    return lambda a: jax.grad(lambda a: jnp.sum(solve(a, X, H).value))(a)


BOTH = pytest.mark.parametrize("make", [forward, backward])


@BOTH
@transforms
def test_warn_is_one_line_with_status_residual_and_steps(make, transform):
    """And nothing at all where the solve converged."""
    run = transform(make("warn"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = block(run(GOOD))
    with pytest.warns(RuntimeWarning) as caught:
        bad = block(run(BAD))
    (line,) = [str(w.message) for w in caught]
    assert re.fullmatch(
        rf"rbp_solve, {make.__name__}: out of budget: .* "
        r"\(residual 0\.\d+ after \d+ steps\)",
        line,
    )
    plain = transform(make("ignore"))
    np.testing.assert_array_equal(bad, plain(BAD))
    np.testing.assert_array_equal(good, plain(GOOD))


@BOTH
@transforms
def test_raise(make, transform):
    run = transform(make("raise"))
    block(run(GOOD))
    with pytest.raises(
        (RuntimeError, jax.errors.JaxRuntimeError),
        match=rf"rbp_solve, {make.__name__}: out of budget",
    ):
        block(run(BAD))


@BOTH
@transforms
def test_nan(make, transform):
    """In the failed solve's value alone, and in all gradients through it."""
    run = transform(make("nan"))
    assert jnp.isfinite(run(GOOD)).all() and jnp.isnan(run(BAD)).all()


def test_nan_reaches_gradients_and_spares_neighbours():
    solve = rbp_solve(f, forward=FEW, on_failure="nan")
    loss = lambda a: jnp.sum(solve(a, X, H).value)
    grads = jax.jit(jax.vmap(jax.grad(loss)))(jnp.stack([GOOD, BAD, 2 * GOOD]))
    assert jnp.isfinite(grads).tolist() == [True, False, True]
    want = jax.grad(lambda a: jnp.sum(X / (1 - a)))(GOOD)
    np.testing.assert_allclose(grads[0], want, rtol=1e-8)


def test_a_batch_warns_for_those_that_failed():
    run = jax.jit(jax.vmap(forward("warn")))
    with pytest.warns(RuntimeWarning) as caught:
        block(run(jnp.stack([GOOD, BAD, BAD, GOOD])))
    assert len(caught) == 2


def test_a_truncated_rule_fails_above_a_residual_of_one():
    """Not at 0.9, where the truncation is what was asked for."""
    run = backward("nan", Neumann(steps=3))
    assert jnp.isfinite(run(BAD)).all() and jnp.isnan(run(jnp.array(-1.5))).all()


def test_a_start_is_handed_on():
    """Warm starts work with a rule that speaks; one without is refused."""
    h = X / (1 - GOOD)

    def gradient(rule):
        solve = rbp_solve(f, backward=rule, on_failure="raise")
        probe = AdjointReport.zeros(adjoint=X / (1 - GOOD))
        loss = lambda a, probe: jnp.sum(solve(a, X, h, probe).value)
        return rbpjax.value_and_grad_with_report(loss)(GOOD, probe=probe)

    _, grad, report = gradient(CGNormal())
    np.testing.assert_allclose(grad, jnp.sum(X / (1 - GOOD) ** 2), rtol=1e-9)
    assert report.num_steps == 0
    with pytest.raises(ValueError, match="takes no start"):
        gradient(lambda vjp, g: CGNormal()(vjp, g))


def test_roots_and_other_solvers_speak_too():
    none = lambda a, x, h: h**2 + a
    stuck = lambda a, x, h: h
    for solve in (
        rbp_root(none, on_failure="nan"),
        rbp_root(none, solver=stuck, on_failure="nan"),
        rbp_fixed_point(none, on_failure="nan")(stuck),
    ):
        assert jnp.isnan(solve(1.0, None, X).value).all()


@pytest.mark.parametrize("choice", ["Warn", None, True, "error"])
def test_other_choices_are_refused(choice):
    for make in (rbp_solve, rbp_root, rbp_fixed_point):
        with pytest.raises(ValueError, match=r"`on_failure` must be one of 'ignore'"):
            make(f, on_failure=choice)


@pytest.mark.parametrize("solver", [FixedPointIteration(), Anderson()])
def test_progress_is_a_line_that_counts(solver, capsys):
    """As many evaluations as reported, and a last word, each time."""
    solve = rbp_solve(f, forward=solver, backward=Neumann(tol=1e-9), progress=True)
    loss = lambda a, probe: (lambda s: (jnp.sum(s.value), s))(solve(a, X, H, probe))
    run = jax.jit(rbpjax.value_and_grad_with_report(loss, has_aux=True))
    for _ in range(2):
        (_, solution), _, report = block(run(GOOD))
        shown = capsys.readouterr().out
        last = shown.split("\n")
        assert "forward: converged" in last[0] and "backward: converged" in last[1]
        for what, want in (
            ("evaluations, residual", solution.num_products),
            ("products", report.num_products),
        ):
            lines = [part for part in re.split(r"[\r\n]", shown) if what in part]
            counts = [int(re.search(rf"(\d+) {what}", part)[1]) for part in lines]
            assert counts == list(range(1, int(want) + 1))
            assert {len(part) for part in lines} == {78}


def test_silence_costs_nothing():
    """By default no callback is in the program."""
    program = lambda **o: str(
        jax.make_jaxpr(jax.grad(lambda a: jnp.sum(rbp_solve(f, **o)(a, X, H).value)))(
            GOOD
        )
    )
    assert "callback" not in program() and "callback" not in program(on_failure="nan")
    assert "callback" in program(on_failure="warn")
