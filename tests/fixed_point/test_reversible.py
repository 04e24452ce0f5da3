"""The reversible iteration against BPTT of the same steps, written out by a scan."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from rbpjax import AdjointReport, Status, reversible
from tests.support.problems import (
    EXPANSIVE,
    IDENTITY_RTOL,
    PROBLEMS,
    XS,
    W,
    assert_close,
    readout,
    rows,
    tanh_step,
)

ALL = PROBLEMS | {"expansive": EXPANSIVE}


def stored(f, num_steps, damping):
    """The same iteration with its history."""

    def value(params, inputs, h0):
        mix = partial(jax.tree.map, lambda u, v: damping * u + (1 - damping) * v)

        def body(pair, _):
            y, z = pair
            y = mix(y, f(params, inputs, z))
            return (y, mix(z, f(params, inputs, y))), None

        return jax.lax.scan(body, (h0, h0), length=num_steps)[0][1]

    return value


def start(problem):
    """A start whose gradient says something."""
    return jax.tree.map(lambda x: x + 0.3, problem.h0)


def bars(value, problem, argnums=(0, 1, 2)):
    """Loss, and gradients for params, inputs and h0."""
    loss = lambda *args: readout(value(*args))
    args = problem.params, problem.inputs, start(problem)
    return jax.jit(jax.value_and_grad(loss, argnums))(*args)


def value_of(solve):
    return lambda *args: solve(*args).value


@pytest.mark.parametrize("anchors", rows([1, 3, 7, 100], (1, 3)))
@pytest.mark.parametrize("name", rows(list(ALL), ("pytree", "expansive")))
def test_the_gradient_is_that_of_the_stored_steps(name, anchors):
    """Value and gradients after 7 steps, nothing converged; legs of unequal length.

    Rounding, 1e-16, grows by at most 1 / 0.4² a step, 4e5 in seven.
    """
    problem = ALL[name]
    loss, got = bars(
        value_of(reversible(problem.f, 7, damping=0.4, anchors=anchors)), problem
    )
    want_loss, want = bars(stored(problem.f, 7, 0.4), problem)
    chex.assert_trees_all_close(loss, want_loss, rtol=1e-13)
    for bar, wanted in zip(got, want, strict=True):
        assert_close(bar, wanted, IDENTITY_RTOL)


def loop(scale, n=8):
    """A tanh network, W orthogonal times ``scale``: at 1.2 it does not contract."""
    w = scale * jnp.linalg.qr(jax.random.normal(jax.random.key(0), (n, n)))[0]
    x = jax.random.normal(jax.random.key(1), (n,))
    f = lambda w, x, h: jnp.tanh(w @ h + x)
    return PROBLEMS["linear"]._replace(f=f, params=w, inputs=x, h0=jnp.zeros(n))


@cache
def thousand(scale, damping):
    return bars(stored(loop(scale).f, 1000, damping), loop(scale))[1]


def probed(problem, *args, **options):
    """Gradients for params, inputs and h0, and the report."""
    solve = reversible(problem.f, *args, **options)
    loss = lambda p, x, h, probe: readout(solve(p, x, h, probe).value)
    grads = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
    *got, report = grads(
        problem.params, problem.inputs, start(problem), AdjointReport.zeros()
    )
    return got, report


@pytest.mark.parametrize(("damping", "anchors"), [(0.995, 1), (0.5, 80), (0.2, 200)])
@pytest.mark.parametrize("scale", [0.9, 1.2])
def test_a_thousand_steps_in_double_precision(scale, damping, anchors):
    """To 1e-8, where the digits of a leg suffice: damping^(-2 · 1000 / anchors) < 1e9.

    At a damping of 0.995 the iteration has not come to rest: h0's gradient counts.
    """
    assert damping ** (-2 * 1000 / anchors) < 1e9
    got, report = probed(loop(scale), 1000, damping=damping, anchors=anchors)
    want = thousand(scale, damping)
    moving = damping == 0.995
    for bar, wanted in list(zip(got, want, strict=True))[: 3 if moving else 2]:
        assert_close(bar, wanted, 1e-8)
    assert report.converged == 1 and report.bound <= 1e-8
    assert report.num_steps == report.forward_steps == 1000
    assert (report.forward_residual > 1e-4) == moving


@pytest.mark.parametrize("scale", rows([0.3, 0.9, 1.2], (1.2,)))
@pytest.mark.parametrize(
    ("num_steps", "damping", "anchors"),
    [(12, 0.2, 1), (20, 0.2, 1), (40, 0.5, 1), (1000, 0.5, 8), (1000, 0.99, 1)],
)
def test_what_rounding_does_is_reported(scale, num_steps, damping, anchors):
    """The bound holds, and is no more than a thousand times the error.

    Drift of 1e27 does no harm where the cotangent has died away: so says the bound.
    """
    problem, options = loop(scale), {"damping": damping, "anchors": anchors}
    got, report = probed(problem, num_steps, **options, on_failure="ignore")
    want = bars(stored(problem.f, num_steps, damping), problem)[1]
    norm = lambda x: float(jnp.linalg.norm(x))
    pairs = list(zip(got[:2], want[:2], strict=True))
    error = max(norm(a - b) / norm(b) for a, b in pairs)
    assert 1e-3 * report.bound - 1e-15 <= error <= report.bound + 1e-15
    assert report.residual >= report.bound / 4
    assert bool(report.converged) == bool(report.bound <= 2**-26)
    assert report.status == (0 if report.converged else Status.ROUNDING)


def test_a_spoilt_gradient_is_never_silent():
    """NaN by default; a warning, an error, or the report alone, where asked for."""
    problem = loop(1.2)
    spoilt = {"num_steps": 30, "damping": 0.2, "anchors": 1}
    args = problem.params, problem.inputs, start(problem)
    grad = lambda **options: jax.grad(
        lambda p: readout(reversible(problem.f, **options)(p, *args[1:]).value)
    )(args[0])
    assert jnp.isnan(grad(**spoilt)).all()
    assert jnp.isfinite(grad(**spoilt, on_failure="ignore")).all()
    assert jnp.isfinite(grad(**spoilt | {"anchors": 10})).all()
    with pytest.warns(RuntimeWarning, match="reversible, backward: rounding"):
        jax.block_until_ready(grad(**spoilt, on_failure="warn"))
        jax.effects_barrier()
    assert jnp.isfinite(reversible(problem.f, **spoilt)(*args).value).all()
    # What overflows on the way back is no number, whatever was asked for.
    got, report = probed(problem, 2000, damping=0.3, anchors=1, on_failure="ignore")
    assert jnp.isnan(got[0]).any() and jnp.isinf(report.bound)
    assert report.converged == 0


def temp_bytes(num_steps, **options):
    """Temporary memory of a compiled gradient: 16 units, a batch of 4."""
    w = jax.random.normal(jax.random.key(0), (16, 16)) / 8
    x = jax.random.normal(jax.random.key(1), (4, 16))
    solve = reversible(lambda w, x, h: jnp.tanh(h @ w + x), num_steps, **options)
    loss = lambda w: jnp.sum(jnp.sin(solve(w, x, jnp.zeros_like(x)).value))
    compiled = jax.jit(jax.grad(loss)).lower(w).compile()
    return compiled.memory_analysis().temp_size_in_bytes, x.nbytes


def test_memory_is_the_same_for_any_number_of_steps():
    """To the byte where the legs are equal; anchors are pairs of states."""
    for anchors in (1, 2, 10):
        few, state = temp_bytes(50, anchors=anchors)
        assert 0 < temp_bytes(5000, anchors=anchors)[0] == few
    few, state = temp_bytes(50)  # legs of 7 and 6; of 625 alone
    assert temp_bytes(5000)[0] <= few
    assert temp_bytes(5002)[0] == few
    many, state = temp_bytes(5000, anchors=100)
    # 2 · 90 states, twice where the compiler keeps a copy.
    assert many - temp_bytes(5000, anchors=10)[0] <= 2 * 2 * 90 * state


def test_transformations():
    """Under jit, vmap with a probe each, scan, and remat: the gradients alone."""
    solve = reversible(tanh_step, 12, damping=0.5)
    loss = lambda w, x, probe=None: readout(solve(w, x, jnp.zeros(3), probe).value)
    alone = [jax.jit(jax.grad(loss, (0, 1)))(W, x) for x in XS]
    want = jax.tree.map(lambda *rows: jnp.stack(rows), *alone)
    many = jax.vmap(jax.grad(loss, (0, 1, 2)), (None, 0, 0))
    *got, reports = jax.jit(many)(W, XS, AdjointReport.zeros((len(XS),)))
    assert_close(tuple(got), want, 1e-12)
    chex.assert_shape(reports.bound, (len(XS),))
    assert (reports.converged == 1).all() and (reports.num_products == 24).all()
    summed = lambda w, xs: jax.lax.scan(lambda s, x: (s + loss(w, x), None), 0.0, xs)[0]
    w_bar, x_bar = jax.jit(jax.grad(summed, (0, 1)))(W, XS)
    assert_close((w_bar, x_bar), (want[0].sum(0), want[1]), 1e-12)
    assert_close(jax.grad(jax.checkpoint(loss))(W, XS[1]), alone[1][0], 1e-12)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda w: loss(w, XS[0]), (W,), (W,))


def test_the_second_order():
    """A Hessian row by row is that of the stored steps."""
    problem = PROBLEMS["linear"]
    f = lambda w, x, h: jnp.tanh(problem.f(w, x, h))
    of = lambda value: lambda w: readout(value(w, problem.inputs, problem.h0))
    hessian = lambda value: jax.jit(jax.jacrev(jax.grad(of(value))))(problem.params)
    got = hessian(value_of(reversible(f, 5, damping=0.4, anchors=2)))
    assert_close(got, hessian(stored(f, 5, 0.4)), 1e-9)


def test_closures_integers_and_functions():
    """What f closes over has a gradient; integers, keys and functions may be there."""
    key = jax.random.key(5)

    def loss(a, params, make):
        def f(params, inputs, h):
            noise = jax.random.normal(inputs["key"], (2,))
            rolled = jnp.roll(h, params["shift"])
            return inputs["act"](params["w"] * rolled + a) + 0.1 * noise

        inputs = {"key": key, "act": jnp.tanh}
        return readout(make(f)(params, inputs, jnp.ones(2)))

    params = {"w": jnp.array([0.5, -0.8]), "shift": jnp.int32(1)}
    a = jnp.array([0.3, -0.2])
    grad = lambda make: jax.jit(
        jax.grad(loss, (0, 1), allow_int=True), static_argnums=2
    )(a, params, make)
    got = grad(lambda f: value_of(reversible(f, 6)))
    want = grad(lambda f: stored(f, 6, 0.5))
    assert_close((got[0], got[1]["w"]), (want[0], want[1]["w"]), IDENTITY_RTOL)
    assert got[1]["shift"].dtype == jax.dtypes.float0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex128])
def test_dtypes(dtype):
    """Half precision is carried in float32; complex states as pairs of reals."""
    turn = dtype(jnp.exp(1j) if dtype == jnp.complex128 else 1)
    cast = lambda x: x.astype(dtype) * turn
    w, x = cast(W), cast(XS[0])
    f = lambda w, x, h: jnp.tanh(w @ h + x)
    solve = reversible(f, 20, damping=0.5)
    size = lambda h: jnp.sum(jnp.abs(h - 0.1) ** 2).astype(jnp.float32)
    loss = lambda value: jax.jit(jax.value_and_grad(lambda w: size(value(w, x, 0 * x))))
    assert solve(w, x, 0 * x).value.dtype == dtype
    (value, got), (want_value, want) = (
        loss(v)(w) for v in (value_of(solve), stored(f, 20, 0.5))
    )
    eps = float(jnp.finfo(dtype).eps)
    assert got.dtype == dtype and jnp.abs(value - want_value) <= 30 * eps + 1e-6
    wide = lambda x: jnp.stack([x.real, x.imag]).astype(float)
    # Of bfloat16 every VJP rounds.
    assert_close(wide(got), wide(want), max(30 * eps, 1e-9))


def test_a_state_in_parts():
    """Inside shard_map, with a sum over devices in f: gradients, and one verdict."""
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    w = jax.random.normal(jax.random.key(2), (4, 4)) / 4
    x = jnp.array([0.4, -1.0, 0.3, 2.0])

    def in_parts(w, x, h):
        return jnp.tanh(jax.lax.psum_scatter(w @ h, "a", tiled=True) + x)

    def part(w, x, probe):
        solve = reversible(in_parts, 9, damping=0.4, anchors=2)
        loss = lambda w, x, probe: jax.lax.psum(
            jnp.sum(solve(w, x, jnp.zeros_like(x), probe).value ** 2), "a"
        )
        *got, report = jax.grad(loss, (0, 1, 2))(w, x, probe)
        return *got, jax.tree.map(lambda r: r[None], report)

    layout = P(None, "a"), P("a")
    run = jax.shard_map(
        lambda w, x: part(w, x, AdjointReport.zeros()),
        mesh=mesh,
        in_specs=layout,
        out_specs=(*layout, P("a")),
    )
    *got, reports = jax.jit(run)(w, x)
    whole = stored(lambda w, x, h: jnp.tanh(w @ h + x), 9, 0.4)
    want = jax.grad(lambda w, x: jnp.sum(whole(w, x, 0 * x) ** 2), (0, 1))(w, x)
    assert_close(tuple(got), want, IDENTITY_RTOL)
    chex.assert_trees_all_equal(
        *(jax.tree.map(lambda r, i=i: r[i], reports) for i in (0, 1))
    )


def test_solution_and_aux():
    """A fixed point of f is one of both states; aux is of one evaluation more."""
    f = lambda a, x, h: (a * h + x, {"twice": 2 * h})
    solve = reversible(f, 200, has_aux=True)
    solution = solve(0.5, 1.0, 0.0)
    assert solution.converged and solution.num_steps == 200
    chex.assert_trees_all_close(solution.value, 2.0, rtol=1e-12)
    chex.assert_trees_all_close(solution.aux["twice"], 4.0, rtol=1e-12)
    zero = jax.grad(lambda a: solve(a, 1.0, 0.0).residual)(0.5)
    assert zero == 0
    # A probe that brings an adjoint gets one of zeros: there is none to go on from.
    probe = AdjointReport.zeros(adjoint=jnp.ones(()))
    loss = lambda probe: reversible(affine_step, 5)(0.5, 1.0, 0.0, probe).value
    assert jax.grad(loss)(probe).adjoint == 0


def affine_step(a, x, h):
    return a * h + x


def test_an_example_that_is_not_finite_stays_alone():
    """NaN in one example of a vmap leaves the others as they are."""
    solve = reversible(tanh_step, 8)
    grad = jax.grad(lambda w, x: readout(solve(w, x, jnp.zeros(3)).value), 1)
    xs = XS.at[1, 0].set(jnp.nan)
    got = jax.jit(jax.vmap(grad, (None, 0)))(W, xs)
    keep = jnp.array([0, 2, 3])
    assert jnp.isnan(got[1]).any()
    want = jax.vmap(grad, (None, 0))(W, XS)
    chex.assert_trees_all_close(got[keep], want[keep], rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 0}, "`num_steps`.*at least 1.*got 0"),
        ({"num_steps": 2.0}, "`num_steps`.*got 2.0"),
        ({"anchors": 0}, "`anchors`.*at least 1.*got 0"),
        ({"damping": 0.0}, "`damping`.*strictly between.*got 0.0.*bptt"),
        ({"damping": 1}, "`damping`.*got 1"),
        ({"damping": True}, "`damping`.*got True"),
        ({"on_failure": "stop"}, "`on_failure`.*'nan'.*got 'stop'"),
    ],
)
def test_options_out_of_range(options, words):
    """A ValueError with the name, the value and the range."""
    with pytest.raises(ValueError, match=words):
        reversible(affine_step, **{"num_steps": 5} | options)
