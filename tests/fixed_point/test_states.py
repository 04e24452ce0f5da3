"""States at given numbers of steps, and the gradient that each of them has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import Adaptive, AdjointReport, Neumann, rbp_states

W = jnp.array([[0.3, -0.8], [0.8, 0.3]]) * 0.7
X, H = jnp.array([0.4, -0.2]), jnp.array([1.0, 0.0])
AT = (0, 1, 4, 60)
WEIGHTS = jnp.array([0.3, -1.0, 0.5, 2.0])


def f(w, x, h):
    return {"h": jnp.tanh(w @ h["h"] + x)}


def walk():
    """The states by a Python loop."""
    h, states = {"h": H}, []
    for k in range(AT[-1] + 1):
        states += [h["h"]] if k in AT else []
        h = f(W, X, h)
    return states


def loss_of(solve, weights=WEIGHTS):
    return lambda w, probe=None: jnp.sum(
        weights * jnp.sum(solve(w, X, {"h": H}, probe).value["h"] ** 2, -1)
    )


@pytest.mark.parametrize("at", [AT, np.array(AT), jnp.array(AT)])
def test_states_are_those_of_the_loop(at):
    found = jax.jit(lambda w: rbp_states(f, at)(w, X, {"h": H}))(W)
    np.testing.assert_allclose(found.value["h"], walk(), rtol=1e-12)
    assert found.num_steps.tolist() == list(AT)
    residuals = [jnp.linalg.norm(f(W, X, {"h": h})["h"] - h) for h in walk()]
    assert (jnp.argsort(found.residual) == jnp.argsort(jnp.array(residuals))).all()
    assert found.converged.tolist() == [False, False, False, True]


def test_numbers_may_be_traced():
    """One compilation for all of them."""
    run = jax.jit(lambda at: rbp_states(f, at)(W, X, {"h": H}).value["h"])
    np.testing.assert_allclose(run(jnp.array(AT)), walk(), rtol=1e-12)
    assert run(jnp.array([0, 1, 2, 3])).shape == (4, 2) and run._cache_size() == 1


def test_each_state_has_the_gradient_of_a_fixed_point_there():
    """By a dense solve at each state, weighted and added up; a report for each."""
    solve = rbp_states(f, AT, backward=Adaptive(tol=1e-12))
    want = 0
    for weight, h in zip(WEIGHTS, walk(), strict=True):
        g = lambda w, h: f(w, X, {"h": h})["h"]
        jac = jax.jacobian(g, 1)(W, h)
        z = jnp.linalg.solve(jnp.eye(2) - jac.T, 2 * weight * h)
        want += jax.vjp(lambda w, h=h, g=g: g(w, h), W)[1](z)[0]
    with_report = rbpjax.value_and_grad_with_report(loss_of(solve))
    _, got, report = jax.jit(with_report)(W, probe=AdjointReport.zeros((4,)))
    np.testing.assert_allclose(got, want, rtol=1e-9)
    assert report.num_steps.shape == (4,) and (report.num_steps > 0).all()


def test_the_last_state_has_bptts_gradient_and_truncation_is_the_rules():
    """At the fixed point: Neumann(steps=K) is BPTT through K + 1 steps."""
    last = jnp.array([0.0, 0.0, 0.0, 1.0])
    for steps in (0, 3):
        solve = rbp_states(f, AT, backward=Neumann(steps=steps))
        loop = rbpjax.bptt(f, AT[-1], truncation=steps + 1)
        of = lambda w, loop=loop: jnp.sum(loop(w, X, {"h": H}).value["h"] ** 2)
        got, want = jax.grad(loss_of(solve, last))(W), jax.grad(of)(W)
        np.testing.assert_allclose(got, want, rtol=1e-7)


@pytest.mark.parametrize("at", [(), 3, (1.0, 2.0), (3, 3), (4, 2), (-1, 2), ((1,),)])
def test_other_numbers_are_refused(at):
    with pytest.raises(ValueError, match=r"`at` must be increasing integers.*got"):
        rbp_states(f, at)
