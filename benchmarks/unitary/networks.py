"""The recurrent networks that learn the sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.data.sequences import Task
from rbpjax.unitary import (
    CellWeights,
    DenseCell,
    MixedCell,
    MixedWeights,
    UnitaryCell,
    recomputed_scan,
)
from rbpjax.unitary.activation import Activation, identity
from rbpjax.unitary.history import Inverse, Replay


class Network(NamedTuple):
    """Weights, outputs of one sequence, and which weights make the orthogonal part."""

    init: Callable[[jax.Array], Any]
    run: Callable[[Any, jax.Array], jax.Array]
    slow: Callable[[Any], Any]  # a tree of True where the smaller step size applies


def unroll(task: Task, step: Callable, read: Callable, h0: Any, xs: jax.Array) -> Any:
    """Outputs at each step, or after the last, of a plain scan (history stored)."""

    def body(h: Any, x: jax.Array) -> tuple[Any, jax.Array | None]:
        h = step(x, h)
        return h, read(h) if task.every_step else None

    h, ys = jax.lax.scan(body, h0, xs)
    return ys if task.every_step else read(h)


def unitary(
    task: Task, size: int, activation: Activation, gain: float, scale: float
) -> Network:
    """The convolutional cell on a complex ring with kernels of full support.

    Inputs are scaled by ``gain`` and the read-out by 1/gain: the amplitude at which a
    saturating cell works. ``scale`` is the rms of the first rotation angles; 1.8 puts
    them all around the circle, as in expRNN's Henaff start. The linear cell is trained
    with its history recomputed.
    """
    cell = UnitaryCell(lattice=(size,), activation=activation)

    def init(key: jax.Array) -> CellWeights:
        return cell.init(
            key, radius=size // 2, inputs=task.inputs, outputs=task.outputs, scale=scale
        )

    def run(weights: CellWeights, xs: jax.Array) -> jax.Array:
        params = cell.prepare(weights)
        read = lambda h: cell.readout(params, h / gain)
        if activation is not identity:
            step = lambda x, h: cell(params, gain * x, h)
            return unroll(task, step, read, cell.start(), xs)
        emit = (lambda _, x, h: read(h)) if task.every_step else None
        history = Inverse(inverse=cell.inverse, anchors=4)
        h, ys = recomputed_scan(
            cell, params, gain * xs, cell.start(), history=history, emit=emit
        )
        return ys if task.every_step else read(h)

    slow = lambda w: CellWeights(True, False, False, False)
    return Network(init, run, slow)


def mixed(task: Task, size: int, fading: int, scale: float) -> Network:
    """A linear orthogonal cell beside rectified units with learnt decays.

    What is kept is as long as it was; what is written is a nonlinear function of the
    input, which the linear cells above lack. The history is replayed.
    """
    cell = MixedCell(cell=DenseCell(size=size, complex_valued=False), fading=fading)

    def init(key: jax.Array) -> MixedWeights:
        return cell.init(key, inputs=task.inputs, outputs=task.outputs, scale=scale)

    def run(weights: MixedWeights, xs: jax.Array) -> jax.Array:
        params = cell.prepare(weights)
        read = lambda h: cell.readout(params, h)
        emit = (lambda _, x, h: read(h)) if task.every_step else None
        h, ys = recomputed_scan(
            cell, params, xs, cell.start(), history=Replay(slots=40), emit=emit
        )
        return ys if task.every_step else read(h)

    kernel = CellWeights(True, False, False, False)
    slow = lambda w: MixedWeights(kernel, False, False, False)
    return Network(init, run, slow)


def exp_rnn(task: Task, size: int) -> Network:
    """Dense expRNN: the same exponential on a lattice of one site, and modReLU.

    After Lezcano-Casado and Martínez-Rubio 2019: kernel of 2 × 2 blocks with angles
    uniform in (-π, π), modReLU with a learned bias.
    """
    cell = UnitaryCell(
        lattice=(1,), channels=size, complex_valued=False, activation=identity
    )

    def init(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, 3)
        weights = cell.init(keys[0], radius=0, inputs=task.inputs, outputs=task.outputs)
        angles = jax.random.uniform(keys[1], (size // 2,), float, -jnp.pi, jnp.pi)
        rows = jnp.arange(size // 2) * 2
        kernel = jnp.zeros((1, size, size)).at[0, rows, rows + 1].set(2 * angles)
        bias = jax.random.uniform(keys[2], (1, size), float, -0.01, 0.01)
        return {"cell": weights._replace(kernel=kernel), "bias": bias}

    def run(weights: dict[str, Any], xs: jax.Array) -> jax.Array:
        params = cell.prepare(weights["cell"])

        def step(x: jax.Array, h: jax.Array) -> jax.Array:
            z = cell(params, x, h)
            return jnp.sign(z) * jax.nn.relu(jnp.abs(z) + weights["bias"])

        return unroll(task, step, partial(cell.readout, params), cell.start(), xs)

    slow = lambda w: {"cell": CellWeights(True, False, False, False), "bias": False}
    return Network(init, run, slow)


def lstm(task: Task, size: int) -> Network:
    """An LSTM of flax with forget bias 1 and a linear read-out."""

    def make(key: jax.Array) -> tuple[nnx.LSTMCell, nnx.Linear]:
        rngs = nnx.Rngs(key)
        cell = nnx.LSTMCell(task.inputs, size, rngs=rngs)
        cell.hf.bias[...] = jnp.ones(size)
        return cell, nnx.Linear(size, task.outputs, rngs=rngs)

    graph, _, rest = nnx.split(make(jax.random.key(0)), nnx.Param, ...)
    init = lambda key: nnx.to_pure_dict(nnx.split(make(key), nnx.Param, ...)[1])

    def run(weights: Any, xs: jax.Array) -> jax.Array:
        cell, read = nnx.merge(graph, nnx.State(weights), rest)
        step = lambda x, h: cell(h, x)[0]
        h0 = (jnp.zeros(size), jnp.zeros(size))
        return unroll(task, step, lambda h: read(h[1]), h0, xs)

    return Network(init, run, lambda w: jax.tree.map(lambda _: False, w))
