"""Training by each gradient estimator, with the same budget of forward passes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.progress import say
from benchmarks.harness.tables import mean_std
from benchmarks.harness.training import train
from benchmarks.perturb import tasks as perturb_tasks
from rbpjax import perturb

SAMPLES = 15  # of a perturbation rule: 16 passes an update
BACKWARD = 3  # forward passes that one BPTT counts for
BLOCKS = 20  # points of a curve, and checkpoints


class Method(NamedTuple):
    """What gives the gradient; ``rule`` is None for derivatives."""

    title: str
    rule: Any = None
    truncated: bool = False
    scalar: bool = False  # one loss for the whole batch

    @property
    def passes(self) -> int:
        return BACKWARD if self.rule is None else self.rule.num_samples + 1


def methods(units: int, inputs: int, outputs: int) -> dict[str, Method]:
    """All methods by name."""
    total = units + inputs + outputs
    fields = dict(
        num_samples=SAMPLES, difference=perturb.difference.OneSided(sigma=1e-4)
    )
    node, activity = perturb.NodePerturbation, perturb.ActivityPerturbation
    now = dict(credit=perturb.credit.instant)
    return {
        "bptt": Method("BPTT"),
        "tbptt1": Method("TBPTT(1)", truncated=True),
        "wp": Method("WP", perturb.WeightPerturbation(**fields)),
        "np": Method("NP", node(**fields)),
        "anp": Method("ANP", activity(**fields)),
        "np_instant": Method("NP, instant", node(**fields, **now)),
        "anp_instant": Method("ANP, instant", activity(**fields, **now)),
        "anp_code": Method(
            "ANP, paper's code", perturb.paper_code(total).activity, scalar=True
        ),
    }


# Every method plain, the five of the paper's comparison decorrelated too.
PLAIN = ("bptt", "tbptt1", "wp", "np", "anp", "np_instant", "anp_instant", "anp_code")
ARMS = PLAIN + tuple(f"{m}+d" for m in ("bptt", "tbptt1", "wp", "np", "anp"))


class Setting(NamedTuple):
    """What is the same for all arms of a comparison."""

    task: str
    units: int
    examples: int
    budget: int  # forward passes of a batch
    decorrelation: float


def squared(out: jax.Array, y: jax.Array) -> jax.Array:
    """One loss an example."""
    return jnp.mean((out - y) ** 2, axis=-1)


def gradient(method: Method, cell: perturb.DenseCell) -> Callable:
    """``(key, params, xs, h0, ys) -> (value, grads)``."""
    loss = (lambda o, y: jnp.mean(squared(o, y))) if method.scalar else squared
    if method.rule is not None:
        return perturb.recurrent_value_and_grad(cell, loss, method.rule)

    def cut(params: Any, x: Any, h: Any, noise: Any) -> Any:
        return cell(params, x, jax.lax.stop_gradient(h), noise)

    def total(params: Any, xs: Any, h0: Any, ys: Any) -> jax.Array:
        run = perturb.unroll(cut if method.truncated else cell, params, xs, h0)
        return jnp.mean(jax.vmap(squared)(run.outputs, ys))  # Adam knows no scale

    def value_and_grad(key: Any, *data: Any) -> Any:
        del key
        return jax.value_and_grad(total)(*data)

    return value_and_grad


def learn(
    setting: Setting,
    arm: str,
    seeds: tuple[int, ...],
    rates: tuple[float, ...],
    fraction: float,
    checkpoints: Checkpoints,
) -> np.ndarray:
    """Scores ``[BLOCKS + 1, runs]`` of runs with those seeds and step sizes."""
    name, decorrelated = arm.removesuffix("+d"), arm.endswith("+d")
    tasks = [perturb_tasks.make(setting.task, s) for s in seeds]
    inputs, outputs = tasks[0].inputs, tasks[0].outputs
    method = methods(setting.units, inputs, outputs)[name]
    updates = max(1, round(setting.budget * fraction / method.passes / BLOCKS))
    rule = perturb.decorrelate(setting.decorrelation)
    adam = optax.scale_by_adam()
    h0 = jnp.zeros((setting.examples, setting.units))

    def start(seed: jax.Array) -> tuple:
        key = jax.random.fold_in(jax.random.key(17), seed)
        params = perturb.DenseCell().init(
            key, inputs=inputs, units=setting.units, outputs=outputs
        )
        return params, adam.init(params), rule.init(setting.units, jnp.float32)

    def update(state: tuple, data: tuple) -> tuple[tuple, None]:
        params, moments, matrix, rate = state
        key, xs, ys = data
        cell = perturb.DenseCell(decorrelation=matrix if decorrelated else None)
        _, grads = gradient(method, cell)(key, params, xs, h0, ys)
        if decorrelated:
            nodes = perturb.unroll(cell, params, xs, h0).nodes
            matrix = rule.update(matrix, jnp.tanh(nodes.recurrent))
        steps, moments = adam.update(grads, moments)
        params = jax.tree.map(lambda p, s: p - rate * s, params, steps)
        return (params, moments, matrix, rate), None

    def score(state: tuple, test: tuple) -> jax.Array:
        cell = perturb.DenseCell(decorrelation=state[2] if decorrelated else None)
        zero = jnp.zeros((test[0].shape[1], setting.units))
        run = perturb.unroll(cell, state[0], test[0], zero)
        return tasks[0].score(run.outputs, test[1])

    @jax.jit
    def block(states: tuple, rates: jax.Array, keys: jax.Array, batches: tuple) -> Any:
        def one(state: tuple, rate: jax.Array, keys: jax.Array, batch: tuple) -> tuple:
            return jax.lax.scan(update, (*state, rate), (keys, *batch))[0][:3]

        return jax.vmap(one)(states, rates, keys, batches)

    draws = [
        jax.jit(jax.vmap(lambda k, t=t: t.batch(k, setting.examples))) for t in tasks
    ]
    scores = jax.jit(jax.vmap(score))
    tests = jax.tree.map(lambda *a: jnp.stack(a), *[t.test for t in tasks])
    states = jax.vmap(start)(jnp.array(seeds, jnp.uint32))
    curve = jnp.full((BLOCKS + 1, len(seeds)), jnp.nan).at[0].set(scores(states, tests))
    label = (
        f"{setting.units}-{arm}-{'-'.join(map(str, seeds))}-{fraction:g}-{rates[0]:g}"
    )

    def advance(saved: tuple, i: int) -> tuple:
        states, curve = saved
        split = lambda s: jax.random.split(
            jax.random.fold_in(jax.random.key(s), i), (updates, 2)
        )
        keys = jnp.stack([split(s) for s in seeds])
        drawn = [draw(keys[j, :, 0]) for j, draw in enumerate(draws)]
        batches = jax.tree.map(lambda *a: jnp.stack(a), *drawn)
        states = block(states, jnp.array(rates), keys[:, :, 1], batches)
        return states, curve.at[i + 1].set(scores(states, tests))

    first, shown = (states, curve), f"{setting.task} {label}"
    _, curve = train(checkpoints, label, first, advance, BLOCKS, every=5, label=shown)
    return np.asarray(curve)


def compare(
    setting: Setting,
    arms: tuple[str, ...],
    seeds: tuple[int, ...],
    grid: tuple[float, ...],
    pilot: float,
    checkpoints: Checkpoints,
) -> dict[str, Any]:
    """Curves of all arms and seeds, each arm at the best step size of its pilot.

    The pilot has data of its own, those of the validation seed.
    """
    result = {}
    for arm in arms:
        began = time.perf_counter()
        run = partial(learn, setting, arm, checkpoints=checkpoints)
        validation = (perturb_tasks.VALIDATION_SEED,) * len(grid)
        pilots = run(seeds=validation, rates=grid, fraction=pilot)[-3:].mean(0)
        best = int(np.nanargmin(np.where(np.isfinite(pilots), pilots, np.inf)))
        curve = run(seeds=seeds, rates=(grid[best],) * len(seeds), fraction=1.0)
        say(
            f"{setting.task}, {setting.units} units, {arm:<12} rate {grid[best]:g}, "
            f"score {mean_std(curve[-1])}, {time.perf_counter() - began:.0f} s"
        )
        result[arm] = {
            "rate": grid[best],
            "pilot": dict(zip(map(str, grid), pilots.tolist(), strict=True)),
            "curves": curve.T,
            "final": curve[-1],
        }
    return result
