"""Broyden's method against dense updates, and its inverse shared with the rule."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import JFB, Adaptive, AdjointReport, Broyden, Direct, Neumann
from rbpjax._core.low_rank import LowRank
from tests.support.families import FAMILIES
from tests.support.problems import (
    PROBLEMS,
    XS,
    W,
    assert_close,
    dense_gradient,
    readout,
    rows,
    tanh_step,
)

N = 6


def affine(seed=0, scale=2.4):
    """A non-symmetric J with ρ(J) > 1, and x."""
    random = np.random.default_rng(seed)
    jac = scale * random.normal(size=(N, N)) / N**0.5
    return jac, random.normal(size=N)


def dense_iterates(step, h, num, memory, least=0.1):
    """Broyden's good method by a dense H, begun anew after ``memory`` updates."""
    inverse, updates, d, before = np.eye(len(h)), 0, None, None
    made = [h]
    for _ in range(num):
        r = step(h) - h
        if d is not None:
            y = before - r
            if updates == memory:
                inverse, updates = np.eye(len(h)), 0
            seen = d @ inverse @ y / (d @ d)
            if abs(seen) < least:  # Powell: a change in between
                part = (1 - np.copysign(least, seen)) / (1 - seen)
                y = part * y + (1 - part) * np.linalg.solve(inverse, d)
            change = np.outer(d - inverse @ y, d @ inverse)
            inverse = inverse + change / (d @ inverse @ y)
            updates += 1
        d, before = inverse @ r, r
        h = h + d
        made.append(h)
    return made


@pytest.mark.parametrize("memory", [2, 4, 20])
def test_iterates_are_those_of_dense_updates(memory):
    """For a nonlinear map, restarts and a shortened update included.

    Where the k-th residual is the best so far, max_steps=k returns that iterate.
    """
    jac, x = affine(scale=0.9)
    dense = dense_iterates(lambda h: np.tanh(jac @ h + x), np.zeros(N), 9, memory)
    step = lambda h: jnp.tanh(jnp.asarray(jac) @ h + x)
    compared = 0
    for k in range(1, 9):
        found = Broyden(max_steps=k, memory=memory, tol=0.0)(step, jnp.zeros(N))
        if found.num_steps == k:
            compared += 1
            chex.assert_trees_all_close(found.value, dense[k], rtol=0, atol=1e-10)
    assert compared >= 4


def test_an_affine_map_takes_two_steps_a_number():
    """2n, and one, with a memory as long (Gay 1979), also for ρ(J) > 1."""
    jac, x = affine()
    assert np.abs(np.linalg.eigvals(jac)).max() > 1
    want = np.linalg.solve(np.eye(N) - jac, x)
    step = lambda h: jnp.asarray(jac) @ h + x
    found = Broyden(memory=2 * N, tol=1e-9)(step, jnp.zeros(N))
    assert found.converged and found.num_steps <= 2 * N + 1
    assert_close(found.value, want, 1e-8)
    for size in (1e-30, 1e30):  # of no magnitude
        step = lambda h, size=size: jnp.asarray(jac) @ h + size * x
        other = Broyden(memory=2 * N)(step, jnp.zeros(N))
        assert other.converged and other.num_steps <= 2 * N + 1
        assert_close(other.value / size, want, 1e-8)


def test_a_low_rank_map_and_its_transpose():
    """Against the matrix that it is."""
    random = np.random.default_rng(3)
    u, w, v = (jnp.asarray(random.normal(size=s)) for s in ((2, N), (2, N), N))
    made = LowRank.identity(3, v).put(0, u[0], w[0]).put(2, u[1], w[1])
    matrix = jnp.eye(N) + u.T @ w
    chex.assert_trees_all_close(made.apply(v), matrix @ v, rtol=1e-12)
    chex.assert_trees_all_close(made.transposed(v), matrix.T @ v, rtol=1e-12)


