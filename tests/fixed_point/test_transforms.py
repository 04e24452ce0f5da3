"""One table: every rule of ``RULES`` under every transformation JAX users compose.

Each function of this file is a column, each rule a row.
"""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import rbpjax
from tests.support.problems import (
    CONVERGED_RTOL,
    FIXED_COUNT,
    IDENTITY_RTOL,
    RULES,
    XS,
    ZEROS,
    W,
    alone,
    assert_close,
    assert_same_reports,
    dense,
    loss_and_report,
    readout,
    replace,
    reports_alone,
    rows,
    solver_of,
    tanh_step,
    total_dense,
)

pytestmark = pytest.mark.parametrize("name", rows(RULES.keys()))


def test_jit_changes_nothing(name):
    """The gradient under jit is the one without, and both are the dense one."""
    grad = jax.grad(loss_and_report(name), (0, 1, 2))
    *eager, _ = grad(W, XS[0], ZEROS())
    *jitted, report = alone(name)(W, XS[0], ZEROS())
    assert_close(jitted, eager, IDENTITY_RTOL)
    assert_close(jitted, dense(XS[0]), CONVERGED_RTOL)
    assert report.converged == 1


def test_vmap_keeps_examples_apart(name):
    """Under vmap each example has its own steps, gradient and report."""
    f = lambda w, gain, h: jnp.tanh(gain * (w @ h) + XS[0])
    solve = solver_of(f, name)
    loss = lambda w, x, probe: readout(solve(w, x, jnp.zeros(3), probe).value)
    grad = jax.grad(loss, (0, 1, 2))
    single = jax.jit(grad)
    gains = jnp.array([0.0, 0.4, 1.0])
    *bars, reports = jax.jit(jax.vmap(grad, (None, 0, 0)))(W, gains, ZEROS((3,)))
    for i, gain in enumerate(gains):
        *want, report = single(W, gain, ZEROS())
        got, got_report = jax.tree.map(lambda a, i=i: a[i], (bars, reports))
        assert_close(got, want, IDENTITY_RTOL)
        assert_close(got, dense(gain, f=f), CONVERGED_RTOL)
        assert_same_reports(got_report, report)
    if name not in FIXED_COUNT:
        assert len({int(k) for k in reports.num_steps}) > 1


def test_scan_adds_up_reports_unless_each_step_has_its_own(name):
    """In a scan, probes as xs keep reports apart; a probe in common gets their sum."""
    solve = solver_of(tanh_step, name)

    def loss(w, probe, probes):
        def body(h, inputs):  # each solve starts from the fixed point before it
            x, own = inputs
            h = solve(w, x, h, own if probe is None else probe).value
            return h, readout(h)

        return jnp.sum(jax.lax.scan(body, jnp.zeros(3), (XS, probes))[1])

    bar, apart = jax.jit(lambda w: jax.grad(loss, (0, 2))(w, None, ZEROS((4,))))(W)
    total = jax.jit(lambda w: jax.grad(loss, 1)(w, ZEROS(), ZEROS((4,))))(W)
    assert_close(bar, total_dense()[0], CONVERGED_RTOL)
    assert (apart.converged == 1).all() and (apart.num_steps >= 1).all()
    chex.assert_trees_all_close(
        total, jax.tree.map(jnp.sum, apart), rtol=1e-9, atol=1e-15
    )
    norms = reports_alone(name).cotangent_norm
    chex.assert_trees_all_close(apart.cotangent_norm, norms, rtol=1e-10)


def test_remat_changes_nothing(name):
    """Under jax.checkpoint gradient and report are the same."""
    *plain, plain_report = alone(name)(W, XS[1], ZEROS())
    grad = jax.jit(jax.grad(jax.checkpoint(loss_and_report(name)), (0, 1, 2)))
    *remat, remat_report = grad(W, XS[1], ZEROS())
    assert_close(remat, plain, IDENTITY_RTOL)
    assert_same_reports(remat_report, plain_report)


DIRECTIONS = (
    jnp.array([[0.3, 1.0, -0.5], [0.7, -0.2, 0.4], [0.1, 0.9, -1.0]]),
    jnp.array([[-0.6, 0.2, 0.8], [0.5, 1.0, -0.3], [0.4, -0.7, 0.2]]),
)


def three_orders(loss):
    """w -> its gradient, Hessian-vector and third-derivative-vector-vector product."""

    def contracted(grad, direction):
        def along(w):
            g, *lower = grad(w)
            return jnp.sum(g * direction), (*lower, g)

        def up(w):
            g, lower = jax.grad(along, has_aux=True)(w)
            return g, *lower

        return up

    first = lambda w: (jax.grad(loss)(w),)
    return jax.jit(contracted(contracted(first, DIRECTIONS[0]), DIRECTIONS[1]))


