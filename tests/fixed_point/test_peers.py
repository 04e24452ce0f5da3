"""What other libraries got wrong, or were asked for, one test each, named after it.

The number is that of a public thread. Where a table of this folder covers the matter
for every rule, here stands the case as its users met it, with the default rule.
"""

import chex
import jax
import jax.numpy as jnp
import pytest

import rbpjax
from rbpjax import (
    AdjointReport,
    Anderson,
    FixedPointIteration,
    Hybrid,
    Neumann,
    Solution,
)
from tests.support.problems import (
    CONVERGED_RTOL,
    EXPANSIVE,
    FORWARD,
    IDENTITY_RTOL,
    XS,
    W,
    assert_close,
    dense,
    dense_gradient,
    fixed_point,
    readout,
    tanh_step,
)

ZERO = jnp.zeros(3)
X = XS[1]


def loss_of(solve):
    return lambda w, x=X: readout(solve(w, x, ZERO).value)


def test_diffrax_195_diagnostics_of_the_backward_pass_under_jit_and_vmap():
    """Each example's steps, residual and verdict come out of one gradient."""
    solve = rbpjax.rbp_solve(tanh_step, forward=FORWARD)
    loss = lambda x, probe: readout(solve(W, x, ZERO, probe).value)
    reports = jax.jit(jax.vmap(jax.grad(loss, 1)))(XS, AdjointReport.zeros((4,)))
    assert reports.num_steps.shape == (4,) and len(set(reports.num_steps.tolist())) > 1
    assert (reports.converged == 1).all() and (reports.residual < 1e-11).all()


def test_jaxopt_a_gradient_that_did_not_converge_is_not_silent():
    """A budget too small for the backward solve: the report says so, with its residual.

    The true residual of K Neumann terms of a = 0.9 is 0.9^{K+1}.
    """
    solve = rbpjax.rbp_solve(lambda a, x, h: a * h + x, backward=Neumann(max_steps=10))
    loss = lambda a, probe: jnp.sum(solve(a, jnp.ones(1), jnp.zeros(1), probe).value)
    _, _, report = jax.jit(rbpjax.value_and_grad_with_report(loss))(jnp.full(1, 0.9))
    assert report.converged == 0
    chex.assert_trees_all_close(report.residual, jnp.float64(0.9**11), rtol=1e-9)


def test_lineax_117_and_243_the_backward_pass_never_raises():
    """A singular I - J in the middle of a compiled step: finite flow, not converged."""
    solve = rbpjax.rbp_solve(lambda a, x, h: a * h + x, forward=_given)

    @jax.jit
    def step(a):
        loss = lambda a, probe: jnp.sum(solve(a, XS[0], ZERO, probe).value)
        value, grad, report = rbpjax.value_and_grad_with_report(loss)(a)
        return value, grad, report.converged

    _, _, converged = step(jnp.ones(3))
    assert converged == 0


def _given(step, h0):
    return Solution(value=h0, num_steps=0, residual=0.0, converged=True)


def test_optimistix_93_no_dense_jacobian():
    """A state of 128 × 256: some states of temporary memory, not its square (8 GiB).

    The default has a Krylov basis of ten besides, and what Newton's method carries.
    """
    x = jnp.ones((128, 256), jnp.float32)
    w = jnp.eye(256, dtype=jnp.float32) * 0.5
    f = lambda w, x, h: jnp.tanh(h @ w + x)
    for forward, states in ((FixedPointIteration(), 20), (Hybrid(), 40)):
        solve = rbpjax.rbp_solve(f, forward=forward)
        grad = jax.grad(lambda w, s=solve: jnp.sum(s(w, x, jnp.zeros_like(x)).value))
        compiled = jax.jit(grad).lower(w).compile()
        used = compiled.memory_analysis().temp_size_in_bytes
        assert used < states * x.nbytes, forward


