"""Rules that start from an earlier adjoint, and the probe that brings it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rbpjax
from rbpjax import (
    CG,
    RBP,
    Adaptive,
    AdjointReport,
    BiCGSTAB,
    CGNormal,
    FixedPointIteration,
    Neumann,
)
from rbpjax.fixed_point.backward.rule import takes_start
from tests.support.problems import (
    CONVERGED_RTOL,
    EXPANSIVE,
    FIXED_COUNT,
    FORWARD,
    IDENTITY_RTOL,
    PROBLEMS,
    ROBUST,
    RULES,
    XS,
    W,
    assert_close,
    dense_gradient,
    dense_jacobian,
    fixed_point,
    loss_and_report,
    readout,
    rows,
)

STARTED = {name: rule for name, rule in RULES.items() if takes_start(rule)}


def adjoint_problem(problem):
    """(jac, g, z, unravel) of ``readout``, with z by LU."""
    h = fixed_point(problem)
    jac = dense_jacobian(problem, h)
    g, unravel = ravel_pytree(jax.grad(readout)(h))
    return jac, g, jnp.linalg.solve(jnp.eye(len(g)) - jac.T, g), unravel


def run(rule, jac, g, start=None):
    """The rule's solution for a dense Jacobian."""
    solve = jax.jit(lambda jac, g, start: rule(lambda v: jac.T @ v, g, start=start))
    return solve(jac, g, start)


