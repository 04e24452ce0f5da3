"""Recomputed histories against stored ones."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax.unitary import UnitaryCell, recomputed_scan
from rbpjax.unitary.activation import identity, modulus, saturate
from rbpjax.unitary.history import HistoryReport, Inverse, Replay


def stored_scan(f, params, inputs, h0, *, length=None, emit=None):
    def body(h, x):
        h = f(params, x, h)
        return h, None if emit is None else emit(params, x, h)

    return jax.lax.scan(body, h0, inputs, length)


def start(cell):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, *cell.field_shape))
    return jnp.array(z[0] + 1j * z[1])


def cell_problem(activation, steps, amplitude=0.1):
    """A loss of the last state and of a number emitted at each step."""
    cell = UnitaryCell(lattice=(12,), activation=activation)
    weights = cell.init(jax.random.key(0), radius=2, inputs=3, scale=1.0)
    xs = amplitude * jax.random.normal(jax.random.key(1), (steps, 3))
    c = jax.random.normal(jax.random.key(2), (2, 12))
    emit = lambda p, x, h: jnp.vdot(c[1], h.imag) * (1 + x[0])

    def loss(scan, weights, xs, h0):
        h, ys = scan(cell, cell.prepare(weights), xs, h0, emit=emit)
        return jnp.vdot(c[0], h.real) + jnp.mean(jnp.sin(ys))

    return cell, loss, (weights, xs, amplitude * start(cell))


def relative_error(got, expected):
    scale = lambda a: jnp.max(jnp.abs(a))
    parts = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(float(scale(a - b) / scale(b)) for a, b in parts)


HISTORIES = {
    "inverse": (identity, lambda cell: Inverse(inverse=cell.inverse)),
    "anchored inverse": (
        saturate,
        lambda cell: Inverse(inverse=cell.inverse, anchors=7),
    ),
    "replay": (saturate, lambda cell: Replay(slots=5)),
    "one slot": (modulus, lambda cell: Replay(slots=1)),
    "many slots": (modulus, lambda cell: Replay(slots=200)),
}
ONCE = {("inverse", 7), ("anchored inverse", 60), ("replay", 60), ("one slot", 1)}


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param(
            name, steps, marks=() if (name, steps) in ONCE else pytest.mark.full
        )
        for name in HISTORIES
        for steps in (1, 7, 60)
    ],
)
def test_value_and_gradient_equal_those_of_the_stored_history(name, steps):
    """Parameters, inputs, start, emitted results: all as with `lax.scan`."""
    activation, make = HISTORIES[name]
    cell, loss, args = cell_problem(activation, steps)

    def recomputed(*args, **kwargs):
        return recomputed_scan(*args, history=make(cell), **kwargs)

    both = lambda scan: jax.jit(
        jax.value_and_grad(lambda *args: loss(scan, *args), (0, 1, 2))
    )(*args)
    got, expected = both(recomputed), both(stored_scan)
    chex.assert_trees_all_close(got[0], expected[0], rtol=1e-13)
    # 60 steps at amplitude 0.1 amplify rounding by less than 1.015^(3/2·60) ~ 4.
    assert relative_error(got[1], expected[1]) < 1e-12


@pytest.mark.parametrize("activation", [identity, modulus])
def test_ten_thousand_steps(activation):
    """Gradient of the stored history to 1e-8, in memory that is the same for any T."""
    cell = UnitaryCell(lattice=(32,), activation=activation)
    weights = cell.init(jax.random.key(0), radius=2)
    history = (
        Replay(slots=32) if activation is modulus else Inverse(inverse=cell.inverse)
    )

    def loss(scan, weights, h0, steps):
        h, _ = scan(cell, cell.prepare(weights), None, h0, length=steps)
        return jnp.sum(h.real**2 * jnp.arange(32.0))

    def recomputed(*args, **kwargs):
        return recomputed_scan(*args, history=history, **kwargs)

    grads = {
        scan: jax.jit(
            jax.grad(lambda *args, scan=scan: loss(scan, *args), (0, 1)),
            static_argnums=2,
        )
        for scan in (recomputed, stored_scan)
    }
    args = (weights, start(cell))
    expected = grads[stored_scan](*args, 10_000)
    assert jnp.linalg.norm(expected[1]) > 1
    # Measured: 3e-13 for the linear cell, equal bits for the modulus.
    assert relative_error(grads[recomputed](*args, 10_000), expected) < 1e-8
    temp = lambda scan, steps: (
        (grads[scan].lower(*args, steps).compile().memory_analysis()).temp_size_in_bytes
    )
    assert temp(recomputed, 100) == temp(recomputed, 10_000)
    assert temp(stored_scan, 10_000) > 50 * temp(stored_scan, 100)


def test_drift_is_reported_and_anchors_contain_it():
    """The probe's gradient is the drift; more anchors make it and the error smaller."""
    # Amplitude 1: φ⁻¹ amplifies rounding in earnest.
    cell, loss, args = cell_problem(saturate, 150, amplitude=1.0)
    exact = jax.grad(partial(loss, stored_scan), (0, 1, 2))
    expected = jax.jit(exact)(*args)
    drift, error = {}, {}
    for anchors in (1, 15, 150):
        history = Inverse(inverse=cell.inverse, anchors=anchors)

        def total(probe, weights, xs, h0, history=history):
            def scan(*args, **kwargs):
                return recomputed_scan(*args, history=history, probe=probe, **kwargs)

            return loss(scan, weights, xs, h0)

        report, *got = jax.jit(jax.grad(total, (0, 1, 2, 3)))(
            HistoryReport.zeros(), *args
        )
        drift[anchors] = report.drift
        error[anchors] = relative_error(got, expected)
    assert drift[1] > 1e-6 or jnp.isnan(drift[1])  # as useless as it says
    assert drift[150] < 1e-12
    assert error[150] < 1e-10
    assert drift[15] < 1e-6
    assert error[15] < 1e-5