def test_a_vanishing_denominator():
    """No change of h - f(h), or one at a right angle to the step: finite, or right."""
    flat = Broyden()(lambda h: h + 1.0, jnp.zeros(2))  # y = 0: I - J = 0
    assert not flat.converged and jnp.isfinite(flat.value).all()
    turn = Broyden()(lambda h: jnp.array([-h[1], h[0]]) + 1.0, jnp.zeros(2))
    assert turn.converged
    chex.assert_trees_all_close(turn.value, jnp.array([0.0, 1.0]), atol=1e-9)


@pytest.mark.parametrize("a", [1.05, 0.95])
def test_a_short_update_keeps_the_sign(a):
    """Of h ← ah the denominator is 1 - a = ∓0.05: H is ∓10 after it, not ∓20."""
    found = Broyden(max_steps=2, tol=0.0)(lambda h: a * h, jnp.ones(1))
    want = dense_iterates(lambda h: a * h, np.ones(1), 2, 10)[2]
    assert found.num_steps == 2
    chex.assert_trees_all_close(found.value, want, rtol=1e-12)
    r = (a - 1) * a
    chex.assert_trees_all_close(want[0], a + np.sign(1 - a) * 10 * r, rtol=1e-12)


def shared(problem, rule, share, probe=None):
    """Gradient and report."""
    forward = Broyden(tol=1e-13, memory=30, share=share)
    solve = rbpjax.rbp_solve(problem.f, forward=forward, backward=rule)
    loss = lambda p, x, probe: readout(solve(p, x, problem.h0, probe).value)
    probe = AdjointReport.zeros() if probe is None else probe
    *got, report = jax.jit(jax.grad(loss, (0, 1, 2)))(
        problem.params, problem.inputs, probe
    )
    return got, report


@pytest.mark.parametrize("problem", rows(PROBLEMS, ("pytree",)))
@pytest.mark.parametrize("rule", [Adaptive(tol=1e-12), Direct()], ids=repr)
def test_sharing_changes_no_exact_gradient(problem, rule):
    """Against the dense solve: a rule meets its tolerance from Hᵀg, too."""
    got, report = shared(problem, rule, True)
    assert_close(tuple(got), dense_gradient(problem), 1e-8)
    assert report.converged == 1


def orthogonal():
    w = FAMILIES["0.95 × orthogonal"](np.random.default_rng(1), 20)
    x = 0.3 * np.random.default_rng(2).normal(size=20)
    f = lambda w, x, h: jnp.tanh(w @ h + x)
    return PROBLEMS["linear"]._replace(
        f=f, params=jnp.asarray(w), inputs=jnp.asarray(x), h0=jnp.zeros(20)
    )


def test_sharing_brings_a_truncated_rule_nearer():
    """From Hᵀg one term leaves three quarters of what it leaves from none."""
    problem = orthogonal()
    want = dense_gradient(problem)[0]
    error = {}
    for share in (False, True):
        (got, _), report = shared(problem, JFB(), share)
        error[share] = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        assert report.num_products == (3 if share else 1) - 1 * share
    assert error[True] < 0.75 * error[False]


def test_the_rule_starts_from_the_transpose():
    """A rule that returns its start gives Hᵀg, with the H of the solver itself."""
    jac, x = affine(scale=0.9)
    f = lambda w, x, h: jnp.tanh(w @ h + x)
    forward = Broyden(tol=1e-10, share=True)
    found = forward(lambda h: f(jnp.asarray(jac), x, h), jnp.zeros(N))
    matrix = jax.vmap(found.aux.apply)(jnp.eye(N)).T
    assert jnp.abs(matrix - matrix.T).max() > 0.1
    given = []

    def own(vjp, cotangent, *, start=None):
        given.append((cotangent, start))
        return rbpjax.Solution(value=start, converged=True)

    solve = rbpjax.rbp_solve(f, forward=forward, backward=own)
    jax.vjp(lambda w: readout(solve(w, x, jnp.zeros(N)).value), jnp.asarray(jac))[1](
        1.0
    )
    g, start = given[-1]
    assert_close(start, matrix.T @ g, 1e-10)


