"""JFB and phantom gradients against their definitions, written out step by step."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest

import rbpjax
from rbpjax import JFB, FixedPointIteration, Neumann, Newton, Phantom, unrolled_phantom
from tests.support.problems import (
    EXPANSIVE,
    IDENTITY_RTOL,
    PROBLEMS,
    XS,
    W,
    assert_close,
    dense_gradient,
    fixed_point,
    readout,
    rows,
    tanh_step,
)

ALL = PROBLEMS | {"expansive": EXPANSIVE}
problems = pytest.mark.parametrize(
    "problem", rows(ALL, ("tanh_rnn", "pytree", "expansive"))
)
shapes = pytest.mark.parametrize(("k", "tau"), [(1, 1.0), (1, 0.5), (3, 0.7), (6, 0.3)])


def by_hand(problem, h, k, tau):
    """Loss and gradient of k damped steps from h, which is a constant."""

    def loss(params, inputs):
        now = jax.lax.stop_gradient(h)
        for _ in range(k):
            image = problem.f(params, inputs, now)
            now = jax.tree.map(lambda u, v: tau * u + (1 - tau) * v, image, now)
        return readout(now)

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(problem.params, problem.inputs)


def gradient(solve, problem):
    loss = lambda params, inputs: readout(solve(params, inputs, problem.h0).value)
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(problem.params, problem.inputs)


def at_rest(problem, rule):
    """A solve whose state is h* to the last digit, ρ(J) > 1 included."""
    exact = Newton(rbpjax.Direct(), tol=1e-14)
    return rbpjax.rbp_solve(problem.f, forward=exact, backward=rule)


@problems
def test_jfb_is_the_gradient_of_one_step(problem):
    """From h* as a constant; the same as no product of the series."""
    _, want = by_hand(problem, fixed_point(problem), 1, 1.0)
    _, got = gradient(at_rest(problem, JFB()), problem)
    assert_close(got, want, IDENTITY_RTOL)
    _, same = gradient(at_rest(problem, Neumann(steps=0)), problem)
    chex.assert_trees_all_equal(got, same)


@shapes
@problems
def test_the_rule_is_the_gradient_of_damped_steps_at_rest(problem, k, tau):
    """All k of them at h*; the unrolled form is the same there."""
    want = by_hand(problem, fixed_point(problem), k, tau)
    rule = Phantom(steps=k, damping=1 - tau)
    _, got = gradient(at_rest(problem, rule), problem)
    assert_close(got, want[1], 1e-9)
    exact = Newton(rbpjax.Direct(), tol=1e-14)
    solve = unrolled_phantom(problem.f, k, damping=1 - tau, forward=exact)
    value, unrolled = gradient(solve, problem)
    chex.assert_trees_all_close(value, want[0], rtol=1e-10)
    assert_close(unrolled, want[1], 1e-9)


@shapes
@problems
def test_the_unrolled_form_moves_with_the_state(problem, k, tau):
    """After two plain steps, far from h*: value and gradient of the steps that follow.

    The rule, whose steps stand still, says something else there, but for one step.
    """
    h = problem.h0
    for _ in range(2):
        h = problem.f(problem.params, problem.inputs, h)
    want = by_hand(problem, h, k, tau)
    two = FixedPointIteration(steps=2)
    solve = unrolled_phantom(problem.f, k, damping=1 - tau, forward=two)
    got = gradient(solve, problem)
    chex.assert_trees_all_close(got[0], want[0], rtol=1e-12)
    assert_close(got[1], want[1], IDENTITY_RTOL)
    found = jax.jit(solve)(problem.params, problem.inputs, problem.h0)
    assert found.num_steps == 2 + k and not found.converged
    step = partial(problem.f, problem.params, problem.inputs)
    again = jax.tree.leaves(jax.tree.map(jnp.subtract, step(found.value), found.value))
    assert found.residual > 1e-6 and max(jnp.abs(u).max() for u in again) > 1e-6


def test_many_terms_are_the_whole_gradient_where_plain_terms_diverge():
    """ρ(J) = 1.5 with eigenvalues to the left of 1: τ = 0.3 brings them to 0.83."""
    want = dense_gradient(EXPANSIVE)
    _, got = gradient(at_rest(EXPANSIVE, Phantom(steps=200, damping=0.7)), EXPANSIVE)
    assert_close(got, want, 1e-9)
    few = [
        gradient(at_rest(EXPANSIVE, Phantom(steps=k, damping=0.7)), EXPANSIVE)[1]
        for k in (20, 40)
    ]
    error = [
        sum(jnp.sum((a - b) ** 2) for a, b in zip(g, want, strict=True)) ** 0.5
        for g in few
    ]
    assert error[1] < 0.9**20 * error[0]


def test_reports_and_starts():
    """Truncated, with the residual that is left; a start is gone on from."""
    jac = jnp.array([[0.2, 0.5], [-0.4, 0.3]])
    vjp, g = lambda v: jac.T @ v, jnp.array([1.0, 2.0])
    z = jnp.linalg.solve(jnp.eye(2) - jac.T, g)
    for rule, steps in ((JFB(), 0), (Phantom(steps=4, damping=0.5), 3)):
        found = rule(vjp, g)
        assert found.status == rbpjax.Status.TRUNCATED and found.num_steps == steps
        left = jnp.linalg.norm(g + vjp(found.value) - found.value)
        chex.assert_trees_all_close(
            found.residual, left / jnp.linalg.norm(g), rtol=1e-12
        )
        assert jnp.linalg.norm(rule(vjp, g, start=z).value - z) < 1e-12
    with pytest.warns(RuntimeWarning, match="truncated"):
        solve = rbpjax.rbp_solve(
            lambda a, x, h: a * h + x, backward=JFB(), on_failure="warn"
        )
        jax.grad(lambda a: solve(a, 1.0, 0.0).value)(-1.5)  # residual 1.5
        jax.effects_barrier()


def test_transformations_and_closures():
    """Jit, vmap, scan; what f closes over has a gradient; h0 and the probe none."""
    solve = unrolled_phantom(tanh_step, 3)
    loss = lambda w, x: readout(solve(w, x, jnp.zeros(3)).value)
    alone = jnp.stack([jax.grad(loss)(W, x) for x in XS])
    many = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(W, XS)
    assert_close(many, alone, 1e-12)
    total = lambda w: jax.lax.scan(lambda s, x: (s + loss(w, x), None), 0.0, XS)[0]
    assert_close(jax.jit(jax.grad(total))(W), alone.sum(0), 1e-12)

    def closed(w):
        solve = unrolled_phantom(lambda _, x, h: tanh_step(w, x, h), 3, has_aux=False)
        return readout(solve(None, XS[0], jnp.zeros(3)).value)

    assert_close(jax.jit(jax.grad(closed))(W), alone[0], 1e-12)
    assert_close(jax.jit(jax.jacfwd(closed))(W), alone[0], 1e-12)
    probe = rbpjax.AdjointReport.zeros()
    bars = jax.grad(lambda h, p: readout(solve(W, XS[0], h, p).value), (0, 1))(
        jnp.ones(3), probe
    )
    chex.assert_trees_all_equal(bars, jax.tree.map(jnp.zeros_like, bars))
    with_aux = unrolled_phantom(lambda a, x, h: (a * h + x, 3 * h), 2, has_aux=True)
    assert jnp.allclose(with_aux(0.5, 1.0, 0.0).aux, 6.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 0}, "`num_steps`.*at least 1.*got 0"),
        ({"damping": 1.0}, r"`damping`.*\[0, 1\).*got 1.0"),
        ({"damping": "half"}, "`damping`.*got 'half'"),
        ({"forward": JFB()}, r"JFB\(\) is a backward rule"),
    ],
)
def test_options_out_of_range(options, words):
    """A ValueError with the name, the value and the range."""
    with pytest.raises(ValueError, match=words):
        unrolled_phantom(tanh_step, **options)(W, XS[0], jnp.zeros(3))
    with pytest.raises(ValueError, match=r"`steps`.*at least 1.*got 0"):
        Phantom(steps=0)