def other(like, seed=0):
    """A vector that has nothing to do with the adjoint."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=like.shape))


@pytest.mark.parametrize("name", rows(STARTED.keys()))
def test_from_anywhere_to_the_same_adjoint(name):
    """From a random start too the answer is the dense one, on every map."""
    problems = dict(PROBLEMS, **({"expansive": EXPANSIVE} if name in ROBUST else {}))
    for problem in problems.values():
        jac, g, z, _ = adjoint_problem(problem)
        solution = run(STARTED[name], jac, g, other(g))
        assert solution.converged
        assert_close(solution.value, z, CONVERGED_RTOL)


@pytest.mark.parametrize("name", rows(n for n in STARTED if n not in FIXED_COUNT))
@pytest.mark.parametrize("scale", rows([1.0, -1e-200, 1e150], [-1e-200]))
def test_a_start_at_the_adjoint_is_the_end(name, scale):
    """Any multiple of the answer: its size is fitted, so that no step is left.

    One at most, of methods that look at a residual only after a step.
    """
    jac, g, z, _ = adjoint_problem(PROBLEMS["tanh_rnn"])
    cold, warm = (run(STARTED[name], jac, g, start) for start in (None, scale * z))
    assert warm.converged and int(cold.num_steps) > 4
    assert int(warm.num_steps) <= 1
    assert_close(warm.value, z, CONVERGED_RTOL)


@pytest.mark.parametrize("name", rows(STARTED.keys()))
@pytest.mark.parametrize("bad", rows([0.0, jnp.nan, jnp.inf], [0.0, jnp.inf]))
def test_a_useless_start_is_none(name, bad):
    """Zero, or not finite: bit for bit what the rule does without one."""
    jac, g, _, _ = adjoint_problem(PROBLEMS["linear"])
    start = jnp.zeros_like(g).at[0].set(bad)
    cold, warm = run(STARTED[name], jac, g), run(STARTED[name], jac, g, start)
    if name.startswith("rbp") or name in ("anderson", "rre"):  # they iterate from g
        assert warm.converged
        assert_close(warm.value, cold.value, CONVERGED_RTOL)
    else:
        # The factor of the damped series is fused with the sum in one of them.
        rounding = 4e-16 if name == "phantom" else 0
        np.testing.assert_allclose(warm.value, cold.value, rounding, 0)
        assert int(warm.num_steps) == int(cold.num_steps)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_truncated_series_are_added_to_the_start(damping):
    """In closed form: z = a s + ω Σ_{k ≤ K} Bᵏ (g - a(I - Jᵀ)s), with the best a."""
    jac, g, _, _ = adjoint_problem(PROBLEMS["tanh_rnn"])
    s, eye, omega = other(g), jnp.eye(len(g)), 1 - damping
    b = omega * jac.T + damping * eye
    image = s - jac.T @ s
    a = image @ g / (image @ image)
    terms = [jnp.linalg.matrix_power(b, k) @ (g - a * image) for k in range(4)]
    got = run(Neumann(steps=3, damping=damping), jac, g, s)
    assert_close(got.value, a * s + omega * sum(terms), IDENTITY_RTOL)
    assert int(got.num_steps) == 3


def test_steps_of_naive_rbp_from_a_start():
    """Algorithm 1 from the best multiple: z ↦ g + Jᵀz, so many times."""
    jac, g, _, _ = adjoint_problem(PROBLEMS["tanh_rnn"])
    s = other(g)
    image = s - jac.T @ s
    z = image @ g / (image @ image) * s
    for _ in range(3):
        z = g + jac.T @ z
    got = run(RBP(FixedPointIteration(steps=3), seed=5), jac, g, s)
    assert_close(got.value, z, IDENTITY_RTOL)


def test_the_ridge_keeps_its_own_solution():
    """From the undamped answer, where the residual is zero: to the damped one."""
    jac, g, z, _ = adjoint_problem(PROBLEMS["tanh_rnn"])
    a = jnp.eye(len(g)) - jac.T
    want = jnp.linalg.solve(a.T @ a + 0.1 * jnp.eye(len(g)), a.T @ g)
    assert jnp.linalg.norm(want - z) > 0.01 * jnp.linalg.norm(z)
    got = run(CGNormal(tol=1e-10, ridge=0.1), jac, g, z)
    assert got.converged and int(got.num_steps) > 0
    assert_close(got.value, want, 1e-8)


def test_symmetric_cg_from_a_start():
    """CG, which is not in the common table, on a symmetric J."""
    jac, g, _, _ = adjoint_problem(PROBLEMS["tanh_rnn"])
    jac = 0.5 * (jac + jac.T)
    z = jnp.linalg.solve(jnp.eye(len(g)) - jac, g)
    near = run(CG(tol=1e-8), jac, g, z + 1e-3 * other(g))
    far = run(CG(tol=1e-8), jac, g)
    assert near.converged and int(near.num_steps) < int(far.num_steps)
    assert_close(near.value, z, 1e-6)


def test_complex_states():
    """A start of complex numbers; its best multiple is real."""
    random = np.random.default_rng(1)
    draw = lambda *shape: random.normal(size=shape) + 1j * random.normal(size=shape)
    jac, g, start = jnp.asarray(0.15 * draw(6, 6)), jnp.asarray(draw(6)), draw(6)
    # (I - Jᵀ) z = g for the transpose, which is what a VJP of a holomorphic step is.
    z = jnp.linalg.solve(jnp.eye(6, dtype=g.dtype) - jac.T, g)
    for rule in (Neumann(tol=1e-12), BiCGSTAB(tol=1e-12), Adaptive(tol=1e-12)):
        got = run(rule, jac, g, jnp.asarray(start))
        assert got.converged
        assert_close(jnp.abs(got.value - z) + 1, jnp.ones(6), CONVERGED_RTOL)


def test_a_start_costs_one_product():
    """Counted by callbacks: at the answer one product, and one for the report."""
    jac, g, z, _ = adjoint_problem(PROBLEMS["linear"])
    calls = []

    def product(v):
        kind = jax.ShapeDtypeStruct((), v.dtype)
        note = lambda x: (calls.append(1), np.zeros_like(x))[1]
        return jac.T @ v + jax.pure_callback(note, kind, v[0])

    rule = Neumann(tol=1e-10)
    jax.block_until_ready(jax.jit(lambda s: rule(product, g, start=s)[:2])(z))
    assert len(calls) == 1
    jax.block_until_ready(jax.jit(lambda s: rule(product, g, start=s))(z))
    assert len(calls) == 1 + 2


# --- the probe -----------------------------------------------------------------------


@pytest.mark.parametrize("name", rows(STARTED.keys()))
def test_the_probe_brings_an_adjoint_and_returns_the_new_one(name):
    """On a state of two leaves: exact in the report, gradient right, fewer steps."""
    problem = PROBLEMS["pytree"]
    _, _, z, unravel = adjoint_problem(problem)
    solve = rbpjax.rbp_solve(problem.f, forward=FORWARD, backward=STARTED[name])

    @jax.jit
    @rbpjax.value_and_grad_with_report
    def loss(params, probe):
        return readout(solve(params, problem.inputs, problem.h0, probe).value)

    first = AdjointReport.zeros(adjoint=jax.tree.map(jnp.zeros_like, problem.h0))
    _, grads, cold = loss(problem.params, probe=first)
    assert_close(cold.adjoint, unravel(z), CONVERGED_RTOL)
    _, again, warm = loss(problem.params, probe=cold)
    want = dense_gradient(problem)[0]
    for got in (grads, again):
        assert_close(got, want, CONVERGED_RTOL)
    assert_close(warm.adjoint, unravel(z), CONVERGED_RTOL)
    if name not in FIXED_COUNT:
        assert warm.num_steps <= 1 < cold.num_steps
    assert jax.tree.structure(warm) == jax.tree.structure(first)


@pytest.mark.full
def test_a_start_has_no_influence_on_derivatives_of_any_order():
    """Gradient and Hessian-vector product from a start that is wrong."""
    loss = loss_and_report("adaptive")
    probe = AdjointReport.zeros(adjoint=jnp.array([3.0, -1.0, 0.5]))
    direction = jnp.ones_like(W)

    def along(w, probe):
        return jnp.vdot(jax.grad(loss)(w, XS[0], probe), direction)

    for probed, bare in (
        (jax.grad(loss)(W, XS[0], probe), jax.grad(loss)(W, XS[0], None)),
        (jax.grad(along)(W, probe), jax.grad(along)(W, None)),
    ):
        assert_close(probed, bare, CONVERGED_RTOL)


def test_under_vmap_each_example_has_its_own_start():
    """Probes mapped over; what was found starts the next one."""
    grad = jax.jit(
        jax.vmap(jax.grad(loss_and_report("adaptive"), (0, 2)), (None, 0, 0))
    )
    probes = AdjointReport.zeros((4,), adjoint=jnp.zeros((4, 3)))
    want, found = grad(W, XS, probes)
    assert (found.num_steps > 2).all()
    got, again = grad(W, XS, found)
    assert (again.num_steps <= 1).all() and (again.converged == 1).all()
    assert_close(got, want, CONVERGED_RTOL)


def test_in_a_scan_over_training_steps():
    """The report as carry of a compiled loop: fewer steps than cold, the same path."""
    problem = PROBLEMS["tanh_rnn"]
    solve = rbpjax.rbp_solve(
        problem.f, forward=FORWARD, backward=Neumann(tol=1e-8, max_steps=500)
    )

    def loss(params, probe):
        return readout(solve(params, problem.inputs, problem.h0, probe).value)

    def descend(warm, carry, _):
        params, start = carry
        _, grads, report = rbpjax.value_and_grad_with_report(loss)(params, probe=start)
        params = jax.tree.map(lambda p, g: p - 1e-6 * g, params, grads)
        return (params, report if warm else start), report.num_steps

    first = AdjointReport.zeros(adjoint=jnp.zeros_like(problem.h0))
    train = lambda warm: jax.jit(
        lambda p: jax.lax.scan(partial(descend, warm), (p, first), None, 10)
    )(problem.params)
    (cold, _), cold_steps = train(False)
    (warm, _), warm_steps = train(True)
    # What moved, not where it moved to: the adjoints' 1e-8 times κ(I - J) below 100.
    moved = lambda params: jax.tree.map(jnp.subtract, params, problem.params)
    scaled = lambda params: jax.tree.map(lambda u: 1e6 * u, moved(params))
    assert_close(scaled(warm), scaled(cold), 1e-6)
    assert warm_steps[0] == cold_steps[0]
    assert warm_steps[1:].sum() < 0.7 * cold_steps[1:].sum()


@pytest.mark.parametrize(
    "axis_type", rows([AxisType.Auto, AxisType.Explicit], [AxisType.Explicit])
)
@pytest.mark.parametrize("name", rows(["neumann", "adaptive", "anderson"], ["neumann"]))
def test_sharded_starts(name, axis_type):
    """A batch over four devices, with starts that are sharded and that are not."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(axis_type,))
    f = lambda w, x, h: jnp.tanh(h @ w.T + x)
    solve = rbpjax.rbp_solve(f, forward=FORWARD, backward=RULES[name])

    def loss(w, x, h0, probe):
        return jnp.sum(
            jnp.sin(solve(w, x, h0, probe).value) * jnp.arange(1.0, 4.0)[None]
        )

    grad = jax.jit(jax.grad(loss, (0, 3)))
    zeros = jnp.zeros((4, 3))
    want, _ = grad(W, XS, zeros, AdjointReport.zeros())
    with jax.set_mesh(mesh):
        shard = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
        w, x, h0 = shard(W, P()), shard(XS, P("d")), shard(zeros, P("d"))
        for spec in (P("d"), P()):
            probe = AdjointReport.zeros(adjoint=shard(zeros + 1.0, spec))
            got, report = grad(w, x, h0, probe)
            assert report.converged == 1
            assert_close(jax.device_get(got), want, CONVERGED_RTOL)
            _, again = grad(w, x, h0, report)
            assert again.num_steps <= 1


def test_inside_shard_map():
    """Each device with its own example, start and report, under strict checks."""
    loss = loss_and_report("adaptive")

    def local(w, x, probes):
        w = jax.lax.pcast(w, "d", to="varying")
        probe = jax.tree.map(lambda p: p[0], probes)
        w_bar, report = jax.grad(loss, (0, 2))(w, x[0], probe)
        return jax.tree.map(lambda u: u[None], (w_bar, report))

    mapped = jax.jit(
        jax.shard_map(
            local,
            mesh=jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,)),
            in_specs=(P(), P("d"), P("d")),
            out_specs=P("d"),
        )
    )
    probes = AdjointReport.zeros((4,), adjoint=jnp.zeros((4, 3)))
    want, found = mapped(W, XS, probes)
    got, again = mapped(W, XS, found)
    assert (again.num_steps <= 1).all()
    assert_close(got, want, CONVERGED_RTOL)
