"""Learning from episodes, online: what the experiments with them share.

The network reads one step after another; the gradient of an episode is streamed, and
some episodes make an update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.measurement import interleaved_times, spread, temporary_bytes
from benchmarks.harness.training import train
from rbpjax import online


class Network(NamedTuple):
    """A step, its loss, its parameters and its state at rest."""

    cell: Any
    loss: Callable
    init: Callable[[jax.Array], dict]
    h0: Any


class Gradient(NamedTuple):
    """How to get the gradient of an episode."""

    make: Callable[[Any, Callable], online.Estimator]
    whole: bool = False  # a step takes a whole sequence


def streamed(how: Gradient, net: Network) -> Callable:
    """``gradient(params, key, x, y)``: the loss of an episode and its gradient."""
    est = how.make(net.cell, net.loss)

    def gradient(
        params: dict, key: jax.Array, x: jax.Array, y: jax.Array
    ) -> online.OnlineOutput:
        start = est.init(params, net.h0)
        if how.whole:
            return est.step(params, start, x, y, ())[1]

        def body(state: tuple, xy: tuple) -> tuple:
            carry, total, key = state
            key, signs = jax.random.split(key)
            carry, out = est.step(params, carry, *xy, est.noise(signs, carry))
            return (carry, jax.tree.map(jnp.add, total, out), key), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        nothing = online.OnlineOutput(jnp.zeros(()), zeros)
        return jax.lax.scan(body, (start, nothing, key), (x, y))[0][1]

    return gradient


class Lesson(NamedTuple):
    """What is learnt, and in which portions.

    Attributes:
      draw: ``draw(keys)``: inputs and targets of episodes, for keys ``[point,
        episodes]`` arrays ``[point, episodes, T, …]``.
      measure: ``measure(params, losses)``: a point of the curve, from the parameters
        and the losses ``[point]`` of its updates.
    """

    draw: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    measure: Callable[[dict, jax.Array], jax.Array]


class Portions(NamedTuple):
    """How much of everything.

    Attributes:
      episodes: how many make an update.
      point: updates to a point of the curve.
      slow: the factor of the steps of all phases, which count at every step.
      together: how many episodes are computed at once; one after another by default,
        as a stream would have them.
    """

    episodes: int
    point: int
    slow: float
    together: int | None = None


adam = optax.inject_hyperparams(optax.adam)  # the rate is in its state


def program(how: Gradient, net: Network, portions: Portions) -> Callable:
    """``program(state, keys, xs, ys)``: some updates, and the losses of each.

    Compiled once for all rates and seeds; ``keys`` are those of ``Lesson.draw``.
    """
    gradient = streamed(how, net)

    def update(state: tuple, data: tuple) -> tuple:
        params, moments = state
        one = lambda kxy: gradient(params, *kxy)
        out = jax.lax.map(one, data, batch_size=portions.together)
        grads = jax.tree.map(lambda g: jnp.mean(g, 0), out.grads)
        steps, moments = adam(0.0).update(grads, moments)
        slow = lambda path, s: s * portions.slow if "'phase'" in str(path) else s
        steps = jax.tree_util.tree_map_with_path(slow, steps)
        return (optax.apply_updates(params, steps), moments), jnp.mean(out.loss)

    return jax.jit(lambda state, *data: jax.lax.scan(update, state, data))


def learn(
    label: str,
    updates: Callable,
    net: Network,
    portions: Portions,
    lesson: Lesson,
    rate: float,
    seed: int,
    points: int,
    checkpoints: Checkpoints,
) -> list[float | None]:
    """The curve of one run of a ``program``; resumable."""
    key = jax.random.key(seed)

    def step(saved: tuple, i: int) -> tuple:
        state, curve = saved
        keys = jax.random.split(jax.random.fold_in(key, i), portions.point)
        split = partial(jax.random.split, num=(portions.episodes, 2))
        noise, drawn = jnp.moveaxis(jax.vmap(split)(keys), -1, 0)
        state, losses = updates(state, noise, *lesson.draw(drawn))
        return state, curve.at[i].set(lesson.measure(state[0], losses))

    params = net.init(jax.random.key(seed))
    start = (params, adam(rate).init(params)), jnp.full(points, jnp.nan)
    _, curve = train(checkpoints, label, start, step, points, every=5)
    return [float(b) if np.isfinite(b) else None for b in np.asarray(curve)]


def costs(
    programs: Mapping[str, tuple[Gradient, Network]],
    lengths: Sequence[int],
    steps: int,
    inputs: int,
) -> dict[str, dict[str, Any]]:
    """Temporary memory of an episode by its length, and time a step of one."""
    found: dict[str, dict[str, Any]] = {name: {"bytes": {}} for name in programs}
    calls = {}
    for name, (how, net) in programs.items():
        params, key = net.init(jax.random.key(0)), jax.random.key(0)
        gradient = streamed(how, net)
        for length in lengths:
            data = (
                jax.ShapeDtypeStruct((length, inputs), jnp.float32),
                jax.ShapeDtypeStruct((length,), jnp.int32),
            )
            size = temporary_bytes(gradient, params, key, *data)
            found[name]["bytes"][str(length)] = size
        # One target at the end, as an episode has it.
        x, y = jnp.ones((steps, inputs)), jnp.full(steps, -1).at[-1].set(0)
        calls[name] = partial(jax.jit(gradient), params, key, x, y)
    for name, times in interleaved_times(calls, 15).items():
        found[name]["seconds_a_step"] = spread([t / steps for t in times])
    return found
