"""Answers of any solver, and roots: gradients against closed forms and dense solves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import rbpjax
from rbpjax import Adaptive, AdjointReport, Solution, rbp_fixed_point, rbp_root

W = jnp.array([[0.3, -0.8], [0.8, 0.3]]) * 0.7
X, H = jnp.array([0.4, -0.2]), jnp.zeros(2)
TIGHT = Adaptive(tol=1e-12)


def f(w, x, h):
    return jnp.tanh(w @ h + x)


def by_scipy(w, x, h):
    """Reads concrete arrays: any tracer would raise here."""
    w, x = np.asarray(w), np.asarray(x)
    step = lambda h: np.tanh(w @ h + x)
    return scipy.optimize.fixed_point(step, np.zeros(2), xtol=1e-15, maxiter=5000)


def by_callback(w, x, h):
    out = jax.ShapeDtypeStruct((2,), jnp.float64)
    return jax.pure_callback(by_scipy, out, w, x, h, vmap_method="sequential")


def dense(w, x):
    """h*, and the gradient of sum(h*²), by a dense solve."""
    h = jnp.asarray(by_scipy(w, x, None))
    jac = jax.jacobian(f, 2)(w, x, h)
    z = jnp.linalg.solve(jnp.eye(2) - jac.T, 2 * h)
    return h, jax.vjp(lambda w, x: f(w, x, h), w, x)[1](z)


def loss_of(solve, h0=None):
    return lambda w, x, probe=None: jnp.sum(solve(w, x, h0, probe).value ** 2)


SOLVERS = {
    "scipy": by_scipy,
    "callback": by_callback,
    "file": lambda w, x, h: np.array(dense(W, X)[0]),
    "solution": lambda w, x, h: Solution(by_callback(w, x, h), 9, converged=True),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_any_solver_gets_the_gradient_of_the_fixed_point(solver):
    """SciPy by itself, in a callback, a stored value: eagerly all of them."""
    loss = loss_of(rbp_fixed_point(f, backward=TIGHT)(solver))
    with_report = rbpjax.value_and_grad_with_report(loss, (0, 1))
    value, grads, report = with_report(W, X)
    h, want = dense(W, X)
    np.testing.assert_allclose(value, jnp.sum(h**2), rtol=1e-12)
    for a, b in zip(grads, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
    assert report.converged == 1


def test_a_callback_works_under_transformations():
    """Jit, vmap, and a second derivative against that of rbp_solve."""
    loss = loss_of(rbp_fixed_point(f, backward=TIGHT)(by_callback), H)
    plain = rbpjax.rbp_solve(
        f, forward=rbpjax.FixedPointIteration(tol=1e-13), backward=TIGHT
    )
    xs = jnp.stack([X, -2 * X])
    got = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(W, xs)
    for bar, x in zip(got, xs, strict=True):
        np.testing.assert_allclose(bar, dense(W, x)[1][0], rtol=1e-9)
    second = lambda loss: jax.jit(jax.jacrev(jax.grad(loss, 1), 1))(W, X)
    np.testing.assert_allclose(second(loss), second(loss_of(plain, H)), rtol=1e-8)


def test_what_is_no_fixed_point_is_said_and_a_failure_kept():
    """The verdict is measured, not believed; the solver's own failure stands."""
    h, _ = dense(W, X)
    solve = rbp_fixed_point(f)(lambda w, x, h0: h0)
    assert solve(W, X, h).converged and not solve(W, X, h + 0.1).converged
    stuck = rbpjax.Status.STAGNATED
    given = Solution(h, 9, status=stuck, converged=False)
    found = rbp_fixed_point(f)(lambda w, x, h0: given)(W, X)
    assert (found.num_steps, found.status, found.converged) == (9, stuck, False)
    claimed = Solution(h + 0.1, 9, converged=True)
    found = rbp_fixed_point(f)(lambda w, x, h0: claimed)(W, X)
    assert not found.converged and found.status != rbpjax.Status.CONVERGED


def test_the_solver_is_not_differentiated_with_what_it_closes_over():
    """A traced value in the solver's closure has no gradient, and leaks nothing."""
    h, _ = dense(W, X)
    solve = lambda a: rbp_fixed_point(f)(lambda w, x, h0: h * a)(W, X).value.sum()
    assert jax.grad(solve)(1.0) == 0.0


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match=r"solver\(params, inputs, h0\).*'hybr'"):
        rbp_fixed_point(f)("hybr")
    with pytest.raises(ValueError, match=r"rbp_root: `F` must be callable; got 3"):
        rbp_root(3)
    with pytest.raises(ValueError, match=r"rbp_root: the solver.*got 3"):
        rbp_root(f, solver=3)
    with pytest.raises(ValueError, match=r"CGNormal.*Newton\(CGNormal"):
        rbp_root(f, forward=rbpjax.CGNormal())
    with pytest.raises(ValueError, match=r"`h0`.*float64\[1\].*float64\[2\]"):
        rbp_root(lambda p, x, h: h[:1])(None, None, H)