def test_drift_tells_of_a_wrong_inverse():
    """An inverse that forgets the input is caught at the first anchor."""
    cell, loss, args = cell_problem(identity, 20)
    wrong = Inverse(inverse=lambda p, x, h: cell.inverse(p, None, h), anchors=1)

    def total(probe):
        def scan(*args, **kwargs):
            return recomputed_scan(*args, history=wrong, probe=probe, **kwargs)

        return loss(scan, *args)

    assert jax.jit(jax.grad(total))(HistoryReport.zeros()).drift > 0.1


@pytest.mark.parametrize("steps", [20, 3000])
def test_what_grew_and_shrank_again_is_told(steps):
    """Steps that stretch one direction and shrink it later, in float32.

    Rounding grows a hundred million times and is gone at h0, where anchors look. With
    3,000 steps not each of them is looked at.
    """
    random = np.random.default_rng(0).normal(size=(3, 3))
    turn = jnp.array(np.linalg.qr(random)[0], jnp.float32)
    rate = np.float32(10 ** (16 / steps))
    half = jnp.array([rate] * (steps // 2) + [1 / rate] * (steps // 2), jnp.float32)
    c, s = np.cos(0.3), np.sin(0.3)
    spin = jnp.array([[c, 0, -s], [0, 1, 0], [s, 0, c]], jnp.float32)
    stretch = lambda x, h: h.at[1].multiply(x)
    f = lambda p, x, h: p * turn @ spin @ stretch(x, turn.T @ h)
    inverse = lambda p, x, h: turn @ stretch(1 / x, spin.T @ turn.T @ h) / p
    h0 = turn[:, 0]

    def total(p, probe, anchors):
        history = Inverse(inverse=inverse, anchors=anchors)
        h, _ = recomputed_scan(f, p, half, h0, history=history, probe=probe)
        return h[0]

    report, drifts = jax.jit(jax.grad(total, (0, 1)), static_argnums=2), {}
    for anchors in (1, steps):
        _, told = report(jnp.float32(1.0), HistoryReport.zeros(), anchors)
        drifts[anchors] = told.drift

    def there_and_back():
        """The states of both ways, the oracle."""
        states = [h0]
        for x in half:
            states.append(f(jnp.float32(1), x, states[-1]))
        h, error = states[-1], []
        for x, right in zip(half[::-1], states[-2::-1], strict=True):
            h = inverse(jnp.float32(1), x, h)
            error.append(jnp.abs(h - right).max())
        return max(error), error[-1]

    if steps == 20:
        most, last = there_and_back()
        assert last < 1e-3 * most  # an anchor at h0 sees nothing of it
    assert drifts[1] > 0.1 and drifts[steps] == 0


def test_drift_of_a_non_finite_run_is_nan():
    """A run that breaks down says so in the report and does not raise."""
    f = lambda p, x, h: p * h
    history = Inverse(inverse=lambda p, x, h: h / p, anchors=3)

    def total(probe):
        h, _ = recomputed_scan(
            f, 1e200, None, jnp.ones(2), history=history, length=5, probe=probe
        )
        return jnp.sum(h)

    assert jnp.isnan(jax.grad(total)(HistoryReport.zeros()).drift)


def test_a_start_at_zero_is_no_trouble():
    """h0 = 0, the usual one, gives a finite drift; so does a state that stays zero."""
    cell, loss, (weights, xs, h0) = cell_problem(identity, 20)
    for amplitude in (1.0, 0.0):

        def total(probe, amplitude=amplitude):
            def scan(*args, **kwargs):
                history = Inverse(inverse=cell.inverse, anchors=4)
                return recomputed_scan(*args, history=history, probe=probe, **kwargs)

            return loss(scan, weights, amplitude * xs, 0 * h0)

        assert jax.jit(jax.grad(total))(HistoryReport.zeros()).drift < 1e-14


@pytest.mark.parametrize(("slots", "steps"), [(1, 12), (3, 40), (5, 40), (6, 6)])
def test_replay_repeats_no_step_more_often_than_the_binomial_schedule(slots, steps):
    """With C(s + r, s) ≥ T each step is replayed at most r times."""
    seen = []

    def f(params, x, h):
        jax.debug.callback(lambda x: seen.append(int(x)), x)
        return params * h

    def loss(params):
        h, _ = recomputed_scan(
            f, params, jnp.arange(steps), jnp.ones(2), history=Replay(slots=slots)
        )
        return jnp.sum(h)

    jax.block_until_ready(jax.grad(loss)(0.9))
    jax.effects_barrier()
    counts = np.bincount(seen, minlength=steps)
    replays = 0
    while math.comb(slots + replays, slots) < steps:
        replays += 1
    # Besides the replays: once in the forward pass, once under the VJP.
    assert counts.max() <= replays + 2
    assert counts.min() >= 2


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            lambda i: Inverse(inverse=i, anchors=2),
            marks=pytest.mark.full,
            id="inverse",
        ),
        pytest.param(lambda i: Replay(slots=2), id="replay"),
    ],
)
def test_other_leaves_closures_and_transformations(make):
    """Integer and key leaves, closed-over tracers, pytree states, vmap and jit."""

    def problem(scan_with):
        def loss(scale, params, xs, h0):
            # `scale` and `table` are closed over, not passed.
            table = jnp.arange(1.0, 5.0)

            def f(p, x, h):
                noise = 0.01 * jax.random.normal(x["key"], (3,))
                shift = table[x["index"]] * scale
                return {
                    "a": p["w"] @ h["b"] + noise,
                    "b": h["a"] * p["n"].astype(float) + shift * x["drive"],
                }

            def inverse(p, x, h):
                noise = 0.01 * jax.random.normal(x["key"], (3,))
                shift = table[x["index"]] * scale
                a = (h["b"] - shift * x["drive"]) / p["n"].astype(float)
                return {"a": a, "b": jnp.linalg.solve(p["w"], h["a"] - noise)}

            emit = lambda p, x, h: {"y": jnp.sum(h["a"] * x["drive"]) * scale}
            h, ys = scan_with(f, inverse)(f, params, xs, h0, emit=emit)
            return jnp.sum(jnp.sin(h["a"])) + jnp.sum(ys["y"] ** 2)

        return loss

    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "w": jnp.linalg.qr(jax.random.normal(keys[0], (3, 3)))[0],
        "n": jnp.array(-1),
    }
    h0 = {"a": jnp.arange(3.0), "b": jnp.array([1.0, -0.5, 0.2])}
    xs = {
        "key": keys,
        "index": jnp.arange(6) % 4,
        "drive": jax.random.normal(keys[1], (6, 3)),
    }
    grad = lambda scan_with: jax.grad(
        lambda scale, w, drive, h0: problem(scan_with)(
            scale, params | {"w": w}, xs | {"drive": drive}, h0
        ),
        (0, 1, 2, 3),
    )
    args = (jnp.array(0.7), params["w"], xs["drive"], h0)
    expected = jax.jit(grad(lambda f, inverse: stored_scan))(*args)

    def scan_with(f, inverse):
        return lambda *args, **kwargs: recomputed_scan(
            *args, history=make(inverse), **kwargs
        )

    got = jax.jit(grad(scan_with))(*args)
    chex.assert_trees_all_close(got, expected, rtol=1e-12, atol=1e-13)
    batch = jnp.stack([xs["drive"], -xs["drive"]])
    got = jax.jit(jax.vmap(grad(scan_with), (None, None, 0, None)))(
        args[0], args[1], batch, args[3]
    )
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[0], got), expected, rtol=1e-12, atol=1e-13
    )


