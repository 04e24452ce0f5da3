"""Every backward rule against a dense solve, and the identities among the methods."""

import chex
import jax
import jax.numpy as jnp
import pytest

import rbpjax
from rbpjax import RBP, CGNormal, FixedPointIteration, Neumann
from tests.support.problems import (
    CONVERGED_RTOL,
    EXPANSIVE,
    FORWARD,
    IDENTITY_RTOL,
    PROBLEMS,
    ROBUST,
    RULES,
    assert_close,
    dense_gradient,
    dense_jacobian,
    fixed_point,
    loss_of,
    optax_norm,
    readout,
    rows,
)

problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
few = pytest.mark.parametrize("problem", rows(PROBLEMS, ("pytree",)))
rules = pytest.mark.parametrize("rule", rows(RULES))
rbp_vjp = jax.jit(rbpjax.rbp_vjp, static_argnames=("f", "backward"))


@problems
@rules
def test_gradient_is_the_dense_one(problem, rule):
    """The gradient for params and inputs is that of (I - Jᵀ) z = g solved by LU."""
    solve = rbpjax.rbp_solve(problem.f, forward=FORWARD, backward=rule)
    got = jax.jit(jax.grad(loss_of(solve, problem), (0, 1)))(
        problem.params, problem.inputs
    )
    assert_close(got, dense_gradient(problem), CONVERGED_RTOL)


@few
def test_gradient_of_a_converged_network_is_that_of_bptt(problem):
    """With the history of a converged run stored, BPTT gives the same gradient."""
    solve = rbpjax.bptt(problem.f, 400)  # 0.7^400 is far below rounding
    got = jax.jit(jax.grad(loss_of(solve, problem), (0, 1)))(
        problem.params, problem.inputs
    )
    assert_close(got, dense_gradient(problem), CONVERGED_RTOL)


@problems
def test_problems_are_not_vacuous(problem):
    """The maps that the other tests use are non-symmetric, and J matters."""
    jac = dense_jacobian(problem, fixed_point(problem))
    assert jnp.linalg.norm(jac - jac.T) > 0.1 * jnp.linalg.norm(jac)
    assert jnp.abs(jnp.linalg.eigvals(jac)).max() > 0.2


@few
@pytest.mark.parametrize("steps", rows([0, 1, 5, 20], [0, 5]))
def test_neumann_rbp_and_tbptt_are_one_estimator(problem, steps):
    """Neumann(K) = RBP from g, K steps = TBPTT(K + 1), at the fixed point."""
    start = problem._replace(h0=fixed_point(problem))
    forward = FixedPointIteration(steps=0)

    def grad(solve):
        loss = loss_of(solve, start)
        return jax.jit(jax.grad(loss, (0, 1)))(problem.params, problem.inputs)

    neumann = grad(
        rbpjax.rbp_solve(problem.f, forward=forward, backward=Neumann(steps=steps))
    )
    rule = RBP(FixedPointIteration(steps=steps))
    rbp = grad(rbpjax.rbp_solve(problem.f, forward=forward, backward=rule))
    tbptt = grad(rbpjax.bptt(problem.f, steps + 1, truncation=steps + 1))
    assert_close(rbp, neumann, IDENTITY_RTOL)
    assert_close(tbptt, neumann, IDENTITY_RTOL)


@few
def test_neumann_error_is_the_tail_of_the_series(problem):
    """z - z_K = (Jᵀ)^{K+1} z, the exact truncation error, for every K."""
    h = fixed_point(problem)
    jac = dense_jacobian(problem, h)
    g = jax.grad(readout)(h)
    flat, unravel = jax.flatten_util.ravel_pytree(g)
    z = jnp.linalg.solve(jnp.eye(flat.size) - jac.T, flat)
    for steps in (0, 3, 10):
        _, solution = rbp_vjp(
            problem.f,
            problem.params,
            problem.inputs,
            h,
            g,
            backward=Neumann(steps=steps),
        )
        tail = unravel(jnp.linalg.matrix_power(jac.T, steps + 1) @ z)
        error = jax.tree.map(jnp.subtract, unravel(z), solution.value)
        chex.assert_trees_all_close(error, tail, rtol=1e-9, atol=1e-12 * float(z.max()))


