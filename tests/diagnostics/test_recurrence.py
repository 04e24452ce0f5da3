"""``diagnose_recurrence``: its numbers against closed forms, its choice, its table."""

import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax.diagnostics import diagnose_recurrence
from rbpjax.diagnostics.recurrence import METHODS
from rbpjax.unitary import UnitaryCell, activation

KEY = jax.random.key(3)
N, T = 16, 100
DRAWS = np.random.default_rng(0)
W = jnp.asarray(DRAWS.normal(size=(N, N)) / N**0.5)
XS = jnp.asarray(DRAWS.normal(size=(T, N)))
ZERO = jnp.zeros(N)


def tanh(w, x, h):
    return jnp.tanh(w @ h + x)


def linear(w, x, h):
    return w @ h + x


def names(found):
    return METHODS[int(found.recommended)].name


def test_fading_is_the_product_of_jacobians():
    """Of h' = W h + x between ‖cᵀWᵏ‖'s extremes; in one dimension |w|ᵏ itself.

    The root mean square over cotangents of norm one is at most ‖Wᵏ‖ and at least its
    least singular value. A transposed J has the same ones: the next test is for it.
    """
    fading = diagnose_recurrence(KEY, linear, W, XS, ZERO, probes=3).fading
    for k in (1, 2, 30):
        values = np.linalg.svd(np.linalg.matrix_power(W, k), compute_uv=False)
        assert values[-1] <= fading[k - 1] <= values[0]
    one = diagnose_recurrence(KEY, linear, jnp.array([[-0.8]]), XS[:, :1], ZERO[:1])
    np.testing.assert_allclose(one.fading, 0.8 ** np.arange(1, T + 1), rtol=1e-11)
    assert one.horizon == math.ceil(math.log(0.01) / math.log(0.8))


def test_cotangents_go_back_by_the_transpose_of_the_last_steps():
    """J = e₀ bᵀ in the last step and e₁ aᵀ before: any c becomes c₀ b, then b₁ a c₀.

    So lag 2 is |b₁| ‖a‖ / ‖b‖ of lag 1, and each further one |a₁| of that before. Of a
    J that is not transposed lag 2 would be |a₀|; of the first steps first, |a₁|.
    """
    a, b = np.array([5.0, 0.25, 2.0]), np.array([1.0, 4.0, 0.5])

    def f(w, last, h):
        first = jnp.zeros(3).at[0].set(w[1] @ h)
        return jnp.where(last, first, jnp.zeros(3).at[1].set(w[0] @ h))

    last = jnp.arange(T) == T - 1
    w = jnp.asarray(np.stack([a, b]))
    found = diagnose_recurrence(KEY, f, w, last, jnp.ones(3), probes=2)
    ratios = found.fading[1:4] / found.fading[:3]
    second = abs(b[1]) * np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(ratios, [second, a[1], a[1]], rtol=1e-12)


def test_a_truncation_has_to_save_something():
    """Where gradients fade in the second half of the sequence only it does not hold."""
    row = [method.mean for method in METHODS].index("truncated")
    for factor, holds in ((0.9, True), (0.94, False)):
        found = diagnose_recurrence(
            KEY, linear, jnp.array([[factor]]), XS[:, :1], ZERO[:1]
        )
        assert found.horizon == math.ceil(math.log(0.01) / math.log(factor)) < T
        assert found.holds[row] == holds


def test_neither_end_of_the_range_is_left():
    """Growth of 4 a step over 1,000 steps in float32 is infinite, fading zero."""
    xs, h0 = jnp.zeros((1000, 2), jnp.float32), jnp.zeros(2, jnp.float32)
    f = lambda w, x, h: w * h + x
    grows = diagnose_recurrence(KEY, f, jnp.float32(4), xs, h0)
    fades = diagnose_recurrence(KEY, f, jnp.float32(0.25), xs, h0)
    assert np.isinf(grows.fading[-1]) and np.isinf(grows.horizon)
    assert fades.fading[-1] == 0 and fades.horizon == 4
    np.testing.assert_allclose(grows.fading[:20], 4.0 ** np.arange(1, 21), rtol=1e-4)