def third_derivatives(solve):
    return three_orders(lambda w: readout(solve(w, XS[0], jnp.zeros(3)).value))(W)


@cache
def unrolled_derivatives():
    # ρ(J) is near 0.7, and terms of third order carry k²ρᵏ: 1e-14 at k = 120.
    return third_derivatives(rbpjax.bptt(tanh_step, 120))


def test_higher_orders_are_those_of_the_unrolled_loop(name):
    """Second and third reverse derivatives agree with those through the history."""
    got = third_derivatives(solver_of(tanh_step, name))
    for a, b in zip(got, unrolled_derivatives(), strict=True):
        # Each order multiplies by (I - J)⁻¹ once more, whose norm is below 10.
        assert_close(a, b, CONVERGED_RTOL)


def test_closures_over_traced_arrays(name):
    """f may close over traced floats, integers and keys, under jit and under grad."""
    order, key = jnp.array([2, 0, 1]), jax.random.key(5)

    def run(w, x, order, key):
        noise = 0.1 * jax.random.normal(key, (3,))
        f = lambda _, __, h: jnp.tanh(
            w @ h[order] + x + noise + 0.1 * jax.random.normal(key, (3,))
        )
        return readout(solver_of(f, name)(None, (), jnp.zeros(3)).value)

    got = jax.jit(jax.grad(run, (0, 1)))(W, XS[1], order, key)
    noise = 0.2 * jax.random.normal(key, (3,))
    f = lambda w, x, h: jnp.tanh(w @ h[order] + x + noise)
    assert_close(got, dense(XS[1], f=f), CONVERGED_RTOL)


class Cell(nnx.Module):
    """An nnx step function."""

    def __init__(self):
        self.recurrent = nnx.Linear(
            3, 3, use_bias=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        self.recurrent.kernel.set_value(W.T)

    def __call__(self, x, h):
        return jnp.tanh(self.recurrent(h) + x)


def test_nnx_module_closed_over(name):
    """An nnx module that f closes over gets its gradient by nnx.grad."""

    def loss(cell, x):
        f = lambda _, x, h: cell(x, h)
        return readout(solver_of(f, name)((), x, jnp.zeros(3)).value)

    got = nnx.jit(nnx.grad(loss))(Cell(), XS[1])
    assert_close(got["recurrent"]["kernel"][...].T, dense(XS[1])[0], CONVERGED_RTOL)


def test_nnx_module_as_params(name):
    """An nnx module may be the params."""
    solve = solver_of(lambda cell, x, h: cell(x, h), name)
    loss = lambda cell, x: readout(solve(cell, x, jnp.zeros(3)).value)
    got = nnx.jit(nnx.grad(loss))(Cell(), XS[1])
    want = dense(XS[1])[0]
    assert_close(got["recurrent"]["kernel"][...].T, want, CONVERGED_RTOL)


def test_integer_and_key_leaves(name):
    """Integers and PRNG keys may be anywhere in params and inputs."""
    noise = lambda key: 0.1 * jax.random.normal(key, (3,))

    def f(params, inputs, h):
        w = params["w"] @ h[params["order"]]
        return jnp.tanh(w + inputs["x"] + inputs["scale"] * noise(inputs["key"]))

    solve = solver_of(f, name)
    order, key, x = jnp.array([2, 0, 1]), jax.random.key(5), XS[1]

    def loss(params, inputs):
        return readout(solve(params, inputs, jnp.zeros(3)).value)

    params = {"w": W, "order": order}
    inputs = {"x": x, "scale": jnp.array(2.0), "key": key}
    got = jax.jit(jax.grad(loss, (0, 1), allow_int=True))(params, inputs)
    want = dense(x, f=lambda w, x, h: jnp.tanh(w @ h[order] + x + 2.0 * noise(key)))
    assert_close((got[0]["w"], got[1]["x"]), want, CONVERGED_RTOL)
    assert got[0]["order"].dtype == jax.dtypes.float0


@pytest.mark.parametrize("dtype", rows([jnp.bfloat16, jnp.float32], [jnp.bfloat16]))
def test_narrow_dtypes(name, dtype):
    """In each dtype: kept by state and gradients, near the dense solve in float64."""
    if name == "callable" and dtype == jnp.bfloat16:
        pytest.skip("jax.scipy's gmres has no bfloat16 kernels on CPU")
    w, x = W.astype(dtype), XS[0].astype(dtype)
    eps = float(jnp.finfo(dtype).eps)
    rule = replace(RULES[name], tol=eps**0.75)
    solve = rbpjax.rbp_solve(tanh_step, backward=rule)

    def loss(w, x, probe):
        solution = solve(w, x, jnp.zeros(3, dtype), probe)
        return readout(solution.value), solution

    grad = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    (w_bar, x_bar, report), solution = grad(w, x, ZEROS())
    assert solution.converged
    assert solution.value.dtype == w_bar.dtype == x_bar.dtype == dtype
    assert solution.residual.dtype == jnp.float32
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), (w, x, (w_bar, x_bar)))
    # The tolerances ε^¾ of both solves, through ‖(I - J)⁻¹‖ of about 3 each.
    assert_close(wide[2], dense(wide[1], wide[0]), 6 * eps**0.75)
    if name != "callable":  # which has a tolerance of its own
        # ‖z‖ is up to 3‖g‖ here: RBP's own tolerance is relative to ‖z‖, and storing
        # z in this dtype costs up to ε‖z‖ / 2.
        assert report.residual <= 3 * eps**0.75 + 1.5 * eps


