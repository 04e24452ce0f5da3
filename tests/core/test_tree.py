"""Arithmetic on states: scaling that neither rounds nor leaves the dtype's range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbpjax._core import tree


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_power_of_two_is_the_exponent(dtype):
    """Compiled, for all sizes: 2^⌊log₂ x⌋ to the last bit, its inverse too."""
    info = np.finfo(dtype)
    low, high = np.log2(float(info.tiny)), info.maxexp - 2
    exponents = np.random.default_rng(0).uniform(low + 1, high, 200)
    x = np.concatenate([2.0**exponents, [1.0, info.max, info.tiny]]).astype(dtype)
    x = np.concatenate([x, np.nextafter(x, 0 * x)[:-1]])
    power = np.asarray(jax.jit(tree.power_of_two)(jnp.asarray(x)))
    assert power.dtype == dtype
    want = np.minimum(np.floor(np.log2(x.astype(np.longdouble))), high)
    np.testing.assert_array_equal(power, np.ldexp(np.ones_like(x), want.astype(int)))
    np.testing.assert_array_equal((1 / power) * power, 1)
    assert jax.jit(tree.power_of_two)(dtype(0)) == 1


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_to_unit_of_any_magnitude(dtype):
    """From the smallest normal number to the largest: norm 1, and the right size."""
    info, pattern = jnp.finfo(dtype), np.array([1.0, -0.5, 0.25, 0.0])
    for size in (float(info.tiny) * 4, 1e-5, 1.0, float(info.max) / 2):
        x = jnp.asarray(size * pattern, dtype)
        unit, norm = jax.jit(tree.to_unit)(x)
        want = np.linalg.norm(np.asarray(x, np.longdouble))
        eps = float(info.eps)
        # One rounding of each entry, and a few of the norm in float32 at least.
        np.testing.assert_allclose(norm, want, rtol=4 * min(eps, 1.2e-7))
        np.testing.assert_allclose(
            np.asarray(unit, float), np.asarray(x, np.longdouble) / want, rtol=eps
        )
    zero, norm = jax.jit(tree.to_unit)(jnp.zeros(3, dtype))
    assert norm == 0 and (zero == 0).all()


def test_division_by_less_than_float16_can_invert():
    """1 / 1e-5 is no float16; the quotient is."""
    x = jnp.array([1e-5, 6e-8], jnp.float16)
    got = jax.jit(tree.divide)(x, jnp.float32(1e-5))
    want = np.asarray(x, float) / 1e-5
    np.testing.assert_allclose(np.asarray(got, float), want, rtol=1e-3)


def test_rounding_is_the_norm_of_each_leaf_with_its_own_epsilon():
    """ε‖x‖ by leaf; a half-precision leaf counts with its coarser ε."""
    x = (jnp.full(4, 3.0, jnp.float32), jnp.full(1, 2.0, jnp.float16))
    parts = [np.finfo(np.float32).eps * 6, np.finfo(np.float16).eps * 2]
    np.testing.assert_allclose(tree.rounding(x), np.linalg.norm(parts), rtol=1e-6)
    np.testing.assert_allclose(tree.rounding(x[0]), parts[0], rtol=1e-6)
    np.testing.assert_allclose(tree.rms(x), [3.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite(bad):
    """One entry of one leaf, complex parts too."""
    x = (jnp.ones(3), jnp.ones(2, jnp.complex128))
    assert tree.all_finite(x)
    assert not tree.all_finite((x[0].at[1].set(bad), x[1]))
    assert not tree.all_finite((x[0], x[1].at[1].set(1 + 1j * bad)))