CASES = {
    "constant inputs": (tanh, 0.5 * W, jnp.ones((T, N)), "rbp_solve"),
    "orthogonal": (linear, jnp.linalg.qr(W)[0], XS, "unitary.recomputed_scan"),
    "element-wise": (
        lambda w, x, h: jnp.tanh(w * h + x),
        jnp.linspace(0.5, 2.0, N),
        XS,
        "online.diagonal_rtrl",
    ),
    "fading": (tanh, 0.5 * W, XS, "online.bptt(truncation=…)"),
    "chaotic": (tanh, 3 * W, XS, "online.bptt"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_regime_has_its_method(name):
    """And its property is found, with jit as without."""
    f, params, xs, want = CASES[name]
    found = diagnose_recurrence(KEY, f, params, xs, ZERO)
    assert names(found) == want
    assert found.constant == (name == "constant inputs")
    assert found.elementwise == (name == "element-wise")
    assert found.settles == (name in ("constant inputs", "fading", "element-wise"))
    inside = jax.jit(lambda k, p, x: diagnose_recurrence(k, f, p, x, ZERO))
    for a, b in zip(inside(KEY, params, xs), found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_few_units_take_rtrl():
    """Where the sequence is longer than there are parameters; not with many units."""
    turn = jnp.array([[0.0, 3.6], [-3.0, 0.0]])
    found = diagnose_recurrence(KEY, tanh, turn, XS[:, :2], ZERO[:2])
    assert names(found) == "online.rtrl"
    found = diagnose_recurrence(KEY, tanh, 3 * W, XS, ZERO)
    row = [method.name for method in METHODS].index("online.rtrl")
    assert not found.holds[row]
    assert found.cost[row] == N + 3
    assert found.memory[row] == N * N**2


def test_gains_of_a_unitary_cell():
    """A complex state: its steps preserve norms to rounding, and it is no diagonal."""
    cell = UnitaryCell(lattice=(8,), activation=activation.identity)
    params = cell.prepare(cell.init(KEY, radius=1, inputs=2, scale=1.0))
    found = diagnose_recurrence(KEY, cell, params, XS[:, :2], cell.start())
    np.testing.assert_allclose([found.least_gain, found.largest_gain], 1, rtol=1e-13)
    assert names(found) == "unitary.recomputed_scan" and not found.elementwise


def test_parts_of_one_unit_may_see_each_other():
    """A state of two leaves whose units are by themselves, as of an LSTM without W."""
    f = lambda w, x, h: (w * h[0] + h[1] + x, 0.5 * h[0] * h[1])
    state = ZERO, ZERO + 0.3
    assert diagnose_recurrence(KEY, f, W[0], XS, state).elementwise
    shifted = lambda w, x, h: (w * h[0] + jnp.roll(h[1], 1) + x, h[1])
    assert not diagnose_recurrence(KEY, shifted, W[0], XS, state).elementwise


def test_every_method_is_public():
    """The names of the table are names of the library."""
    for method in METHODS:
        public = method.name.partition("(")[0]
        module, _, name = f"rbpjax.{public}".rpartition(".")
        assert hasattr(importlib.import_module(module), name)


def test_the_table():
    """Words and numbers, a row a method; plain under tracing."""
    found = diagnose_recurrence(KEY, tanh, 0.5 * W, XS, ZERO)
    text = str(found)
    assert re.search(r"^recommended: online.bptt\(truncation=…\)$", text, re.M)
    assert re.search(r"^online.bptt +exact +1\.6e\+03 +3 +memory .*: yes$", text, re.M)
    assert all(method.name in text for method in METHODS)
    assert re.search(r"^settles at a constant input +yes$", text, re.M)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: diagnose_recurrence(KEY, tanh, W, None, ZERO), "`inputs`.*sequence"),
        (lambda: diagnose_recurrence(KEY, tanh, W, XS[:0], ZERO), r"\(0, 16\)"),
        (lambda: diagnose_recurrence(0, tanh, W, XS, ZERO), "`key`"),
        (lambda: diagnose_recurrence(KEY, tanh, W, XS, ZERO, tol=1), "`tol`.*got 1"),
        (lambda: diagnose_recurrence(KEY, tanh, W, XS, ZERO, probes=0), "`probes`"),
        (
            lambda: diagnose_recurrence(KEY, lambda w, x, h: (h, h), W, XS, ZERO),
            "`f`'s output.*return h alone",
        ),
    ],
)
def test_errors_name_the_argument(call, match):
    with pytest.raises(ValueError, match=match):
        call()