@pytest.mark.parametrize("holomorphic", rows([True, False], [False]))
def test_complex_state_is_a_pair_of_real_ones(name, holomorphic):
    """A complex solve is the real one of twice the size, in inner product Re⟨x̄, y⟩."""
    if name == "callable" and not holomorphic:
        pytest.skip("GMRES on complex vectors takes Jᵀ for complex-linear")
    w = 0.8 * jax.lax.complex(W, 0.3 * W.T[::-1])
    x = jax.lax.complex(XS[0], XS[3])

    def f(w, x, h):
        v = w @ h
        return 0.5 * jnp.sin(v) + x if holomorphic else v * jnp.tanh(jnp.conj(v)) + x

    complexify = lambda v: jax.lax.complex(*v)
    realify = lambda v: jnp.stack([v.real, v.imag])
    loss = lambda h: readout(h.real) + readout(h.imag * 0.5)
    solve = solver_of(f, name)
    grad = jax.jit(
        jax.grad(lambda w, x: loss(solve(w, x, jnp.zeros(3, complex)).value), (0, 1))
    )
    # JAX's gradient of a real loss is ∂L/∂Re - i ∂L/∂Im.
    got = jax.tree.map(lambda a: realify(a.conj()), grad(w, x))

    def f_real(w, x, h):
        return realify(f(complexify(w), complexify(x), complexify(h)))

    args = (realify(w), realify(x))
    h = jax.lax.fori_loop(0, 400, lambda _, h: f_real(*args, h), jnp.zeros((2, 3)))
    jac = jax.jacobian(f_real, 2)(*args, h).reshape(6, 6)
    g = jax.grad(lambda h: loss(complexify(h)))(h).ravel()
    z = jnp.linalg.solve(jnp.eye(6) - jac.T, g).reshape(2, 3)
    want = jax.vjp(lambda *args: f_real(*args, h), *args)[1](z)
    assert_close(got, want, CONVERGED_RTOL)


def test_complex_gradient_scales_with_the_loss(name):
    """A complex64 loss scaled by 1e-25, whose square vanishes, keeps its gradient."""
    if name == "callable":
        pytest.skip("jax.scipy's gmres squares the cotangent")
    w = jax.lax.complex(W, 0.3 * W.T).astype(jnp.complex64)
    rule = replace(RULES[name], tol=float(jnp.finfo(jnp.float32).eps) ** 0.75)
    solve = rbpjax.rbp_solve(lambda w, x, h: 0.5 * jnp.sin(w @ h) + x, backward=rule)
    x = jnp.array([0.5 + 0.5j, -0.3j, 1.0], jnp.complex64)

    @jax.jit
    def grad(scale):
        loss = lambda w: scale * readout(solve(w, x, jnp.zeros_like(x)).value.imag)
        bar = jax.grad(loss)(w)
        return bar.real / scale, bar.imag / scale

    # Two solves of tolerance 6e-6 at ‖(I - J)⁻¹‖ < 3, from starts that may differ.
    assert_close(grad(jnp.float32(1e-25)), grad(jnp.float32(1)), 1e-4)


def test_weak_types_and_python_scalars(name):
    """Python scalars serve as state, params and inputs: h* = x / (1 - a)."""
    f = lambda a, x, h: a * h + x
    solve = solver_of(f, name)

    def run():
        solution = solve(-0.5, 3.0, 0.0)
        grads = jax.grad(lambda a, x: solve(a, x, 0.0).value, (0, 1))(-0.5, 3.0)
        bars, adjoint = rbpjax.rbp_vjp(f, -0.5, 3.0, 2.0, 1.0, backward=RULES[name])
        return solution.value, grads, bars, adjoint.value

    value, grads, bars, z = jax.jit(run)()
    assert not value.weak_type
    want = (3.0 / 1.5**2, 1 / 1.5)
    got = jax.tree.map(float, (value, grads, bars, z))
    chex.assert_trees_all_close(got, (2.0, want, want, 1 / 1.5), rtol=1e-11)
