"""The monotone layer: its fixed point and gradient by enumeration, for any weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rbpjax
from rbpjax.nn import FixedPoint, MonotoneCell

UNITS = 5
DRIVE = jax.random.normal(jax.random.key(1), (3, UNITS))


def cell_of(seed, margin=0.5, scale=1.0):
    cell = MonotoneCell(UNITS, margin=margin, rngs=nnx.Rngs(0))
    a, b = scale * np.random.default_rng(seed).normal(size=(2, UNITS, UNITS))
    cell.a, cell.b = nnx.Param(jnp.asarray(a)), nnx.Param(jnp.asarray(b))
    return cell


def enumerated(weight, drive):
    """z = relu(Wz + d) by trying all sets of active units: (z, active)."""
    found = []
    for active in itertools.product([0.0, 1.0], repeat=UNITS):
        mask = np.array(active)
        z = np.linalg.solve(np.eye(UNITS) - mask[:, None] * weight, mask * drive)
        u = weight @ z + drive
        if np.all((u > 0) == (mask > 0)):
            found.append((z, mask))
    assert len(found) == 1, "exactly one"
    return found[0]


def test_the_weight_is_monotone_for_any_parameters():
    """The symmetric part of I - W is at least m; W itself has any norm."""
    weight = np.asarray(cell_of(0, scale=30.0).weight())
    gap = np.eye(UNITS) - weight
    assert np.linalg.norm(weight, 2) > 100
    assert np.linalg.eigvalsh((gap + gap.T) / 2).min() >= 0.5 - 1e-10


FULL = pytest.mark.full


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=FULL) for s in (1, 2))])
def test_fixed_point_and_gradient_are_those_of_the_active_units(seed):
    """From random starts; where z ← relu(Wz + d) itself does not settle."""
    cell = cell_of(seed)
    weight = np.asarray(cell.weight())
    assert np.abs(np.linalg.eigvals(weight)).max() > 1.5
    layer = FixedPoint(
        cell,
        forward=rbpjax.FixedPointIteration(tol=1e-12, max_steps=20_000),
        backward=rbpjax.Adaptive(tol=1e-12, max_steps=20_000),
    )
    pairs = [enumerated(weight, np.asarray(d)) for d in DRIVE]
    want = jnp.stack([jnp.asarray(z) for z, _ in pairs])
    masks = jnp.stack([jnp.asarray(mask) for _, mask in pairs])
    start = jax.random.normal(jax.random.key(seed), DRIVE.shape) * 5
    # Residuals of 1e-12 times 1 / (1 - rate), which is below 1e3 for these weights.
    np.testing.assert_allclose(layer(DRIVE, start).value, want, rtol=0, atol=1e-8)

    def dense(a, b, drive):
        weight = 0.5 * jnp.eye(UNITS) - a.T @ a + b - b.T
        solve = lambda m, d: jnp.linalg.solve(jnp.eye(UNITS) - m[:, None] * weight, d)
        return jnp.sum(jax.vmap(solve)(masks, masks * drive) ** 3)

    loss = lambda layer, drive: jnp.sum(layer(drive, start).value ** 3)
    grads, drive_bar = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(layer, DRIVE)
    a_bar, b_bar, dense_bar = jax.jit(jax.grad(dense, (0, 1, 2)))(
        cell.a[...], cell.b[...], DRIVE
    )
    for got, want in (
        (grads["cell"]["a"][...], a_bar),
        (grads["cell"]["b"][...], b_bar),
        (drive_bar, dense_bar),
    ):
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-7 * scale)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_a_step_contracts_by_the_stated_rate(scale):
    """‖f(a) - f(b)‖ ≤ √(1 - m²/L²) ‖a - b‖ where it is the tightest.

    The singular vector of 1 - α(I - W) attains its norm, where no unit is cut off.
    """
    cell = cell_of(4, scale=scale)
    gap = np.eye(UNITS) - np.asarray(cell.weight())
    length = np.linalg.norm(gap, 2)
    alpha = 0.5 / length**2
    rate = (1 - 0.25 / length**2) ** 0.5
    linear = np.eye(UNITS) - alpha * gap
    attained = np.linalg.norm(linear, 2)
    assert attained <= rate * (1 + 1e-12)
    direction = jnp.asarray(np.linalg.svd(linear)[2][0])[None]
    large = jnp.full((1, UNITS), 1e3)
    drive = 1e3 * length * jnp.ones((1, UNITS)) * 10  # all units stay active
    apart = cell(drive, large + direction) - cell(drive, large)
    np.testing.assert_allclose(jnp.linalg.norm(apart), attained, rtol=1e-6)


def test_a_margin_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`margin` must be positive; got 0"):
        MonotoneCell(2, margin=0, rngs=nnx.Rngs(0))
