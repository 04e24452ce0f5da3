"""A norm-preserving cell beside fading units: formulas, ways back, decays."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax.unitary import (
    DenseCell,
    MixedCell,
    UnitaryCell,
    activation,
    recomputed_scan,
)
from rbpjax.unitary.history import HistoryReport, Inverse, Replay

CELLS = {
    "dense": (DenseCell(size=6, complex_valued=False), {}),
    "ring": (UnitaryCell(lattice=(5,), activation=activation.saturate), {"radius": 1}),
}
names = pytest.mark.parametrize("name", CELLS)


def problem(name, steps, **options):
    inner, more = CELLS[name]
    cell = MixedCell(cell=inner, fading=4, **options)
    weights = cell.init(jax.random.key(0), inputs=3, outputs=2, scale=1.0, **more)
    weights = weights._replace(bias=jnp.array([0.1, -0.2, 0.3, 0.0]))
    xs = jax.random.normal(jax.random.key(1), (steps, 3)) / 10

    def loss(scan, weights, xs, probe=None):
        params = cell.prepare(weights)
        h = scan(cell, params, xs, cell.start(), probe)
        return jnp.sum(jnp.sin(cell.readout(params, h))) + jnp.sum(h.fading**2)

    return cell, loss, weights, xs


def stored(f, params, xs, h0, _):
    return jax.lax.scan(lambda h, x: (f(params, x, h), None), h0, xs)[0]


def recomputed(history, f, params, xs, h0, probe):
    return recomputed_scan(f, params, xs, h0, history=history, probe=probe)[0]


@names
def test_states_by_their_closed_form(name):
    """m_t = Σ_s d^(t-s) ψ(W x_s + c), and h is the inner cell's run over m."""
    cell, _, weights, xs = problem(name, 9, feature=jnp.tanh)
    params = cell.prepare(weights)
    h = stored(cell, params, xs, cell.start(), None)
    d = 1 / (1 + np.exp(-np.asarray(weights.decay)))
    w, c = np.asarray(weights.features), np.asarray(weights.bias)
    psi = np.tanh(np.asarray(xs) @ w.T + c)
    m = np.array([sum(d ** (t - s) * psi[s] for s in range(t + 1)) for t in range(9)])
    np.testing.assert_allclose(h.fading, m[-1], rtol=1e-13)
    inner = cell.cell
    alone = inner.prepare(weights.cell)
    kept = stored(inner, alone, jnp.array(m), inner.start(), None)
    chex.assert_trees_all_close(h.kept, kept, rtol=0, atol=1e-13)
    out = inner.readout(alone, kept)
    chex.assert_trees_all_close(cell.readout(params, h), out, rtol=0, atol=1e-13)


@names
def test_the_inverse_undoes_the_step(name):
    """With a floor; and None is no drive."""
    cell, _, weights, xs = problem(name, 1, floor=0.5)
    params = cell.prepare(weights)
    h = stored(cell, params, jnp.ones((5, 3)), cell.start(), None)
    for x in (xs[0], None):
        back = cell.inverse(params, x, cell(params, x, h))
        # The rounding of m is doubled at most, that of the inner cell is test_cell's.
        chex.assert_trees_all_close(back, h, rtol=0, atol=1e-13)


@pytest.mark.parametrize("history", ["inverse", "replay"])
def test_gradients_equal_those_of_the_stored_history(history):
    """Also of the decays, over 60 steps; the drift is what the floor allows."""
    floor = 0.5 if history == "inverse" else 0.0
    cell, loss, weights, xs = problem("dense", 60, floor=floor, feature=jnp.tanh)
    kinds = {
        "inverse": Inverse(inverse=cell.inverse, anchors=4),
        "replay": Replay(slots=5),
    }
    scan = partial(recomputed, kinds[history])
    grad = jax.jit(jax.grad(partial(loss, scan), (0, 1, 2)))
    *got, report = grad(weights, xs, HistoryReport.zeros())
    want = jax.jit(jax.grad(partial(loss, stored), (0, 1)))(weights, xs)
    assert jnp.all(want[0].decay != 0)
    # Inverse: 15 steps between anchors, ε 2¹⁵ = 7e-12, in sums of 60 steps.
    tol = 60 * 7e-12 if history == "inverse" else 1e-12
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(want))
    chex.assert_trees_all_close(got, list(want), rtol=0, atol=tol * scale)
    assert report.drift < 1e-10