def test_jaxopt_31_and_111_closures_receive_gradients():
    """A traced array that f closes over: no leaked tracer, and the right gradient."""
    solve_with = lambda w: rbpjax.rbp_solve(lambda _, x, h: jnp.tanh(w @ h + x))
    loss = lambda w: readout(solve_with(w)(None, X, ZERO).value)
    assert_close(jax.jit(jax.grad(loss))(W), dense(X)[0], CONVERGED_RTOL)


def test_jax_14760_closures_over_integers():
    """Traced integers closed over, which JAX's own closure conversion leaves behind."""

    def loss(w, order):
        solve = rbpjax.rbp_solve(lambda w, x, h: jnp.tanh(w @ h + x)[order])
        return readout(solve(w, X, ZERO).value)

    got = jax.jit(jax.grad(loss))(W, jnp.array([0, 1, 2]))
    assert_close(got, dense(X)[0], CONVERGED_RTOL)


def test_optimistix_154_auxiliary_outputs_are_differentiated_at_the_fixed_point():
    """Aux from the step is a function of (w, x, h*): evaluated there, it is right.

    Against the same aux of a long unrolled loop. f that returns it is refused.
    """

    def step(w, x, h):
        hidden = w @ h + x
        return jnp.tanh(hidden), {"energy": jnp.sum(hidden**2)}

    state = lambda w, x, h: step(w, x, h)[0]
    with pytest.raises(ValueError, match="`f`'s output"):
        rbpjax.rbp_solve(step)(W, X, ZERO)

    def energy(make):
        def of(w):
            h = make(state)(w, X, ZERO).value
            return step(w, X, h)[1]["energy"]

        return jax.jit(jax.grad(of))(W)

    got = energy(lambda f: rbpjax.rbp_solve(f, forward=FORWARD))
    want = energy(lambda f: rbpjax.bptt(f, 300))  # 0.8³⁰⁰ is nothing
    assert_close(got, want, CONVERGED_RTOL)


def test_optimistix_bfloat16_state():
    """No dtype is lost on the way; the error is that of eight bits."""
    low = lambda a: a.astype(jnp.bfloat16)
    solve = rbpjax.rbp_solve(lambda w, x, h: jnp.tanh(w @ h + x))
    loss = lambda w: jnp.sum(solve(w, low(X), low(ZERO)).value)
    got = jax.jit(jax.grad(loss))(low(W))
    assert got.dtype == jnp.bfloat16
    wide = rbpjax.rbp_solve(tanh_step, forward=FORWARD)
    want = jax.grad(lambda w: jnp.sum(wide(w, X, ZERO).value))(W)
    # tol ε^¾ = 0.026 forward and backward, at a condition below 2 here.
    assert_close(got.astype(jnp.float64), want, 0.1)


def test_jaxopt_445_complex_state_with_cg():
    """CG forms AᴴA, not AᵀA: the gradient is (I - A)⁻ᵀ w, in closed form."""
    a = jnp.array([[0.5 + 0.6j, 0.3], [0.0, -0.2 + 0.7j]])
    x = jnp.array([1.0 + 0.0j, 0.5j])
    solve = rbpjax.rbp_solve(
        lambda a, x, h: a @ h + x, forward=FORWARD, backward=rbpjax.CGNormal(tol=1e-12)
    )
    weight = jnp.array([1.0 - 2.0j, 0.5 + 1.0j])
    loss = lambda x: jnp.sum((weight * solve(a, x, jnp.zeros_like(x)).value).real)
    want = jnp.linalg.solve((jnp.eye(2, dtype=a.dtype) - a).T, weight)
    # ∂ Re(wᵀ(I - A)⁻¹x)
    chex.assert_trees_all_close(jax.grad(loss)(x), want, rtol=1e-10)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20])