@pytest.mark.parametrize("name", rows(ROBUST))
def test_gradient_where_no_iteration_converges(name):
    """With ρ(J) > 1 the rules that need only I - J invertible are still right."""
    h = fixed_point(EXPANSIVE)
    forward = lambda step, h0: rbpjax.Solution(
        value=h, converged=True
    )  # a user's solver
    solve = rbpjax.rbp_solve(EXPANSIVE.f, forward=forward, backward=RULES[name])
    got = jax.grad(loss_of(solve, EXPANSIVE), (0, 1))(
        EXPANSIVE.params, EXPANSIVE.inputs
    )
    assert_close(got, dense_gradient(EXPANSIVE), CONVERGED_RTOL)


@pytest.mark.parametrize("name", ["neumann", "neumann_steps", "rbp", "rbp_uniform"])
def test_divergence_is_reported(name):
    """With ρ(J) > 1 the series diverges, and its report says so."""
    h = fixed_point(EXPANSIVE)
    _, solution = rbp_vjp(
        EXPANSIVE.f,
        EXPANSIVE.params,
        EXPANSIVE.inputs,
        h,
        jax.grad(readout)(h),
        backward=RULES[name],
    )
    assert not solution.converged
    assert not solution.residual < 0.1  # NaN would do as well


def test_divergence_stops_early():
    """A diverging loop ends once √ε of the digits are gone, not at max_steps."""
    h = fixed_point(EXPANSIVE)
    args = (EXPANSIVE.f, EXPANSIVE.params, EXPANSIVE.inputs)
    rule = Neumann(tol=1e-12, max_steps=10**6)
    _, solution = rbp_vjp(*args, h, jax.grad(readout)(h), backward=rule)
    assert solution.num_steps < 100  # 1.5^k = 1/√ε at k = 44
    solve = rbpjax.rbp_solve(EXPANSIVE.f, forward=FixedPointIteration(max_steps=10**6))
    solution = solve(EXPANSIVE.params, EXPANSIVE.inputs, EXPANSIVE.h0)
    assert not solution.converged and solution.residual > 0.1


@few
@rules
def test_rbp_vjp_is_the_transforms_gradient(problem, rule):
    """rbp_vjp gives the gradient of rbp_solve, and its Solution holds the adjoint."""
    h = fixed_point(problem)
    g = jax.grad(readout)(h)
    args = (problem.f, problem.params, problem.inputs, h)
    bars, solution = rbp_vjp(*args, g, backward=rule)
    assert_close(bars, dense_gradient(problem), CONVERGED_RTOL)
    assert solution.converged
    residual = rbpjax.diagnostics.adjoint_residual(*args, g, solution.value)
    assert residual < 1e-11
    assert jnp.abs(residual - solution.residual) < 1e-13  # rounding of O(1) vectors


@few
@rules
def test_rbp_jvp_is_dual_to_rbp_vjp(problem, rule):
    """⟨g, ḣ⟩ = ⟨θ̄, θ̇⟩ + ⟨x̄, ẋ⟩ with ḣ from rbp_jvp and bars from the dense solve."""
    h = fixed_point(problem)
    g = jax.grad(readout)(h)
    tangents = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape),
        (problem.params, problem.inputs),
    )
    rbp_jvp = jax.jit(rbpjax.rbp_jvp, static_argnames=("f", "backward"))
    h_dot = rbp_jvp(
        problem.f, problem.params, problem.inputs, h, tangents, backward=rule
    ).value
    dot = lambda a, b: jnp.dot(*(jax.flatten_util.ravel_pytree(t)[0] for t in (a, b)))
    want = dot(dense_gradient(problem, h), tangents)
    assert jnp.abs(want) > 1e-2
    assert jnp.abs(dot(g, h_dot) - want) < CONVERGED_RTOL * jnp.abs(want)


@rules
def test_zero_cotangent_gives_zero_gradient(rule):
    """g = 0 ⇒ z = 0, gradient exactly 0, no NaN, converged in no step."""
    problem = PROBLEMS["tanh_rnn"]
    solve = rbpjax.rbp_solve(problem.f, forward=FORWARD, backward=rule)

    def loss(params, probe):
        return 0.0 * readout(solve(params, problem.inputs, problem.h0, probe).value)

    grads, report = jax.grad(loss, (0, 1))(problem.params, rbpjax.AdjointReport.zeros())
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))
    assert report.cotangent_norm == 0
    assert report.converged == 1 and report.residual == 0


OWN_RULES = [name for name in RULES if name != "callable"]