def test_second_order_with_the_inverse():
    """A Hessian-vector product through the recomputation is right."""
    cell, loss, (weights, xs, h0) = cell_problem(saturate, 6, amplitude=0.5)

    def scan(*args, **kwargs):
        return recomputed_scan(*args, history=Inverse(inverse=cell.inverse), **kwargs)

    def product(scan):
        grad = jax.grad(lambda xs: loss(scan, weights, xs, h0))
        return jax.jit(jax.grad(lambda xs: jnp.sum(grad(xs) ** 2)))(xs)

    assert relative_error(product(scan), product(stored_scan)) < 1e-12


def test_bad_calls_are_refused():
    """Lengths, dtypes and return types are checked before anything is run."""
    f = lambda p, x, h: p * h
    history = Replay(slots=2)
    with pytest.raises(ValueError, match="same leading time axis"):
        recomputed_scan(f, 1.0, None, jnp.ones(2), history=history)
    with pytest.raises(ValueError, match="same leading time axis"):
        recomputed_scan(f, 1.0, jnp.ones(3), jnp.ones(2), history=history, length=4)
    with pytest.raises(ValueError, match="same leading time axis"):
        recomputed_scan(f, 1.0, jnp.ones(()), jnp.ones(2), history=history)
    with pytest.raises(ValueError, match="`h0` must be made of floating-point"):
        recomputed_scan(f, 1.0, None, jnp.ones(2, int), history=history, length=2)
    with pytest.raises(ValueError, match="`f`'s output must have the structure"):
        recomputed_scan(
            lambda p, x, h: (h, h), 1.0, None, jnp.ones(2), history=history, length=2
        )
    with pytest.raises(ValueError, match="at least one step"):
        recomputed_scan(f, 1.0, None, jnp.ones(2), history=history, length=0)
    with pytest.raises(ValueError, match="`inverse`'s output must have the structure"):
        wrong = Inverse(inverse=lambda p, x, h: h[0])
        recomputed_scan(f, 1.0, None, jnp.ones(2), history=wrong, length=2)
    with pytest.raises(ValueError, match="`emit` must return a pytree of floating"):
        recomputed_scan(
            f, 1.0, None, jnp.ones(2), history=history, length=2, emit=lambda *_: 1 > 0
        )
    with pytest.raises(ValueError, match="`slots` must be a Python int"):
        Replay(slots=0)
    with pytest.raises(ValueError, match="`anchors` must be a Python int"):
        Inverse(inverse=f, anchors=jnp.array(3))
    with pytest.raises(TypeError, match="forward-mode"):
        loss = lambda p: jnp.sum(
            recomputed_scan(f, p, None, jnp.ones(2), history=history, length=2)[0]
        )
        jax.jvp(loss, (1.0,), (1.0,))