def test_drift_grows_with_the_steps_between_anchors_as_it_says():
    """ε floor^-K with K steps: what the least decay loses."""
    cell, loss, weights, xs = problem("dense", 40, floor=0.5)
    weights = weights._replace(decay=jnp.full(4, -40.0))  # d = floor

    def drift(anchors):
        scan = partial(recomputed, Inverse(inverse=cell.inverse, anchors=anchors))
        probe = HistoryReport.zeros()
        return float(
            jax.jit(jax.grad(partial(loss, scan), 2))(weights, xs, probe).drift
        )

    # 40 steps: 2⁴⁰ ε = 2e-4; 10 steps: 2e-13; each a few times over.
    assert 2e-6 < drift(1) < 2e-2
    assert drift(4) < 2e-11


def test_no_norm_is_lost_to_the_units_that_forget():
    """Without drive h keeps its norm, and its gradient, while m is gone."""
    cell, _, weights, _ = problem("dense", 1)
    params = cell.prepare(weights._replace(bias=jnp.zeros(4)))
    # No encoder: m does not reach h, as after it has faded.
    inner = params.cell._replace(encoder=jnp.zeros_like(params.cell.encoder))
    params = params._replace(cell=inner)
    h0 = cell.start()._replace(kept=jnp.arange(6.0), fading=jnp.ones(4))
    end, pull = jax.vjp(
        lambda h: stored(cell, params, jnp.zeros((500, 3)), h, None), h0
    )
    g = end._replace(kept=jnp.ones(6), fading=jnp.zeros(4))
    norm = jnp.linalg.norm
    np.testing.assert_allclose(norm(end.kept), norm(h0.kept), rtol=500 * 6 * 2.2e-16)
    np.testing.assert_allclose(norm(pull(g)[0].kept), 6**0.5, rtol=500 * 6 * 2.2e-16)
    assert norm(end.fading) < 0.1


def test_decays_stay_below_one_and_above_the_floor():
    """Also where the sigmoid is 0 or 1 to rounding."""
    cell, _, weights, _ = problem("dense", 1, floor=0.25)
    decay = cell.prepare(
        weights._replace(decay=jnp.array([-1e3, -1.0, 1.0, 1e3]))
    ).decay
    assert decay[0] == 0.25 and decay[3] < 1 and jnp.all(jnp.diff(decay) > 0)


def test_what_cannot_be_inverted_or_taken_is_named():
    """No floor, activations without an inverse, inputs of another size."""
    cell, _, weights, _ = problem("dense", 1)
    params, h = cell.prepare(weights), cell.start()
    kept = DenseCell(size=6, complex_valued=False, activation=activation.modulus)
    other = MixedCell(cell=kept, fading=4, floor=0.5)
    history = Inverse(inverse=cell.inverse)
    for call, words in (
        (lambda: cell.inverse(params, None, h), "`floor=0.0`.*Replay"),
        (
            lambda: recomputed_scan(cell, params, jnp.ones((4, 3)), h, history=history),
            "forgets its past",
        ),
        (lambda: other.inverse(params, None, h), "has no inverse"),
        (lambda: cell(params, jnp.ones(2), h), r"`inputs`.*\(3,\); got float64\(2,\)"),
        (lambda: cell(params, jnp.ones(3, complex), h), "`inputs` must be a real"),
        (lambda: MixedCell(cell=3, fading=4), "`cell` must be a DenseCell"),
        (lambda: MixedCell(cell=kept, fading=4, floor=1.0), "`floor` must be"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