@pytest.mark.parametrize("name", rows(OWN_RULES))
@pytest.mark.parametrize("scale", rows([1e-20, 1e-30, 1e20], [1e-30, 1e20]))
def test_gradient_scales_with_the_loss_in_float32(name, scale):
    """A loss scaled by s in float32 gives the gradient scaled by s."""
    problem = jax.tree.map(
        lambda x: x.astype(jnp.float32) if isinstance(x, jax.Array) else x,
        PROBLEMS["tanh_rnn"],
    )
    rule = {
        "neumann": Neumann(),
        "neumann_steps": Neumann(steps=400),
        "phantom": rbpjax.Phantom(steps=400),
        "rbp": RBP(),
        "rbp_uniform": RBP(seed=7),
        "anderson": RBP(rbpjax.Anderson()),
        "rre": RBP(rbpjax.RRE()),
        "cg_normal": CGNormal(),
        "bicgstab": rbpjax.BiCGSTAB(),
        "gmres": rbpjax.GMRES(),
        "adaptive": rbpjax.Adaptive(),
        "direct": rbpjax.Direct(),
    }[name]
    solve = rbpjax.rbp_solve(problem.f, backward=rule)
    scale = jnp.float32(scale)

    def loss(params, s):
        return s * readout(solve(params, problem.inputs, problem.h0).value)

    grad = jax.jit(jax.grad(loss))
    one, scaled = grad(problem.params, jnp.float32(1)), grad(problem.params, scale)
    # Two runs of one float32 solve at tol 6e-6 and κ < 10, from different starts.
    assert_close(jax.tree.map(lambda x: x / scale, scaled), one, 1e-4)


def test_ridge_has_the_bias_that_the_formula_says():
    """CGNormal(ridge=η) solves (AᵀA + ηI) z = Aᵀg; without it, A z = g."""
    problem = PROBLEMS["linear"]
    h = fixed_point(problem)
    g = jax.grad(readout)(h)
    a = jnp.eye(3) - problem.params.T
    for ridge in (0.0, 1e-5, 1e-2):
        rule = CGNormal(tol=1e-13, ridge=ridge)
        _, solution = rbp_vjp(
            problem.f, problem.params, problem.inputs, h, g, backward=rule
        )
        want = jnp.linalg.solve(a.T @ a + ridge * jnp.eye(3), a.T @ g)
        assert_close(solution.value, want, 1e-11)
        assert solution.converged
        bias = jnp.linalg.norm(a @ want - g) / jnp.linalg.norm(g)
        assert jnp.abs(solution.residual - bias) < 1e-11


def test_cg_needs_no_more_steps_than_distinct_singular_values():
    """CG ends in as many steps as A has distinct singular values, last one kept."""
    # J = 0: A = I, one step, z = g, which code that drops the last iterate misses.
    f = lambda p, x, h: p * x
    one = jnp.ones(4)
    g = jnp.arange(1.0, 5.0)
    _, solution = rbp_vjp(f, one, one, one, g, backward=CGNormal(tol=1e-13))
    assert solution.num_steps == 1 and solution.converged
    chex.assert_trees_all_close(solution.value, g, rtol=1e-15)
    # I - J = diag(2, 2, 5, 5): two steps.
    f = lambda p, x, h: jnp.array([-1.0, -1.0, -4.0, -4.0]) * h + p * x
    _, solution = rbp_vjp(f, one, one, one, g, backward=CGNormal(tol=1e-13))
    assert solution.num_steps == 2 and solution.converged
    chex.assert_trees_all_close(
        solution.value, g / jnp.array([2.0, 2.0, 5.0, 5.0]), rtol=1e-14
    )


def test_singular_problem_is_reported():
    """With I - J singular there is no adjoint, and CG says not converged, finitely."""
    f = lambda p, x, h: jnp.array([1.0, 0.5]) * h + p * x
    one = jnp.ones(2)
    _, solution = rbp_vjp(f, one, one, one, jnp.array([1.0, 1.0]), backward=CGNormal())
    assert not solution.converged
    assert jnp.isfinite(solution.value).all()
    assert jnp.abs(solution.residual - 0.5**0.5) < 1e-12  # the part along the kernel


def test_start_has_zero_cotangent():
    """A fixed point does not depend on its start: the gradient for h0 is zero."""
    problem = PROBLEMS["pytree"]
    solve = rbpjax.rbp_solve(problem.f, forward=FORWARD)
    loss = lambda h0: readout(solve(problem.params, problem.inputs, h0).value)
    grad = jax.grad(loss)(problem.h0)
    chex.assert_trees_all_equal(grad, jax.tree.map(jnp.zeros_like, problem.h0))


