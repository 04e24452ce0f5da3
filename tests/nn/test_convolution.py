"""The bounded convolution: what it computes, and that it contracts below the bound."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rbpjax
from rbpjax.nn import ConvCell, FixedPoint

UNITS = 3


def cell_of(window, scale=1.0, **options):
    """In float64, with a kernel of normal numbers times ``scale``."""
    cell = ConvCell(UNITS, window, rngs=nnx.Rngs(0), **options)
    draw = np.random.default_rng(1).normal(size=cell.kernel.shape)
    cell.kernel = nnx.Param(jnp.asarray(scale * draw))
    return cell


def sigma(kernel):
    return np.linalg.norm(np.reshape(kernel, (-1, UNITS)), 2)


@pytest.mark.parametrize(("window", "grid"), [((3,), (6,)), ((3, 5), (4, 6))])
def test_it_is_a_sum_over_taps(window, grid):
    """By its definition with zeros outside, the two axes of different length."""
    cell = cell_of(window, bound=1e9, activation=jnp.sin)
    random = np.random.default_rng(2)
    h, drive = random.normal(size=(2, 2, *grid, UNITS))
    want = drive.copy()
    kernel = np.asarray(cell.kernel[...])
    for at in itertools.product(*map(range, grid)):
        for tap in itertools.product(*map(range, window)):
            seen = tuple(
                a + t - w // 2 for a, t, w in zip(at, tap, window, strict=True)
            )
            if all(0 <= s < g for s, g in zip(seen, grid, strict=True)):
                want[(slice(None), *at)] += h[(slice(None), *seen)] @ kernel[tap]
    got = cell(jnp.asarray(drive), jnp.asarray(h))
    np.testing.assert_allclose(got, np.sin(want), rtol=0, atol=1e-12)


def test_the_bound_scales_large_kernels_down_and_leaves_small_ones():
    """On a unit impulse the taps come out, brought to σ = bound or as they are."""
    impulse = (
        jnp.zeros((UNITS, 3, UNITS)).at[jnp.arange(UNITS), 1, :].set(jnp.eye(UNITS))
    )
    for scale, want in ((50.0, 1.4), (0.01, None)):
        cell = cell_of((3,), scale, bound=1.4, activation=lambda h: h)
        seen = cell(jnp.zeros_like(impulse), impulse)  # [in, position, out]
        taps = jnp.moveaxis(seen[:, ::-1], 0, 1)
        want = sigma(cell.kernel[...]) if want is None else want
        np.testing.assert_allclose(sigma(taps), want, rtol=1e-10)


@pytest.mark.parametrize("window", [(3,), (3, 3)])
def test_below_the_bound_it_contracts_whatever_the_kernel(window):
    """‖J‖ is below norm_bound, and random starts end in one state, for σ of 50."""
    taps = int(np.prod(window))
    bound = 0.95 / taps**0.5
    cell = cell_of(window, 50.0, bound=bound)
    assert np.isclose(cell.norm_bound, 0.95)
    shape = (1, *(5,) * len(window), UNITS)
    random = np.random.default_rng(3)
    drive, a, b = (jnp.asarray(3 * random.normal(size=shape)) for _ in range(3))
    linear = ConvCell(
        UNITS, window, bound=bound, activation=lambda h: h, rngs=nnx.Rngs(0)
    )
    linear.kernel = cell.kernel
    dense = jax.jacobian(lambda h: linear(drive, h))(a).reshape(a.size, a.size)
    assert np.linalg.norm(dense, 2) <= cell.norm_bound * (1 + 1e-12)
    layer = FixedPoint(cell, forward=rbpjax.FixedPointIteration(tol=1e-12))
    ends = [layer(drive, start).value for start in (a, b)]
    # Residuals of 1e-12 leave errors of at most 20 times that.
    np.testing.assert_allclose(*ends, rtol=0, atol=1e-10)


def test_bad_options_are_named():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="`bound` must be positive; got 0"):
        ConvCell(2, (3,), bound=0, rngs=rngs)
    for window in ((), (3, 0)):
        with pytest.raises(ValueError, match="`window` must have at least one tap"):
            ConvCell(2, window, bound=1.0, rngs=rngs)
    cell = ConvCell(2, (3,), bound=1.0, rngs=rngs)
    for shape in ((5, 2), (1, 5, 3), (1, 5, 5, 2)):
        h = jnp.zeros(shape, jnp.float32)
        with pytest.raises(ValueError, match="`h` must be \\[batch, \\*grid, 2\\]"):
            cell(h, h)
