"""The bound on a gradient's error, against dense gradients in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from rbpjax import Adaptive, FixedPointIteration, Hybrid, Neumann, Newton
from rbpjax.fixed_point import bound

N = 8


def network(w, x, h):
    return jnp.tanh(w @ h + x)


def dense(w, x, weights, h):
    """The exact gradient of weights · h* for w, by Newton from h and LU."""
    for _ in range(50):
        image, jac = network(w, x, h), jax.jacobian(network, 2)(w, x, h)
        h = h + jnp.linalg.solve(jnp.eye(N) - jac, image - h)
    jac = jax.jacobian(network, 2)(w, x, h)
    z = jnp.linalg.solve(jnp.eye(N) - jac.T, weights)
    return jax.vjp(lambda w: network(w, x, h), w)[1](z)[0]


def draw(seed, gain):
    random = np.random.default_rng(seed)
    w = gain * random.normal(size=(N, N)) / N**0.5
    return jnp.asarray(w), *jnp.asarray(random.normal(size=(2, N)))


SOLVES = {
    "defaults": (Hybrid(), Adaptive()),
    "loose": (FixedPointIteration(tol=1e-2), Adaptive(tol=1e-2)),
    "few steps": (FixedPointIteration(steps=12), Adaptive()),
    "few terms": (Hybrid(), Neumann(steps=3)),
    "loose Newton": (Newton(tol=1e-2), Adaptive(tol=1e-3)),
}


@pytest.mark.parametrize("name", SOLVES)
def test_bounds_hold_within_their_factor_and_decide(name):
    """60 networks: hardly exceeded, not idle, and ``converged`` is the comparison.

    The cotangent is constant, so that the bound covers the whole gradient. An estimate
    is right to a small factor; one that were ten times too large would be of no use.
    """
    forward, backward = SOLVES[name]
    solve = rbpjax.rbp_solve(network, forward=forward, backward=backward)

    def both(w, x, weights):
        def loss(w, probe):
            found = solve(w, x, jnp.zeros(N), probe=probe)
            return weights @ found.value, found.value

        run = rbpjax.value_and_grad_with_report(loss, has_aux=True)
        (_, h), grad, report = run(w)
        right = dense(w, x, weights, h)
        error = jnp.linalg.norm(grad - right) / jnp.linalg.norm(right)
        return error, report

    drawn = [draw(seed, 0.4 + 1.2 * (seed % 10) / 10) for seed in range(60)]
    batch = [jnp.stack(parts) for parts in zip(*drawn, strict=True)]
    error, report = jax.jit(jax.vmap(both))(*batch)
    stated = np.isfinite(report.bound)
    assert np.all(error[stated] <= 3 * report.bound[stated])
    accuracy = float(jnp.finfo(jnp.float64).eps) ** 0.5
    assert np.array_equal(report.converged == 1, report.bound <= accuracy)
    assert not np.any((report.converged == 1) & (error > 10 * accuracy))
    if name == "few steps":  # of a state not at rest nothing is said
        assert not stated.any()
        return
    assert stated.mean() > 0.7
    assert np.median(error[stated] / report.bound[stated]) > 0.1
    assert np.all(report.converged == float(name == "defaults"))


def test_a_failed_forward_solve_is_never_converged():
    """Plain iteration diverges; the adjoint of where it stopped is solved exactly."""
    solve = rbpjax.rbp_solve(
        lambda k, x, h: x - k * h, forward=FixedPointIteration(max_steps=50)
    )
    loss = lambda k, probe: jnp.sum(solve(k, jnp.ones(2), jnp.ones(2), probe).value)
    _, grad, report = rbpjax.value_and_grad_with_report(loss)(jnp.array(5.0))
    assert abs(grad + 2 / 36) > 1
    assert report.status == 0 and report.forward_status != 0
    assert report.converged == 0 and jnp.isinf(report.bound)


def test_the_report_covers_both_solves():
    """Steps, products and residual of the forward solve are those of its solution."""
    w, x, weights = draw(0, 0.7)
    solve = jax.jit(rbpjax.rbp_solve(network))
    alone = solve(w, x, jnp.zeros(N))
    loss = lambda w, probe: weights @ solve(w, x, jnp.zeros(N), probe).value
    _, _, report = jax.jit(rbpjax.value_and_grad_with_report(loss))(w)
    assert int(report.forward_steps) == int(alone.num_steps)
    assert int(report.forward_products) == int(alone.num_products)
    assert report.forward_residual == pytest.approx(float(alone.residual), rel=1e-6)
    assert int(report.forward_status) == int(alone.status) == 0
    assert report.converged == 1 and 0 < report.bound < 1e-8


def test_a_loss_without_a_gradient_has_a_bound_of_zero():
    """Nothing arrived, and nothing is wrong with it."""
    w, x, _ = draw(1, 0.7)
    solve = rbpjax.rbp_solve(network)
    loss = lambda w, probe: 0.0 * jnp.sum(solve(w, x, jnp.zeros(N), probe).value)
    _, grad, report = rbpjax.value_and_grad_with_report(loss)(w)
    assert not jnp.any(grad)
    assert report.bound == 0 and report.converged == 1


def hidden(gap):
    """An affine map, a state off in its slowest direction, and a cotangent without it.

    The residual there is ``gap`` times the error, and more of it is in fast directions:
    no rate and no growth of z shows the slow one.
    """
    random = np.random.default_rng(3)
    q = np.linalg.qr(random.normal(size=(N, N)))[0]
    values = np.append(np.linspace(-0.5, 0.5, N - 1), 1 - gap)
    skew = np.eye(N) + 0.3 * random.normal(size=(N, N)) / N**0.5
    basis = skew @ q
    w = basis @ np.diag(values) @ np.linalg.inv(basis)
    x = random.normal(size=N)
    h = np.linalg.solve(np.eye(N) - w, x)
    slow, fast = basis[:, -1], basis[:, 0]
    off = h + np.linalg.norm(h) * (
        1e-3 * slow / np.linalg.norm(slow) + 1e-7 * fast / np.linalg.norm(fast)
    )
    # A cotangent without the slow direction: z does not grow.
    left = np.linalg.inv(basis)
    weights = random.normal(size=N - 1) @ left[:-1]
    return jnp.asarray(w), jnp.asarray(x), jnp.asarray(off), jnp.asarray(weights)


@pytest.mark.parametrize("size", [1e30, 1e37])
def test_a_cotangent_that_vanishes_beside_the_adjoint_is_not_nothing(size):
    """(g / ‖z‖)² underflows: nothing is known, though all residuals vanish, too."""

    def runaway(vjp, cotangent):
        z = jax.tree.map(lambda g: g * jnp.float32(size), cotangent)
        return rbpjax.Solution(z, converged=False)

    # At a = 0 every state is a fixed point, and g is lost in z + g - z.
    f = lambda a, x, h: (h[0] + a * x, h[1] + a * x)
    solve = rbpjax.rbp_solve(f, backward=runaway)
    x = jnp.ones(3, jnp.float32)
    total = lambda h: jnp.sum(h[0] + 2 * h[1]) * jnp.float32(1e-2)
    loss = lambda a, probe: total(solve(a, x, (x, x), probe).value)
    report = rbpjax.value_and_grad_with_report(loss)(jnp.float32(0))[2]
    assert report.forward_status == 0
    assert report.bound == jnp.inf and report.converged == 0


def test_verify_follows_what_an_estimate_without_solves_cannot_see():
    """A state off by 1e-3 in a direction of 1e-6: 1e-9 in a residual of 1e-7."""
    w, x, off, weights = hidden(1e-6)
    at = lambda step, h0: rbpjax.Solution(h0, 0, 0, 1e-7, 0, True)
    f = lambda w, x, h: w @ h + x

    def reported(verify):
        solve = rbpjax.rbp_solve(f, forward=at, verify=verify)
        loss = lambda w, probe: weights @ solve(w, x, off, probe=probe).value
        return jax.jit(rbpjax.value_and_grad_with_report(loss))(w)

    (value, grad, cheap), (again, same, verified) = reported(False), reported(True)
    assert value == again and np.array_equal(grad, same)  # it only looks
    z = jnp.linalg.solve(jnp.eye(N) - w.T, weights)
    right = jnp.outer(z, jnp.linalg.solve(jnp.eye(N) - w, x))
    error = jnp.linalg.norm(grad - right) / jnp.linalg.norm(right)
    assert error > 1e-4
    assert cheap.bound < error / 10  # what verify is for
    assert error / 3 <= verified.bound and verified.converged == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("wrong", ["state", "adjoint"])
def test_errors_are_followed_through_both_solves(wrong, seed):
    """The same draws through dense solves of a J that is far from symmetric.

    Solves to τ = 0.03 at most change the sum of two of them by 2τ of each: 0.2 leaves
    room for their sizes. With J for Jᵀ, or without either solve, it is far off.
    """
    w, x, g = draw(seed, 0.8)
    w = w + jnp.triu(jnp.ones((N, N)), 1) * 0.4  # not normal
    random = np.random.default_rng(seed)
    h = jnp.zeros(N)
    for _ in range(100):
        jac = jax.jacobian(network, 2)(w, x, h)
        h = h + jnp.linalg.solve(jnp.eye(N) - jac, network(w, x, h) - h)
    h = h + 1e-6 * (wrong == "state") * jnp.asarray(random.normal(size=N))
    jac = jax.jacobian(network, 2)(w, x, h)
    z = jnp.linalg.solve(jnp.eye(N) - jac.T, g)
    z = z + 1e-6 * (wrong == "adjoint") * jnp.asarray(random.normal(size=N))
    q, r = network(w, x, h) - h, g + jac.T @ z - z
    step = lambda args, h: network(*args, h)
    noise = jnp.zeros(1)
    got = bound._followed(step, (w, x), h, z, q, r, noise, noise)

    back = lambda h, v: jax.vjp(lambda w, x: network(w, x, h), w, x)[1](v)
    rms = lambda v: jnp.sqrt(jnp.mean(v * v))
    squares = []
    for k in range(2):
        ahead, behind = (bound._random(h, 2 * k + i)[1] for i in range(2))
        d = jnp.linalg.solve(jnp.eye(N) - jac, q + rms(q) * ahead)
        moved = jax.jacobian(network, 2)(w, x, h + d)
        left = r + (moved - jac).T @ z
        e = jnp.linalg.solve(jnp.eye(N) - jac.T, left + rms(left) * behind)
        new, old, more = back(h + d, z), back(h, z), back(h, e)
        size = lambda v: jnp.linalg.norm(v)
        squares.append(
            max(
                size(a - b + c) / size(b)
                for a, b, c in zip(new, old, more, strict=True)
            )
            ** 2
        )
    want = jnp.sqrt(sum(squares) / 2)
    assert abs(got / want - 1) < 0.2


@pytest.mark.parametrize("transform", ["vmap", "scan", "second order"])
def test_verify_under_transformations(transform):
    """The same bound as alone; and derivatives of the gradient are what they were."""
    w, x, weights = draw(1, 0.7)
    solves = [rbpjax.rbp_solve(network, verify=verify) for verify in (False, True)]

    def bounded(solve, w):
        loss = lambda w, probe: weights @ solve(w, x, jnp.zeros(N), probe=probe).value
        _, grad, report = rbpjax.value_and_grad_with_report(loss)(w)
        return grad, report.bound

    if transform == "second order":
        one, two = (
            jax.grad(lambda w, s=s: jnp.sum(bounded(s, w)[0] ** 2))(w) for s in solves
        )
        assert np.array_equal(one, two)
        return
    batch = jnp.stack([w, 0.5 * w])
    alone = jnp.stack([bounded(solves[1], w)[1] for w in batch])
    one = lambda w: bounded(solves[1], w)[1]
    if transform == "vmap":
        found = jax.vmap(one)(batch)
    else:
        found = jax.lax.scan(lambda c, w: (c, one(w)), None, batch)[1]
    # Residuals at rounding differ between programs: the same to a small factor.
    assert np.all(np.abs(np.log(found / alone)) < np.log(10))


def test_verify_is_refused_where_it_cannot_be():
    clip = jax.custom_vjp(lambda h: h)
    clip.defvjp(lambda h: (h, None), lambda _, g: (g,))
    f = lambda w, x, h: jnp.tanh(w @ clip(h) + x)
    w, x, _ = draw(1, 0.7)
    solve = rbpjax.rbp_solve(f, verify=True)
    assert solve(w, x, jnp.zeros(N)).converged  # nobody asks for the bound
    with pytest.raises(TypeError, match="verify=True"):
        solve(w, x, jnp.zeros(N), probe=rbpjax.AdjointReport.zeros())
    with pytest.raises(ValueError, match="must be True or False"):
        rbpjax.rbp_solve(f, verify=2)


@pytest.mark.parametrize("chained", [False, True])
def test_what_one_leaf_amplifies(chained):
    """One stiff leaf of two: the other one's residual and cotangent do not hide it.

    With ∂a'/∂a = 1 - δa at a* = √θ the stiff leaf is 1 % off beside a residual of
    1e-14, as is the gradient 1/(2a); the other one's residual has another rate.
    ``chained``: the loss sees the other leaf alone, and the cotangent reaches the stiff
    one by it.
    """
    delta = 1e-12

    def f(theta, x, h):
        a, b = h
        return a + delta * (theta - a * a) / 2, 0.5 * b + (0.5 * a if chained else 1)

    h = 1.01, (1.01 if chained else 2.0) + 2e-12
    solve = rbpjax.rbp_fixed_point(f)(lambda theta, x, h: h)

    def loss(theta, probe):
        a, b = solve(theta, None, h, probe=probe).value
        return b if chained else a + b

    grad, report = jax.jit(rbpjax.value_and_grad_with_report(loss))(1.0)[1:]
    assert report.forward_status == 0
    error = abs(grad - 0.5) / 0.5
    assert 0.005 < error < 0.02
    assert report.bound > error / 3
    assert report.converged == 0