def drift_of(history, h0, f=None, steps=6):
    """The reported drift, and the relative error of the gradient in the parameter."""
    f = f or (lambda p, x, h: jax.tree.map(lambda a: p * a, h))

    def loss(scan, p, probe):
        h, _ = scan(f, p, None, h0, length=steps, probe=probe)
        return jnp.sum(h["a"]) / jnp.max(jnp.abs(h0["a"]))

    def recomputed(*args, **kwargs):
        return recomputed_scan(*args, history=history, **kwargs)

    def stored(f, p, xs, h0, length, probe):
        return jax.lax.scan(lambda h, x: (f(p, x, h), None), h0, xs, length)

    p = jnp.array(0.9, h0["a"].dtype)
    grad = jax.grad(lambda p, probe: loss(recomputed, p, probe), (0, 1))
    got, report = jax.jit(grad)(p, HistoryReport.zeros())
    exact = jax.grad(lambda p: loss(stored, p, None))(p)
    return float(report.drift), float(abs(got / exact - 1))


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_a_wrong_inverse_is_told_at_every_scale_and_beside_every_leaf(size):
    """States whose squares vanish or overflow, a constant leaf of 1e6 beside."""
    a = jnp.array([0.3, -0.7], jnp.float32) * jnp.float32(size)
    h0 = {"a": a, "still": jnp.array(1e6, jnp.float32)}

    def f(p, x, h):
        return {"a": p * h["a"], "still": h["still"]}

    right = Inverse(inverse=lambda p, x, h: {"a": h["a"] / p, "still": h["still"]})
    wrong = Inverse(inverse=lambda p, x, h: {"a": h["a"], "still": h["still"]})
    drift, error = drift_of(right, h0, f)
    assert drift < 1e-5 and error < 1e-5
    drift, error = drift_of(wrong, h0, f)
    assert error > 0.1 and drift > 0.1


