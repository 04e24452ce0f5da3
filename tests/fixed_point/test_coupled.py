"""States that are split over devices, with collectives in f: all decide alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import rbpjax
from tests.support import sharded
from tests.support.problems import RULES, ZEROS, assert_close, rows
from tests.support.sharded import (
    LAYOUTS,
    SOLVERS,
    alone,
    assert_reports,
    dense,
    rule_of,
)

vma = pytest.mark.parametrize("check_vma", rows([True, False], [True]))

# By default the defaults.
DEFAULT = {
    ("hybrid", "adaptive", "batch", True),
}
TABLE = sharded.table(
    DEFAULT,
    SOLVERS,
    [rule for rule in RULES if rule != "callable"],  # refused: see below
    LAYOUTS,
    (True, False),
)


@pytest.mark.parametrize(("solver", "rule", "layout", "check_vma"), TABLE)
def test_a_state_in_parts_is_solved_as_a_whole(solver, rule, layout, check_vma):
    """Gradients and reports are those of one device, and of a dense solve."""
    *want, report = alone(solver, rule)
    *got, reports = sharded.gradient_in_parts(
        LAYOUTS[layout], SOLVERS[solver], rule_of(rule), check_vma
    )
    assert report.converged == 1
    assert_close(got, want, 1e-12)
    assert_close(got, dense(), 1e-11 if rule == "neumann_steps" else 1e-12)
    assert_reports(reports, report)


def parts(name, check_vma, f, **specs):
    """``f`` of ``w, x`` and of the step of a layout, on each of its devices."""
    layout = LAYOUTS[name]
    specs = {"out_specs": P()} | specs
    return jax.jit(
        jax.shard_map(
            lambda w, x: f(layout, w, x),
            mesh=layout.mesh(),
            in_specs=(layout.w, layout.h),
            check_vma=check_vma,
            **specs,
        )
    )


@pytest.mark.full
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_rule_of_a_users_own_is_refused(check_vma):
    """By the line to write; or taken, where it says that its sums go over the axis."""

    def own(vjp, cotangent):
        z = rbpjax.Neumann(steps=300)(vjp, cotangent).value
        return rbpjax.Solution(value=z, converged=jnp.array(True))

    layout = LAYOUTS["batch"]
    grad = lambda: sharded.gradient_in_parts(layout, SOLVERS["steps"], own, check_vma)
    with pytest.raises(ValueError, match=r"backward=rbpjax.Adaptive\(\)") as error:
        grad()
    assert "axis_names = ('a',)" in str(error.value)
    own.axis_names = ("a",)
    assert_close(grad()[:2], dense(), 1e-11)


@pytest.mark.full
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_word_on_failures_is_no_rule_of_a_users_own(check_vma):
    """With ``on_failure`` the same gradient; and what is refused stays so."""
    w, x, _ = sharded.data()

    def gradient(layout, w, x, rule=rbpjax.Adaptive(tol=1e-14)):
        solve = rbpjax.rbp_solve(
            layout.step, forward=SOLVERS["hybrid"], backward=rule, on_failure="nan"
        )
        total = lambda w: jnp.sum(jnp.sin(solve(w, x, 0 * x).value))
        return (
            lax.psum(jax.grad(total)(w), "a") if not check_vma else jax.grad(total)(w)
        )

    def whole(w):
        solve = rbpjax.rbp_solve(sharded.whole_step, forward=SOLVERS["hybrid"])
        return jnp.sum(jnp.sin(solve(w, x, 0 * x).value))

    got = parts("batch", check_vma, gradient)(w, x)
    np.testing.assert_allclose(got, jax.grad(whole)(w), rtol=1e-9)
    own = lambda vjp, cotangent: rbpjax.Solution(cotangent, converged=True)
    with pytest.raises(ValueError, match=r"backward=rbpjax.Adaptive\(\)"):
        parts("batch", check_vma, lambda *args: gradient(*args, rule=own))(w, x)


def test_a_solver_of_a_users_own_is_refused():
    def own(step, h0):
        found = lax.fori_loop(0, 100, lambda _, h: step(h), h0)
        return rbpjax.Solution(value=found, converged=jnp.array(True))

    with pytest.raises(ValueError, match=r"forward=rbpjax.Hybrid\(\)"):
        sharded.gradient_in_parts(LAYOUTS["batch"], own, rbpjax.Neumann(), True)


@pytest.mark.full
@pytest.mark.parametrize("check_vma", [True, False])
def test_bptt_reports_the_residual_of_the_whole(check_vma):
    def residual(layout, w, x):
        found = rbpjax.bptt(layout.step, 5)(w, x, 0 * x)
        return found.residual[None]

    got = parts("batch", check_vma, residual, out_specs=P("a"))(*sharded.data()[:2])
    w, x, _ = sharded.data()
    want = rbpjax.bptt(sharded.whole_step, 5)(w, x, 0 * x).residual
    np.testing.assert_allclose(got, np.full(8, want), rtol=1e-12)


@pytest.mark.full
@pytest.mark.parametrize("check_vma", [True, False])
def test_diagnostics_of_a_state_in_parts(check_vma):
    """The spectral radius and the norm of J, and an adjoint's residual."""
    w, x, weights = sharded.data()
    key = jax.random.key(0)

    def measured(f, w, x, weights):
        h = 0.1 * x
        radius = rbpjax.diagnostics.spectral_radius(key, f, w, x, h, num_steps=400)
        norm = rbpjax.diagnostics.jacobian_norm(key, f, w, x, h, num_steps=60)
        left = rbpjax.diagnostics.adjoint_residual(f, w, x, h, weights, weights)
        return jnp.stack([radius, norm, left])

    layout = LAYOUTS["batch"]
    local = lambda w, x, weights: measured(layout.step, w, x, weights)[None]
    got = jax.jit(
        jax.shard_map(
            local,
            mesh=layout.mesh(),
            in_specs=(layout.w, layout.h, layout.h),
            out_specs=P("a"),
            check_vma=check_vma,
        )
    )(w, x, weights)
    step = lambda v: sharded.whole_step(w, x, v.reshape(x.shape)).ravel()
    jac = jax.jacobian(step)(0.1 * x.ravel())
    g = weights.ravel()
    radius = jnp.abs(jnp.linalg.eigvals(jac)).max()
    left = jnp.linalg.norm(jac.T @ g) / jnp.linalg.norm(g)
    # Gelfand's formula over the second half of 400 steps; Lanczos, from below, where
    # many singular values lie close together.
    np.testing.assert_allclose(got[:, 0], np.full(8, radius), rtol=1e-2)
    np.testing.assert_allclose(
        got[:, 1], np.full(8, jnp.linalg.norm(jac, 2)), rtol=2e-3
    )
    np.testing.assert_allclose(got[:, 2], np.full(8, left), rtol=1e-12)