def test_the_start_is_the_inverse_of_the_forward_pass():
    """Of an affine map of one number H is exact after one update: nothing is left."""
    problem = PROBLEMS["linear"]._replace(
        f=lambda a, x, h: a * h + x,
        params=jnp.array(-3.0),
        inputs=jnp.array([1.0]),
        h0=jnp.zeros(1),
    )
    got, report = shared(problem, JFB(), True)
    assert report.residual < 1e-14
    h = 1 / 4
    chex.assert_trees_all_close(got[0], jnp.cos(h) * h / 4, rtol=1e-12)
    # A probe's adjoint goes before it; a wrong one leaves something.
    _, report = shared(
        orthogonal(), JFB(), True, AdjointReport.zeros(adjoint=jnp.ones(20))
    )
    assert report.residual > 0.1


@pytest.mark.full
def test_sharing_composes():
    """Jit, vmap with probes, the second order, batch_axis; nothing comes out of it."""
    forward = Broyden(tol=1e-13, share=True)
    solve = rbpjax.rbp_solve(tanh_step, forward=forward, backward=Adaptive(tol=1e-12))
    loss = lambda w, x, probe=None: readout(solve(w, x, jnp.zeros(3), probe).value)
    plain = rbpjax.rbp_solve(tanh_step, backward=Direct())
    want = lambda w, x: readout(plain(w, x, jnp.zeros(3)).value)
    assert solve(W, XS[0], jnp.zeros(3)).aux is None
    probes = AdjointReport.zeros((len(XS),))
    got, reports = jax.jit(jax.vmap(jax.grad(loss, (0, 2)), (None, 0, 0)))(
        W, XS, probes
    )
    assert_close(got, jax.vmap(jax.grad(want), (None, 0))(W, XS), 1e-8)
    assert (reports.converged == 1).all()
    hessian = lambda loss: jax.jit(jax.jacrev(jax.grad(loss, 1), 1))(W, XS[0])
    assert_close(hessian(loss), hessian(want), 1e-7)
    rows = rbpjax.rbp_solve(tanh_step_rows, forward=forward, batch_axis=0)
    found = rows(W, XS, jnp.zeros((len(XS), 3)))
    assert found.aux is None and found.converged.all()
    root = rbpjax.rbp_root(lambda w, x, h: h - tanh_step(w, x, h), forward=forward)
    assert root(W, XS[0], jnp.zeros(3)).converged


def tanh_step_rows(w, x, h):
    return jnp.tanh(h @ w.T + x)


def test_a_rule_without_a_start_is_refused():
    """By name, and with the line that mends it."""

    def own(vjp, cotangent):
        return Neumann(steps=3)(vjp, cotangent)

    solve = rbpjax.rbp_solve(tanh_step, forward=Broyden(share=True), backward=own)
    with pytest.raises(ValueError, match=r"takes no start.*Broyden\(share=True\)"):
        jax.grad(lambda w: readout(solve(w, XS[0], jnp.zeros(3)).value))(W)


def test_it_goes_on_until_the_tolerance_and_no_further():
    """The first iterate whose residual is within tol, of those of dense updates.

    What ends the solve also asks how far the fixed point may be, so a step or two may
    follow the first residual that is small enough; it never ends before.
    """
    jac, x = affine(scale=0.9)
    step = lambda h: np.tanh(jac @ h + x)
    with np.errstate(invalid="ignore"):  # once it has come to rest
        made = dense_iterates(step, np.zeros(N), 20, memory=20)
    size = lambda h: max(np.linalg.norm(h), np.linalg.norm(step(h)))
    residuals = np.array([np.linalg.norm(step(h) - h) / size(h) for h in made])
    for tol in (1e-2, 1e-4, 1e-8, 1e-11):
        found = Broyden(tol=tol, memory=20)(
            lambda h: jnp.tanh(jac @ h + x), jnp.zeros(N)
        )
        first = int(np.argmax(residuals <= tol))
        assert found.converged and found.residual <= tol
        assert first <= found.num_steps <= first + 2