# name: (F, params, h0, root). In all of them but the first two, plain iteration of
# h - F diverges.
ROOTS = {
    "kepler": (lambda m, x, h: h - 0.6 * jnp.sin(h) - m, 1.0, 1.0, None),
    "other sign": (lambda a, x, h: a * jnp.cos(h) - h, 1.0, 0.5, None),
    "square": (lambda a, x, h: h**2 - a, 2.0, 1.0, jnp.sqrt),
    "negative slope": (lambda a, x, h: a - h**3, 8.0, 1.0, jnp.cbrt),
    "lambert": (lambda a, x, h: h * jnp.exp(h) - a, 5.0, 1.0, None),
    "logarithm": (lambda a, x, h: jnp.exp(h) - a, 3.0, 20.0, jnp.log),
    "stiff": (
        lambda k, x, h: h - 1 + 1e3 * k * h,
        5.0,
        1.0,
        lambda k: 1 / (1 + 1e3 * k),
    ),
}


def newton(F, a, h):
    """The root by scalar Newton in NumPy's precision, and dh/da."""
    slope = jax.grad(F, 2)
    for _ in range(200):
        h = h - F(a, None, h) / slope(a, None, h)
    return h, -jax.grad(F)(a, None, h) / slope(a, None, h)


def test_roots_in_any_units():
    """All roots by default, whatever F's scale and sign: closed form, scalar Newton.

    One compiled program: the batch is of all roots in all units.
    """
    functions = [F for F, *_ in ROOTS.values()]

    def F(p, x, h):
        number, units, a = p
        call = lambda G: lambda a, h: G(a, None, h)
        units = jax.lax.stop_gradient(units)  # the root does not depend on them
        return units * jax.lax.switch(number, list(map(call, functions)), a, h)

    solve = rbp_root(F)

    def both(a, number, units, h0, probe):
        found = solve((number, units, a), None, h0, probe)
        return found.value, found

    wants, cases = [], []
    for number, (G, a, h0, exact) in enumerate(ROOTS.values()):
        want = newton(G, a, h0) if exact is None else jax.value_and_grad(exact)(a)
        for units in (1.0, 1e-9, -1e9):
            wants.append(want)
            cases.append((a, number, units, h0))
    run = jax.vmap(rbpjax.value_and_grad_with_report(both, has_aux=True))
    columns = map(jnp.array, zip(*cases, strict=True))
    (value, found), grad, report = jax.jit(run)(*columns)
    names = [name for name in ROOTS for _ in range(3)]
    for name, *got, want, a, b in zip(
        names, value, grad, wants, found.converged, report.converged, strict=True
    ):
        # Both tolerances are ε^¾ = 2e-12; Newton's last step squares its error.
        np.testing.assert_allclose(got, want, rtol=1e-9, err_msg=name)
        assert a and b, name


def test_a_system_of_leaves_in_different_units():
    """Pressure near 1e6, velocity near 1, and equations in units of their own."""

    def F(p, x, h):
        pressure, v = h
        return (
            1e-4 * (pressure - 1e6 * (1 + p[0] * v**2)),
            1e5 * (v**3 + v - p[1] - 1e-7 * pressure),
        )

    p = jnp.array([0.3, 2.0])
    flat = lambda p, h: jnp.stack(F(p, None, (h[0], h[1])))
    h = jnp.array([1e6, 0.1])
    for _ in range(100):
        h = h - jnp.linalg.solve(jax.jacobian(flat, 1)(p, h), flat(p, h))
    root = (h[0], h[1])
    solve = rbp_root(F, backward=rbpjax.Direct())
    value = lambda p: jnp.stack(solve(p, None, root).value)
    got = jax.jit(lambda p: (value(p), jax.jacrev(value)(p)))(p)
    jac = -jnp.linalg.solve(jax.jacobian(flat, 1)(p, h), jax.jacobian(flat)(p, h))
    for a, b in zip(got, (h, jac), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7)  # κ = 1e6 in these units
    # From afar it is found, or said not to be.
    found = jax.jit(lambda p: solve(p, None, (jnp.array(1e6), jnp.array(0.1))))(p)
    if found.converged:
        np.testing.assert_allclose(jnp.stack(found.value), h, rtol=1e-7)


def test_a_small_residual_is_not_a_root():
    """exp(h) - a far from the root, in tiny units: every scale but one calls it 0."""
    solve = rbp_root(lambda a, x, h: 1e-12 * (jnp.exp(h) - a))
    found = jax.jit(solve)(jnp.float32(3.0), None, jnp.float32(10.0))
    assert found.converged
    np.testing.assert_allclose(found.value, np.log(3.0), rtol=1e-5)


