"""Every rule of ``RULES`` on several devices: shard_map and sharded arrays."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rbpjax
from tests.support.problems import (
    CONVERGED_RTOL,
    FORWARD,
    RULES,
    XS,
    ZEROS,
    Problem,
    W,
    assert_close,
    assert_same_reports,
    dense_gradient,
    loss_and_report,
    readout,
    reports_alone,
    rows,
    solver_of,
    tanh_step,
    total_dense,
)

pytestmark = pytest.mark.parametrize(
    "name", rows(RULES.keys(), ("neumann", "adaptive"))
)
vma = pytest.mark.parametrize("check_vma", rows([True, False], [True]))
axis_types = pytest.mark.parametrize(
    "axis_type", rows([AxisType.Auto, AxisType.Explicit], [AxisType.Explicit])
)

DIRECTION = jnp.array([[0.3, 1.0, -0.5], [0.7, -0.2, 0.4], [0.1, 0.9, -1.0]])


def mesh_of(axis_type):
    return jax.make_mesh((4,), ("d",), axis_types=(axis_type,))


def skip_gmres(name, check_vma):
    if name == "callable" and check_vma:
        pytest.skip("jax.scipy's gmres cannot be traced with check_vma, alone neither")


@vma
def test_gradient_inside_shard_map(name, check_vma):
    """Gradients taken on each device, of replicated params, closed-over ones too."""
    skip_gmres(name, check_vma)
    probes = ZEROS((4,))

    def local(w, gain, x, probes):
        def loss(w, gain, x, probes):
            f = lambda w, x, h: jnp.tanh(w @ h + gain * x)  # gain is closed over
            probe = jax.tree.map(lambda p: p[0], probes)
            return readout(solver_of(f, name)(w, x[0], jnp.zeros(3), probe).value)

        bars = jax.grad(loss, (0, 1, 2, 3))(w, gain, x, probes)
        if check_vma:  # the cotangent of a replicated array is summed by its type
            return bars
        return *jax.lax.psum(bars[:2], "d"), *bars[2:]

    mapped = jax.shard_map(
        local,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P(), P(), P("d"), P("d")),
        out_specs=(P(), P(), P("d"), P("d")),
        check_vma=check_vma,
    )
    w_bar, gain_bar, x_bar, report = jax.jit(mapped)(W, jnp.array(1.0), XS, probes)
    want = total_dense()
    assert_close((w_bar, x_bar), want, CONVERGED_RTOL)
    # ∂L/∂gain = Σ x·x̄ at gain = 1, since gain and x enter as a product.
    assert_close(gain_bar, jnp.sum(XS * want[1]), CONVERGED_RTOL)
    assert_same_reports(report, reports_alone(name))


@vma
def test_gradient_through_shard_map(name, check_vma):
    """The gradient taken outside of a shard_map over the batch."""
    skip_gmres(name, check_vma)
    solve = solver_of(tanh_step, name)

    def local(w, x):
        loss = readout(solve(w, x[0], jnp.zeros(3)).value)
        return jax.lax.psum(loss, "d")

    loss = jax.shard_map(
        local,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P(), P("d")),
        out_specs=P(),
        check_vma=check_vma,
    )
    assert_close(jax.jit(jax.grad(loss, (0, 1)))(W, XS), total_dense(), CONVERGED_RTOL)


def test_second_order_inside_shard_map(name):
    """Hessian-vector products on each device under strict checks of varying axes."""
    skip_gmres(name, True)
    loss = loss_and_report(name)

    def hvp(w, x):
        along = lambda w: jnp.sum(jax.grad(loss)(w, x, None) * DIRECTION)
        return jax.grad(along)(w)

    def local(w, x):
        w = jax.lax.pcast(w, "d", to="varying")  # or the inner gradient is the sum
        return jax.lax.psum(hvp(w, x[0]), "d")

    mapped = jax.shard_map(
        local, mesh=mesh_of(AxisType.Auto), in_specs=(P(), P("d")), out_specs=P()
    )
    want = jax.jit(jax.vmap(hvp, (None, 0)))(W, XS).sum(0)
    assert_close(jax.jit(mapped)(W, XS), want, CONVERGED_RTOL)


@axis_types
def test_sharded_arrays(name, axis_type):
    """Under jit with a batch sharded over devices, on Auto and on explicit meshes."""
    if name == "callable" and axis_type == AxisType.Explicit:
        pytest.skip("jax.scipy's gmres does not know explicit sharding")
    mesh = mesh_of(axis_type)
    problem = Problem(lambda w, x, h: jnp.tanh(h @ w.T + x), W, XS, jnp.zeros_like(XS))
    solve = rbpjax.rbp_solve(problem.f, forward=FORWARD, backward=RULES[name])

    def loss(w, x, h0, probe):
        return jnp.sum(
            jnp.sin(solve(w, x, h0, probe).value) * jnp.arange(1.0, 4.0)[None]
        )

    grad = jax.jit(jax.grad(loss, (0, 1, 3)))
    with jax.set_mesh(mesh):
        shard = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
        w, x, h0 = shard(W, P()), shard(XS, P("d")), shard(jnp.zeros((4, 3)), P("d"))
        *got, report = jax.device_get(grad(w, x, h0, ZEROS()))
    assert report.converged == 1
    assert_close(got, total_dense(), CONVERGED_RTOL)


@axis_types
def test_sharded_weight_matrix(name, axis_type):
    """Rows of one weight matrix, and with them the units, over eight devices."""
    if name == "callable" and axis_type == AxisType.Explicit:
        pytest.skip("jax.scipy's gmres does not know explicit sharding")
    k1, k2 = jax.random.split(jax.random.key(5))
    w = jax.random.normal(k1, (16, 16)) * 0.15
    x = jax.random.normal(k2, (16,))
    mesh = jax.make_mesh((8,), ("m",), axis_types=(axis_type,))
    explicit = axis_type == AxisType.Explicit

    def f(w, x, h):
        # A contraction over a sharded axis has to be asked for on explicit meshes.
        everywhere = jax.reshard(h, P()) if explicit else h
        return jnp.tanh(w @ everywhere + x)

    solve = rbpjax.rbp_solve(f, forward=FORWARD, backward=RULES[name])
    weight = jnp.arange(1.0, 17.0)

    def loss(w, x, weight, h0, probe):
        return jnp.sum(weight * jnp.sin(solve(w, x, h0, probe).value))

    with jax.set_mesh(mesh):
        shard = lambda a: jax.device_put(a, NamedSharding(mesh, P("m")))
        args = (*map(shard, (w, x, weight, jnp.zeros(16))), ZEROS())
        *got, report = jax.device_get(jax.jit(jax.grad(loss, (0, 1, 4)))(*args))
    assert report.converged == 1
    dense = Problem(lambda w, x, h: jnp.tanh(w @ h + x), w, x, jnp.zeros(16))
    assert_close(got, dense_gradient(dense), CONVERGED_RTOL)
