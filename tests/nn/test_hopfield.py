"""Associative memories: their steps, clamps and contraction, whatever the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rbpjax
from rbpjax.nn import FixedPoint, HopfieldCell, SoftmaxHopfieldCell

UNITS = 6
FREE = jnp.arange(UNITS) >= 2
RANDOM = np.random.default_rng(0)
VALUES, START, OTHER = (jnp.asarray(3 * RANDOM.normal(size=(2, UNITS))) for _ in "abc")
SOLVER = rbpjax.FixedPointIteration(tol=1e-13)


def continuous(scale, **options):
    """In float64, with normal weights times ``scale``."""
    cell = HopfieldCell(UNITS, rngs=nnx.Rngs(0), **options)
    draw = np.random.default_rng(1).normal(size=(UNITS, UNITS))
    cell.kernel = nnx.Param(jnp.asarray(scale * draw))
    cell.bias = nnx.Param(jnp.linspace(-1.0, 1.0, UNITS))
    return cell


def modern(scale, **options):
    cell = SoftmaxHopfieldCell(4, UNITS, rngs=nnx.Rngs(0), **options)
    draw = np.random.default_rng(2).normal(size=(4, UNITS))
    cell.memory = nnx.Param(jnp.asarray(scale * draw))
    return cell


def jacobian(cell, inputs, h):
    return np.asarray(jax.jacobian(lambda h: cell(inputs, h))(h))


def test_the_weight_is_symmetric_without_loops():
    for gain, scale in ((None, 3.0), (0.9, 50.0)):
        weight = np.asarray(continuous(scale, gain=gain).weight())
        np.testing.assert_array_equal(weight, weight.T)
        assert (np.diag(weight) == 0).all()
        norm = np.linalg.norm(weight, 2)
        assert np.isclose(norm, 0.9) if gain else norm > 3


def test_clamped_units_keep_their_values_and_get_no_state():
    cell = continuous(2.0, gain=0.9)
    image = cell((VALUES, FREE), START)
    np.testing.assert_array_equal(image[:, :2], VALUES[:, :2])
    weight, bias = np.asarray(cell.weight()), np.linspace(-1, 1, UNITS)
    want = np.tanh(np.asarray(START)) @ weight + bias
    np.testing.assert_allclose(image[:, 2:], want[:, 2:], rtol=1e-12)
    assert (jacobian(cell, (VALUES[0], FREE), START[0])[:2] == 0).all()


def test_each_contracts_below_its_gain():
    """‖J‖ at random states of weights of 50, and one end from two starts.

    The softmax memory is probed where its Jacobian is largest, too: between patterns.
    """
    zero = jnp.zeros_like(VALUES)
    between = jnp.zeros(UNITS)
    for cell, inputs in (
        (continuous(50.0, gain=0.8), (VALUES, FREE)),
        (modern(50.0, beta=4.0, gain=0.8), VALUES),
    ):
        one = jax.tree.map(lambda u: u[0] if u.ndim == 2 else u, inputs)
        for h in (START[0], OTHER[0], between):
            assert np.linalg.norm(jacobian(cell, one, h), 2) <= 0.8 * (1 + 1e-12)
        layer = FixedPoint(cell, forward=SOLVER)
        ends = [layer(inputs, h).value for h in (START, OTHER)]
        # Residuals of 1e-13 leave errors of at most five times that.
        np.testing.assert_allclose(*ends, rtol=0, atol=1e-11)
    # The bound is met with equality by two patterns that are each other's negative.
    cell = SoftmaxHopfieldCell(2, UNITS, beta=4.0, gain=0.8, rngs=nnx.Rngs(0))
    pair = np.zeros((2, UNITS))
    pair[:, 0] = 5.0, -5.0
    cell.memory = nnx.Param(jnp.asarray(pair))
    norm = np.linalg.norm(jacobian(cell, zero[0], between), 2)
    np.testing.assert_allclose(norm, 0.8, rtol=1e-12)


def test_without_a_bound_a_memory_has_many_fixed_points():
    """Each stored pattern is found again from near it, and they are not one."""
    cell = modern(1.0, beta=4.0, gain=None)
    memory = cell.memory[...]
    memory = 5 * memory / jnp.linalg.norm(memory, axis=1, keepdims=True)
    cell.memory = nnx.Param(memory)
    layer = FixedPoint(cell, forward=SOLVER)
    noise = 0.2 * np.random.default_rng(3).normal(size=memory.shape)
    found = layer(jnp.zeros_like(memory), memory + noise)
    assert found.converged
    # Of equal length, another pattern has a weight of exp(-β · distance² / 2).
    gaps = np.linalg.norm(memory[:, None] - memory[None], axis=-1)
    assert np.exp(-2 * np.sort(gaps.ravel())[len(gaps)] ** 2) < 1e-8
    np.testing.assert_allclose(found.value, memory, rtol=0, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["continuous", "modern"])
def test_gradients_are_those_of_two_hundred_steps(kind):
    """0.8²⁰⁰ is 4e-20: the unrolled gradient is that of the fixed point."""
    if kind == "continuous":
        cell, inputs = continuous(2.0, gain=0.8), (VALUES, FREE)
    else:
        cell, inputs = modern(2.0, beta=4.0, gain=0.8), VALUES
    graph, params = nnx.split(cell)
    weights = jnp.arange(float(UNITS))[None]

    def solved(params):
        layer = FixedPoint(
            nnx.merge(graph, params),
            forward=SOLVER,
            backward=rbpjax.Neumann(tol=1e-13),
        )
        return jnp.sum(layer(inputs, START).value * weights)

    def unrolled(params):
        cell = nnx.merge(graph, params)
        step = lambda h, _: (cell(inputs, h), None)
        return jnp.sum(jax.lax.scan(step, START, length=200)[0] * weights)

    got, want = (jax.jit(jax.grad(f))(params) for f in (solved, unrolled))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = float(jnp.abs(b).max())
        assert scale > 1e-3
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * scale)


def test_bad_options_are_named():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="`gain` must be positive, or None"):
        HopfieldCell(2, gain=0.0, rngs=rngs)
    with pytest.raises(ValueError, match="`beta` must be positive; got 0"):
        SoftmaxHopfieldCell(2, 2, beta=0.0, rngs=rngs)
    with pytest.raises(ValueError, match="`gain` must be positive; got -1"):
        SoftmaxHopfieldCell(2, 2, beta=1.0, gain=-1.0, rngs=rngs)