def test_no_root_is_said():
    found = rbp_root(lambda a, x, h: h**2 + a)(1.0, None, jnp.ones(2))
    assert not found.converged


def test_a_minimum_is_the_root_of_a_gradient_with_aux():
    """Ridge regression in closed form; aux is the loss's own value."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(20, 4)), random.normal(size=20)

    def loss(decay, data, w):
        r = data[0] @ w - data[1]
        return jnp.sum(r**2) / 2 + decay * jnp.sum(w**2) / 2

    def F(decay, data, w):
        value, grad = jax.value_and_grad(loss, 2)(decay, data, w)
        return grad, value

    solve = rbp_root(F, has_aux=True, backward=TIGHT)
    closed = lambda decay: jnp.linalg.solve(a.T @ a + decay * jnp.eye(4), a.T @ b)
    run = lambda decay: solve(decay, (a, b), jnp.zeros(4))
    got = jax.jit(lambda d: (run(d).value, jax.grad(lambda d: run(d).value.sum())(d)))(
        0.3
    )
    want = closed(0.3), jax.grad(lambda d: closed(d).sum())(0.3)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9)
    aux = lambda d: jax.grad(lambda d: run(d).aux)(d)
    envelope = jnp.sum(want[0] ** 2) / 2  # ∂loss/∂decay at the minimum
    np.testing.assert_allclose(aux(0.3), envelope, rtol=1e-9)


def test_a_minimum_that_any_optimizer_found():
    """Adam's weights, differentiated as the minimum: closed form, and SciPy's too."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(20, 4)), random.normal(size=20)
    data = (jnp.asarray(a), jnp.asarray(b))

    def loss(decay, data, w):
        r = data[0] @ w - data[1]
        return jnp.sum(r**2) / 2 + decay * jnp.sum(w**2) / 2

    grad = jax.grad(loss, argnums=2)

    def adam(decay, data, w):
        optimizer = optax.adam(optax.exponential_decay(0.1, 100, 0.6))

        def body(_, carry):
            w, state = carry
            updates, state = optimizer.update(grad(decay, data, w), state)
            return optax.apply_updates(w, updates), state

        with jax.numpy_dtype_promotion("standard"):
            return jax.lax.fori_loop(0, 4000, body, (w, optimizer.init(w)))[0]

    def bfgs(decay, data, w):
        fun = lambda w: np.asarray(grad(decay, data, jnp.asarray(w)))
        return scipy.optimize.root(fun, np.asarray(w), tol=1e-14).x

    closed = lambda decay: jnp.linalg.solve(a.T @ a + decay * jnp.eye(4), a.T @ b)
    want = jax.grad(lambda d: closed(d).sum())(0.3)
    for train in (adam, bfgs):
        solve = rbp_root(grad, solver=train, backward=TIGHT)
        value = lambda d, solve=solve: solve(d, data, jnp.zeros(4)).value
        np.testing.assert_allclose(value(0.3), closed(0.3), rtol=1e-9)
        got = jax.grad(lambda d, value=value: value(d).sum())(0.3)
        np.testing.assert_allclose(got, want, rtol=1e-8)
    told = lambda d, data, w: Solution(closed(d), 77, converged=False)
    found = rbp_root(grad, solver=told)(0.3, data, jnp.zeros(4))
    assert found.num_steps == 77 and not found.converged


def test_a_root_composes_with_vmap_and_second_derivatives():
    solve = rbp_root(lambda a, x, h: h**2 - a, backward=TIGHT)
    root = lambda a: solve(a, None, 1.0).value
    a = jnp.array([2.0, 9.0, 0.25])
    second = jax.jit(jax.vmap(jax.grad(jax.grad(root))))(a)
    np.testing.assert_allclose(second, -0.25 * a**-1.5, rtol=1e-8)


def test_free_signatures():
    """Arguments by place and by name, a probe, other makers."""
    g = lambda h, w, x, gain=1.0: jnp.tanh(gain * (w @ h) + x)
    solve = rbpjax.from_args(g, functools.partial(rbpjax.rbp_solve, backward=TIGHT))
    loss = lambda w, gain, probe: jnp.sum(
        solve(H, w, x=X, gain=gain, probe=probe).value ** 2
    )
    _, (w_bar, _), report = rbpjax.value_and_grad_with_report(loss, (0, 1))(W, 1.0)
    np.testing.assert_allclose(w_bar, dense(W, X)[1][0], rtol=1e-7)
    assert report.converged == 1
    root = rbpjax.from_args(lambda h, a: h**2 - a, rbp_root)
    np.testing.assert_allclose(jax.grad(lambda a: root(1.0, a).value)(4.0), 0.25)
    assert solve(H, W, X, probe=AdjointReport.zeros()).converged