def test_what_is_replaced_by_an_anchor_is_not_reported():
    """An anchor at every step: the inverse is not used, however wrong it is."""
    h0 = {"a": jnp.ones(2)}
    wrong = lambda p, x, h: jax.tree.map(lambda a: a * jnp.nan, h)
    drift, error = drift_of(Inverse(inverse=wrong, anchors=6), h0)
    assert drift == 0 and error < 1e-12
    drift, _ = drift_of(Inverse(inverse=wrong, anchors=3), h0)
    assert np.isnan(drift)


def test_each_example_has_its_own_probe():
    """A probe shared by a vmap is refused; with one each there is a report for each."""
    history = Inverse(inverse=lambda p, x, h: h / p)

    def loss(h0, probe):
        f = lambda p, x, h: p * h
        return recomputed_scan(f, 0.9, None, h0, history=history, length=5, probe=probe)

    scalar = lambda h0, probe: loss(h0, probe)[0]
    many = jnp.arange(1.0, 5.0)
    each = HistoryReport(jnp.zeros(4))
    grad = jax.jit(jax.vmap(jax.grad(scalar, 1)))
    assert grad(many, each).drift.shape == (4,)
    shared = lambda probe: jnp.sum(jax.vmap(scalar, (0, None))(many, probe))
    for transform in (lambda f: f, jax.jit):
        with pytest.raises(ValueError, match="`probe` is shared"):
            transform(jax.grad(shared))(HistoryReport.zeros())
    # Nothing is said where there is no probe, or the whole batch is one state.
    jax.grad(lambda h: jnp.sum(jax.vmap(lambda x: scalar(x, None))(h)))(many)
    jax.grad(lambda p: jnp.sum(scalar(many, p)))(HistoryReport.zeros())


def test_wrong_arguments_are_named():
    """Lengths, histories and probes that are none."""
    f = lambda p, x, h: p * h
    run = lambda **k: recomputed_scan(f, 1.0, None, jnp.ones(2), **k)
    good = Replay(slots=2)
    for options, words in (
        (dict(history=good, length=-3), "`length` must be None or.*-3"),
        (dict(history=good, length=4.0), "`length` must be None or.*4.0"),
        (dict(history=good, length=True), "`length` must be"),
        (dict(history=None, length=4), "`history` must be an Inverse or a Replay"),
        (dict(history=Replay, length=4), "`history` must be an Inverse or a Replay"),
        (dict(history=good, length=4, probe=jnp.zeros(())), "`probe` must be"),
    ):
        with pytest.raises(ValueError, match=words):
            run(**options)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    "history",
    [
        Inverse(
            inverse=lambda p, x, h: {"a": (h["a"] - x) / p, "b": h["b"]}, anchors=2
        ),
        Replay(slots=2),
    ],
    ids=["inverse", "replay"],
)
def test_inside_shard_map(history, check_vma):
    """One sequence a device, a leaf of the state and the parameter shared."""

    def gradients(xs, probe):
        h0 = {"a": jnp.zeros(2), "b": jnp.array(1.0)}
        f = lambda p, x, h: {"a": p * h["a"] + x, "b": h["b"]}

        def loss(xs, probe):
            options = dict(history=history, probe=probe)
            h, _ = recomputed_scan(f, jnp.array(0.9), xs, h0, **options)
            return jnp.sum(h["a"] ** 3) * h["b"]

        return jax.grad(loss, (0, 1))(xs, probe)

    xs = jnp.arange(10.0).reshape(1, 5, 2) / 10
    probe = HistoryReport(jnp.zeros(1))
    device = lambda x, p: jax.tree.map(
        lambda a: a[None], gradients(*jax.tree.map(lambda a: a[0], (x, p)))
    )
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("i")
    mapped = jax.shard_map(
        device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma
    )
    got = jax.jit(mapped)(xs, probe)
    want = jax.jit(jax.vmap(gradients))(xs, probe)
    chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-14)