def test_jax_40254_a_loss_of_any_scale_in_float32(size):
    """Scaling the loss scales the gradient: nothing is lost to float32's range."""
    narrow = lambda a: a.astype(jnp.float32)
    solve = rbpjax.rbp_solve(tanh_step)
    loss = lambda w, s: s * jnp.sum(solve(w, narrow(X), narrow(ZERO)).value)
    grad = jax.jit(jax.grad(loss))
    one, scaled = grad(narrow(W), jnp.float32(1)), grad(narrow(W), jnp.float32(size))
    assert_close(
        scaled.astype(jnp.float64) / size, one.astype(jnp.float64), 1e-5
    )  # a few roundings of float32, and the rule's tolerance 6e-6


def test_optimistix_tolerance_is_relative_to_the_cotangent():
    """The mean over a big batch makes cotangents tiny: same steps, same accuracy."""
    solve = rbpjax.rbp_solve(tanh_step, forward=FORWARD, backward=Neumann(tol=1e-6))
    loss = lambda w, s, probe: s * readout(solve(w, X, ZERO, probe).value)
    report = jax.jit(jax.grad(loss, 2))
    few = report(W, 1.0, AdjointReport.zeros())
    many = report(W, 1e-9, AdjointReport.zeros())
    assert few.num_steps == many.num_steps
    chex.assert_trees_all_close(few.residual, many.residual, rtol=1e-6)


def test_jax_5309_second_order_with_gmres():
    """Reverse over reverse through a Krylov rule, against a long unrolled loop."""
    ours = rbpjax.rbp_solve(
        tanh_step, forward=FORWARD, backward=rbpjax.GMRES(tol=1e-12)
    )
    hessian = lambda solve: jax.jit(
        jax.jacrev(jax.grad(lambda x: loss_of(solve)(W, x)))
    )
    want = hessian(rbpjax.bptt(tanh_step, 300))(X)
    assert_close(hessian(ours)(X), want, CONVERGED_RTOL)


def test_jaxopt_474_forward_mode():
    """rbp_jvp over a basis is jacfwd: (I - J)⁻¹ D by a dense solve, in closed form."""
    h = rbpjax.rbp_solve(tanh_step, forward=FORWARD)(W, X, ZERO).value
    along = lambda x_dot: rbpjax.rbp_jvp(tanh_step, W, X, h, (0 * W, x_dot)).value
    got = jax.jit(jax.vmap(along, out_axes=1))(jnp.eye(3))
    slope = (1 - h**2)[:, None]
    want = jnp.linalg.solve(jnp.eye(3) - slope * W, slope * jnp.eye(3))
    assert_close(got, want, CONVERGED_RTOL)


def test_deq_26_a_singular_anderson_system():
    """Two equal leaves make all differences parallel: converged, and finite."""
    step = lambda h: {"a": 0.9 * h["a"] + 1.0, "b": 0.9 * h["b"] + 1.0}
    start = {"a": jnp.zeros(4), "b": jnp.zeros(4)}
    solution = jax.jit(lambda h: Anderson(memory=8, tol=1e-10)(step, h))(start)
    assert solution.converged
    chex.assert_trees_all_close(solution.value["a"], jnp.full(4, 10.0), rtol=1e-8)


def test_deq_jax_no_spurious_gradient_for_the_start():
    """optimistix#54, jaxopt#270: the gradient for h0 is zero, by definition."""
    solve = rbpjax.rbp_solve(tanh_step)
    start = jax.grad(lambda h0: readout(solve(W, X, h0).value))(jnp.ones(3))
    chex.assert_trees_all_equal(start, ZERO)


def test_torchdeq_12_the_residual_is_relative():
    """States 10⁶ times larger: the same steps and the same residual."""
    residuals = []
    for size in (1.0, 1e6):
        step = lambda h, size=size: 0.5 * h + jnp.full(2, size)
        residuals.append(FixedPointIteration(tol=1e-6)(step, jnp.zeros(2)))
    assert residuals[0].num_steps == residuals[1].num_steps
    chex.assert_trees_all_close(residuals[0].residual, residuals[1].residual)