def vmapped_step(w, x, h):
    return jnp.tanh((h - lax.pmean(h, "a")) @ w.T + x)


def vmapped_loss(solve):
    def loss(w, x, weights):
        value = solve(w, x, 0 * x).value
        return lax.psum(jnp.sum(weights * jnp.sin(value)), "a")

    return loss


@pytest.mark.parametrize(
    "rule", rows(["neumann", "adaptive", "cg_normal", "direct"], ["neumann"])
)
def test_a_collective_over_the_axis_of_a_vmap(rule):
    """Right where the gradient is taken inside: the rows are solved as one state."""
    solve = rbpjax.rbp_solve(
        vmapped_step, forward=SOLVERS["hybrid"], backward=rule_of(rule)
    )
    grad = jax.vmap(jax.grad(vmapped_loss(solve), 1), (None, 0, 0), axis_name="a")
    # Under vmap the transpose of a psum is a psum: of 16 rows, 16 times the gradient.
    got = jax.jit(grad)(*sharded.data()) / sharded.BATCH
    assert_close(got, dense()[1], 1e-12)


def test_a_gradient_outside_of_such_a_vmap_is_refused():
    solve = rbpjax.rbp_solve(vmapped_step)
    loss = lambda w, x, weights: jnp.sum(
        jax.vmap(vmapped_loss(solve), (None, 0, 0), axis_name="a")(w, x, weights)
    )
    with pytest.raises(ValueError, match=r"jax.vmap\(jax.grad\(loss\), axis_name"):
        jax.grad(loss)(*sharded.data())


@pytest.mark.full
@pytest.mark.parametrize("check_vma", [True, False])
def test_second_order_of_a_state_in_parts(check_vma):
    """A Hessian-vector product, taken outside of the shard_map."""
    layout = LAYOUTS["batch"]
    w, x, weights = sharded.data()
    loss = sharded.in_parts(layout, SOLVERS["hybrid"], rule_of("adaptive"), check_vma)
    probes = ZEROS(layout.shape)
    along = lambda w: jnp.sum(jax.grad(lambda w: loss(w, x, weights, probes))(w) * w)
    solve = rbpjax.rbp_solve(
        sharded.whole_step, forward=SOLVERS["hybrid"], backward=rule_of("adaptive")
    )
    whole = lambda w: jnp.sum(weights * jnp.sin(solve(w, x, 0 * x).value))
    want = jax.jit(jax.grad(lambda w: jnp.sum(jax.grad(whole)(w) * w)))(w)
    assert_close(jax.jit(jax.grad(along))(w), want, 1e-11)


@pytest.mark.parametrize("name", ["uoro", "rtrl"])
@vma
def test_streaming_estimators_refuse_collectives(name, check_vma):
    """Their influence is that of one part alone; jit of sharded arrays is the way."""
    make = getattr(rbpjax.online, name)

    def run(layout, w, x):
        est = make(layout.step, lambda w, h, y: jnp.sum(h * h))
        carry = est.init(w, 0 * x)
        noise = est.noise(jax.random.key(0), carry)
        return est.step(w, carry, x, x, noise)[1].loss[None]

    with pytest.raises(ValueError, match=r"into `jax\.jit`"):
        parts("batch", check_vma, run, out_specs=P("a"))(*sharded.data()[:2])


@pytest.mark.full
@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_without_collectives_in_f_stay_apart(check_vma):
    """Parameters that they share couple nothing: each has its own report."""
    layout = LAYOUTS["batch"]
    step = lambda w, x, h: jnp.tanh(h @ w.T + x)  # no mean over the batch
    solver, rule = SOLVERS["iteration"], rule_of("neumann")
    *got, reports = sharded.gradient_in_parts(layout, solver, rule, check_vma, step)
    w, x, weights = sharded.data()
    solve = rbpjax.rbp_solve(step, forward=solver, backward=rule)

    def loss(w, x, weights, probe):
        value = solve(w, x, 0 * x, probe).value
        return jnp.sum(weights * jnp.sin(value))

    grad = jax.jit(jax.grad(loss, (0, 1, 3)))
    alone = [
        grad(w, x[i : i + 2], weights[i : i + 2], ZEROS()) for i in range(0, 16, 2)
    ]
    assert_close(got[0], sum(found[0] for found in alone), 1e-12)
    for name in ("cotangent_norm", "forward_steps", "num_steps"):
        want = np.array([getattr(found[2], name) for found in alone])
        np.testing.assert_allclose(getattr(reports, name), want, rtol=1e-12)
        assert len(set(want.tolist())) > 1, name  # or they are alike anyhow
