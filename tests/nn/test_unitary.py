"""The nnx module against the functional cell."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from rbpjax.nn import UnitaryRNN
from rbpjax.unitary import (
    DenseCell,
    MixedCell,
    UnitaryCell,
    activation,
    orthogonal_cayley,
    orthogonal_householder,
)
from rbpjax.unitary.history import Inverse, Replay
from tests.support.problems import rows

CELL = UnitaryCell(lattice=(8,), channels=2)
REAL = {"complex_valued": False}
# Each cell with the options of its `init`.
CELLS = {
    "reflected": (UnitaryCell(lattice=(8,), boundary="even"), {"radius": 1}),
    "cayley convolution": (
        UnitaryCell(lattice=(8,), channels=2, method="cayley", **REAL),
        {"radius": 1},
    ),
    "exponential": (DenseCell(size=5), {"scale": 0.5}),
    "cayley": (DenseCell(size=5, matrix=orthogonal_cayley, **REAL), {}),
    "reflections": (
        DenseCell(
            size=5, matrix=orthogonal_householder, activation=activation.modulus, **REAL
        ),
        {"reflections": 2},
    ),
    "mixed": (MixedCell(cell=DenseCell(size=5, **REAL), fading=2, floor=0.5), {}),
    "mixed convolution": (
        MixedCell(cell=UnitaryCell(lattice=(4,)), fading=2),
        {"radius": 1},
    ),
}


def model_with(history, **kwargs):
    options = {"radius": 1, "inputs": 3, "outputs": 2} | kwargs
    return UnitaryRNN(CELL, **options, history=history, rngs=nnx.Rngs(0))


def test_outputs_are_those_of_the_functional_cell(key):
    """Step by step, the module is `UnitaryCell` with its read-out."""
    model = model_with(None)
    xs = jax.random.normal(key, (5, 3))
    h, outputs = model(xs)
    params, state = CELL.prepare(model.weights()), CELL.start()
    for t in range(5):
        state = CELL(params, xs[t], state)
        chex.assert_trees_all_close(outputs[t], CELL.readout(params, state), rtol=1e-12)
    chex.assert_trees_all_close(h, state, rtol=1e-12)


@pytest.mark.parametrize("made", rows(CELLS, ["reflections"]))
def test_every_cell_is_the_functional_one(key, made):
    """Step by step from a state of its own; gradients are those of its weights."""
    cell, options = made
    model = UnitaryRNN(cell, inputs=3, outputs=2, rngs=nnx.Rngs(0), **options)
    xs = jax.random.normal(key, (3, 3))
    h0 = jax.tree.map(lambda h: h + 0.3, cell.start())

    def by_hand(weights):
        params, h, outputs = cell.prepare(weights), h0, []
        for x in xs:
            h = cell(params, x, h)
            outputs.append(cell.readout(params, h))
        return h, jnp.stack(outputs)

    got, want = nnx.jit(lambda m: m(xs, h0))(model), jax.jit(by_hand)(model.weights())
    chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-14)
    loss = lambda f: lambda w: jnp.sum(f(w)[1] ** 3)
    run = loss(lambda m: m(xs, h0))
    grads = nnx.to_pure_dict(nnx.jit(nnx.grad(run))(model))
    expected = jax.jit(jax.grad(loss(by_hand)))(model.weights())._asdict()
    if isinstance(cell, MixedCell):
        expected["fading_bias"] = expected.pop("bias")
        expected |= expected.pop("cell")._asdict()
    assert all(jnp.any(g != 0) for g in expected.values())
    chex.assert_trees_all_close(grads, expected, rtol=1e-9, atol=1e-12)
    model.history = Replay(slots=2)  # also of states that are trees
    replayed = nnx.to_pure_dict(nnx.jit(nnx.grad(run))(model))
    chex.assert_trees_all_close(replayed, expected, rtol=1e-9, atol=1e-12)


def test_cells_and_options_of_another_kind_are_refused():
    mixed, options = CELLS["mixed"]
    with pytest.raises(ValueError, match="UnitaryRNN: `cell` must be a UnitaryCell"):
        UnitaryRNN(jnp.tanh, inputs=3, outputs=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`inputs` must be a Python int"):
        UnitaryRNN(mixed, inputs=None, outputs=2, rngs=nnx.Rngs(0), **options)
    with pytest.raises(TypeError, match="radius"):
        UnitaryRNN(CELL, inputs=3, outputs=2, rngs=nnx.Rngs(0))
    model = UnitaryRNN(mixed, inputs=3, outputs=2, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"like `cell.start\(\)`, MixedState\(kept='fl"
    ):
        model(jnp.ones((5, 3)), jnp.ones(5))


@pytest.mark.parametrize(
    "history",
    [
        pytest.param(
            Inverse(inverse=CELL.inverse, anchors=3),
            marks=pytest.mark.full,
            id="inverse",
        ),
        pytest.param(Replay(slots=3), id="replay"),
    ],
)
def test_gradients_do_not_depend_on_the_history(key, history):
    """nnx.grad with recomputed states equals nnx.grad with stored ones."""
    xs = 0.3 * jax.random.normal(key, (2, 9, 3))

    def grad(history):
        loss = lambda m: jnp.sum(jax.vmap(lambda x: m(x)[1])(xs) ** 3)
        return nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(model_with(history)))

    got, expected = grad(history), grad(None)
    assert set(got) == {"kernel", "encoder", "decoder", "bias"}
    chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-12)


def test_trains_with_optax(key):
    """Gradient descent on the real parameters lowers a loss."""
    model = model_with(Replay(slots=4))
    optimizer = nnx.Optimizer(model, optax.sgd(0.02), wrt=nnx.Param)
    xs, target = jax.random.normal(key, (6, 3)), jnp.array([1.0, -1.0])

    @nnx.jit
    def update(model, optimizer):
        loss = lambda m: jnp.sum((m(xs)[1][-1] - target) ** 2)
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    values = [update(model, optimizer) for _ in range(30)]
    assert values[-1] < 0.5 * values[0]


def test_without_encoder_and_readout(key):
    """inputs=None takes fields, outputs=None gives the last state only."""
    model = model_with(None, inputs=None, outputs=None)
    fields = jax.random.normal(key, (4, 8, 2))
    h0 = CELL.start() + 1
    h, outputs = model(fields, h0)
    assert outputs is None
    params, state = CELL.prepare(model.weights()), h0
    for field in fields:
        state = CELL(params, field, state)
    chex.assert_trees_all_close(h, state, rtol=1e-12)


@pytest.mark.parametrize("history", [None, Replay(slots=2)])
def test_wrong_inputs_are_named(history):
    """A batch, another size, no steps, a real start for a complex cell."""
    model = model_with(history)
    for xs in (jnp.ones((2, 5, 3)), jnp.ones((5, 4)), jnp.ones((0, 3)), jnp.ones(3)):
        with pytest.raises(
            ValueError, match="UnitaryRNN: `inputs` must be one sequence"
        ):
            model(xs)
    with pytest.raises(
        ValueError, match=r"`h0` must be like `cell.start\(\)`, complex"
    ):
        model(jnp.ones((5, 3)), jnp.ones((8, 2)))