def test_optimistix_147_the_best_result_when_the_budget_is_over():
    """No error, the iterate reached and its true residual: 0.9⁵ after five steps."""
    solve = rbpjax.rbp_solve(
        lambda a, x, h: a * h + x, forward=FixedPointIteration(max_steps=5)
    )
    solution = solve(jnp.full(1, 0.9), jnp.ones(1), jnp.zeros(1))
    assert not solution.converged and solution.num_steps == 5
    want = jnp.full(1, 10 * (1 - 0.9**5))
    chex.assert_trees_all_close(solution.value, want, rtol=1e-12)


def test_lineax_129_exactly_n_steps():
    """A count is a count: no tolerance to set to zero, and nothing thrown."""
    solve = rbpjax.rbp_solve(tanh_step, forward=FORWARD, backward=Neumann(steps=7))
    loss = lambda w, probe: readout(solve(w, X, ZERO, probe).value)
    assert jax.grad(loss, 1)(W, AdjointReport.zeros()).num_steps == 7


def test_jaxopt_301_the_backward_solver_is_an_argument():
    """A dense solve of one's own as rule, and a diverging forward map by Newton."""

    def dense_rule(vjp, g):
        matrix = jnp.eye(g.size) - jax.vmap(vjp, out_axes=1)(jnp.eye(g.size))
        z = jnp.linalg.solve(matrix, g)
        return Solution(
            value=z,
            num_steps=1,
            residual=jnp.linalg.norm(matrix @ z - g),
            converged=True,
        )

    h = fixed_point(EXPANSIVE)
    solve = rbpjax.rbp_solve(EXPANSIVE.f, forward=_given, backward=dense_rule)
    loss = lambda w, x: readout(solve(w, x, h).value)
    got = jax.jit(jax.grad(loss, (0, 1)))(EXPANSIVE.params, EXPANSIVE.inputs)
    assert_close(got, dense_gradient(EXPANSIVE), IDENTITY_RTOL)


def test_jaxopt_380_and_optimistix_89_one_trace():
    """Fresh but equal strategies share a compilation, in which f is traced once."""
    traces = []

    def f(w, x, h):
        traces.append(1)
        return jnp.tanh(w @ h + x)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(w, rule):
        solve = rbpjax.rbp_solve(f, backward=rule)
        return jax.grad(lambda w: readout(solve(w, X, ZERO).value))(w)

    for shift in range(3):
        step(W + 0.01 * shift, Neumann(tol=1e-6))
    assert len(traces) == 1


def test_jax_15837_a_gmres_that_stagnates_says_so():
    """On a cyclic shift of n, restarted before n, GMRES gains nothing: reported."""
    shift = jnp.eye(8)[(jnp.arange(8) + 1) % 8]
    jac = jnp.eye(8) - shift  # I - J is the shift: perfectly conditioned
    solution = rbpjax.GMRES(restart=4)(lambda v: jac.T @ v, jnp.eye(8)[0])
    assert not solution.converged
    chex.assert_trees_all_close(solution.residual, jnp.float64(1), rtol=1e-12)
    again = rbpjax.Adaptive()(lambda v: jac.T @ v, jnp.eye(8)[0])
    assert again.converged  # the default falls back to CG on the normal equations


def test_tesseract_jax_247_how_wrong_the_loop_cut_gradient_is():
    """The one-step gradient's own report has the residual ‖Jᵀg‖ / ‖g‖."""
    solve = rbpjax.rbp_solve(tanh_step, forward=FORWARD, backward=Neumann(steps=0))
    loss = lambda x, probe: readout(solve(W, x, ZERO, probe).value)
    report = jax.grad(loss, 1)(X, AdjointReport.zeros())
    h = solve(W, X, ZERO).value
    g = jax.grad(readout)(h)
    jac = (1 - h**2)[:, None] * W
    want = jnp.linalg.norm(jac.T @ g) / jnp.linalg.norm(g)
    assert want > 0.1 and report.converged == 0
    chex.assert_trees_all_close(report.residual, want, rtol=1e-9)