def test_only_the_value_is_differentiable():
    """A loss of residual and counts alone has gradient zero, not an error."""
    problem = PROBLEMS["linear"]
    solve = rbpjax.rbp_solve(problem.f, forward=FixedPointIteration(steps=3))
    loss = lambda w: solve(w, problem.inputs, problem.h0).residual
    assert loss(problem.params) > 0
    chex.assert_trees_all_equal(jax.grad(loss)(problem.params), jnp.zeros((3, 3)))


def test_uniform_start_is_the_papers():
    """Truncated RBP from U[0,1) keeps (Jᵀ)ᴷ(z₀ - z) of its start, in absolute units."""
    problem = PROBLEMS["linear"]
    h = fixed_point(problem)
    a = jnp.eye(3) - problem.params.T
    for scale in (1.0, 1e-3):
        g = scale * jax.grad(readout)(h)

        def solve(k, g=g):
            rule = RBP(FixedPointIteration(steps=k), seed=11)
            args = (problem.f, problem.params, problem.inputs, h, g)
            return rbp_vjp(*args, backward=rule)[1].value

        start = solve(0)
        assert (start >= 0).all() and (start < 1).all()
        chex.assert_trees_all_close(start, solve(0), rtol=0)  # the seed decides
        z = jnp.linalg.solve(a, g)
        want = z + jnp.linalg.matrix_power(problem.params.T, 6) @ (start - z)
        assert_close(solve(6), want, IDENTITY_RTOL)


def test_report_is_that_of_the_adjoint_solve():
    """value_and_grad returns value, gradient, and the numbers of rbp_vjp's Solution."""
    problem = PROBLEMS["tanh_rnn"]
    rule = Neumann(tol=1e-9)
    solve = rbpjax.rbp_solve(problem.f, forward=FORWARD, backward=rule)

    def loss(params, inputs, probe):
        solution = solve(params, inputs, problem.h0, probe=probe)
        return readout(solution.value), solution.num_steps

    (value, aux), grads, report = jax.jit(
        rbpjax.value_and_grad_with_report(loss, argnums=(0, 1), has_aux=True)
    )(problem.params, problem.inputs)
    h = fixed_point(problem)
    g = jax.grad(readout)(h)
    assert_close(grads, dense_gradient(problem), 1e-7)
    assert_close(value, readout(h), IDENTITY_RTOL)
    assert aux > 3
    _, solution = rbp_vjp(
        problem.f, problem.params, problem.inputs, h, g, backward=rule
    )
    assert int(report.num_steps) == int(solution.num_steps) > 3
    assert report.converged == 1
    assert 0 < report.residual <= 1e-9
    chex.assert_trees_all_close(report.cotangent_norm, optax_norm(g), rtol=1e-10)


def test_bptt_reports_nothing():
    """A probe given to BPTT gets gradient zero: no adjoint is solved."""
    problem = PROBLEMS["linear"]
    solve = rbpjax.bptt(problem.f, 5)

    def loss(params, probe):
        return readout(solve(params, problem.inputs, problem.h0, probe=probe).value)

    _, _, report = rbpjax.value_and_grad_with_report(loss)(problem.params)
    assert all(leaf == 0 for leaf in jax.tree.leaves(report))


@pytest.mark.parametrize("probed", [pytest.param(False, marks=pytest.mark.full), True])
def test_second_order_through_a_loop_of_solves(probed):
    """A scan differentiated twice, as implicit steps in time are; with keys and ints.

    JAX took the solver's constants for f's parameters.
    """
    lengths = jnp.array([0.3, 0.1, 0.2])

    def step(params, inputs, h):
        old, dt, key, shift = inputs
        scale = 1 + 0 * jax.random.uniform(key) + 0.0 * shift.astype(float)
        return old - dt * scale * jnp.exp(params) * (h + h**3 / 3)

    def loss(advance):
        def run(params):
            def body(h, dt):
                h = advance(params, (h, dt, jax.random.key(0), jnp.int32(3)), h)
                return h, h

            return jnp.sum(jax.lax.scan(body, jnp.ones(2), lengths)[1] ** 2)

        return run

    probe = rbpjax.AdjointReport.zeros() if probed else None
    solve = rbpjax.rbp_solve(step)
    ours = loss(lambda *args: solve(*args, probe).value)
    plain = loss(lambda *args: rbpjax.bptt(step, 60)(*args).value)
    params = jnp.array([0.2, -0.4])
    for order in (jax.grad, lambda f: jax.jacrev(jax.grad(f))):
        # The map contracts by 0.3 · e^0.2 · 2 < 0.75: 60 steps leave 4e-8, default
        # tolerances less.
        chex.assert_trees_all_close(
            order(ours)(params), order(plain)(params), rtol=1e-6
        )
