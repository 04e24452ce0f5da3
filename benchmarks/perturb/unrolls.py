"""Long unrolls, an update a window: where truncation fails, and what persists learns.

Two tasks, each a sequence that is cut into windows of ten steps:

* balance: influence balancing, 500 steps. A parameter helps at once and hurts later, so
  that within a window its gradient has the wrong sign.
* schedule: ten step sizes, as a learnt optimizer would choose them, for 200 steps of
  noisy descent on a quadratic. Within a window smaller steps are better: less noise.

Every method has ten sequences that stand at different places, one antithetic pair each
of normal noise of one size, and the same budget of steps that are run, perturbed or
not. Each has the best of the same Adam rates, chosen with a validation seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.figures import figure, legend, line_named, look, save_figure
from benchmarks.harness.options import Seeds, Within, require
from benchmarks.harness.progress import say
from benchmarks.harness.results import read_json, record, write_json
from benchmarks.harness.tables import mean_std, table
from benchmarks.harness.training import train
from benchmarks.online.tasks import influence_balancing
from rbpjax import online, perturb

WINDOW, SEQUENCES, SIGMA = 10, 10, 0.1
BLOCKS = 20  # points of a curve
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
VALIDATION_SEED = 1000
METHODS = {
    "truncated": "Truncated ES",
    "pes": "PES",
    "nres": "NRES",
    "wp": "WP, an update a sequence",
}
MAKERS = {
    "truncated": perturb.truncated_es,
    "pes": perturb.pes,
    "nres": perturb.nres,
}


class Task(NamedTuple):
    """A sequence, its first parameters, and what they are worth."""

    f: Callable
    loss: Callable
    h0: Any
    params: jax.Array
    steps: int
    inputs: Callable[[jax.Array, int], jax.Array]  # (key, steps) -> [steps, …]
    score: Callable[[jax.Array], jax.Array]  # the expected loss of a step
    best: float  # the least score that there is


@cache
def balance() -> Task:
    """The influence is linear in θ: the score is a parabola through three points."""
    f, loss, h0 = influence_balancing()
    steps = 500

    def score(theta: jax.Array) -> jax.Array:
        def step(h: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            h = f(theta, None, h)
            return h, loss(theta, h, None)

        return jnp.mean(jax.lax.scan(step, h0, length=steps)[1])

    slope, curvature = jax.grad(score)(0.0), jax.grad(jax.grad(score))(0.0)
    best = score(-slope / curvature)
    inputs = lambda key, steps: jnp.zeros(steps)
    return Task(f, loss, h0, jnp.array(0.5), steps, inputs, score, float(best))


@cache
def schedule(knots: int = 10, directions: int = 20) -> Task:
    """SGD on ½ Σ λ w², gradients with noise of variance λ, log step sizes at knots."""
    steps = 200
    curvature = jnp.geomspace(1.0, 1e-3, directions)
    weights = jnp.sqrt(3.0 / curvature)  # so that all directions matter

    def rate(theta: jax.Array, t: jax.Array) -> jax.Array:
        places = jnp.linspace(0.0, steps - 1.0, knots)
        return jnp.exp(jnp.interp(t.astype(theta.dtype), places, theta))

    def f(theta: jax.Array, x: jax.Array, h: Any) -> Any:
        w, t = h
        slope = curvature * w + jnp.sqrt(curvature) * x
        return w - rate(theta, t) * slope, t + 1

    def loss(theta: jax.Array, h: Any, y: Any) -> jax.Array:
        del theta, y
        return jnp.sum(curvature * h[0] ** 2) / 2

    def score(theta: jax.Array) -> jax.Array:
        """Exactly: noise and weights are uncorrelated, and squares add up."""

        def step(squares: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
            a = rate(theta, t)
            squares = (1 - a * curvature) ** 2 * squares + a**2 * curvature
            return squares, jnp.sum(curvature * squares) / 2

        return jnp.mean(jax.lax.scan(step, weights**2, jnp.arange(steps))[1])

    first = jnp.full(knots, jnp.log(0.1))

    def descend(state: tuple, _: None) -> tuple[tuple, None]:
        theta, moments = state
        change, moments = adam.update(jax.grad(score)(theta), moments)
        return (optax.apply_updates(theta, change), moments), None

    adam = optax.adam(0.01)
    end, _ = jax.lax.scan(descend, (first, adam.init(first)), length=3000)
    inputs = lambda key, steps: jax.random.normal(key, (steps, directions))
    h0 = weights, jnp.zeros((), jnp.int32)
    return Task(f, loss, h0, first, steps, inputs, score, float(score(end[0])))


TASKS: dict[str, Callable[[], Task]] = {"balance": balance, "schedule": schedule}
TITLES = {
    "balance": "Influence balancing",
    "schedule": "Step sizes of a noisy descent",
}


def cost(method: str, task: Task) -> int:
    """Steps that one update runs, perturbed or not."""
    runs = 2 if method in ("pes", "nres") else 3  # a pair, and a run without noise
    return runs * SEQUENCES * (task.steps if method == "wp" else WINDOW)


Update = Callable[[Any, jax.Array, jax.Array], tuple[Any, Any]]


def windowed(method: str, task: Task) -> tuple[Any, Update]:
    """What is carried beside the parameters, and ``(carry, params, key)`` a window."""
    est = MAKERS[method](task.f, task.loss, sigma=SIGMA, noise=perturb.noise.normal)
    windows = task.steps // WINDOW
    start = lambda params: jax.tree.map(
        lambda a: jnp.broadcast_to(a, (SEQUENCES, *a.shape)), est.init(params, task.h0)
    )

    def update(carry: Any, params: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        carry, clock = carry
        keys = jax.random.split(key, (2, SEQUENCES))
        noise = jax.vmap(est.noise)(keys[0], carry)
        xs = jax.vmap(lambda k: task.inputs(k, WINDOW))(keys[1])
        many = jax.vmap(est.step, (None, 0, 0, None, 0))
        carry, out = many(params, carry, xs, None, noise)
        ended = clock + 1 == windows
        carry = online.combine.reset(carry, start(params), ended)
        return (carry, jnp.where(ended, 0, clock + 1)), out.grads.mean(0)

    # The first sequences end early, so that they part.
    clock = jnp.arange(SEQUENCES) * windows // SEQUENCES
    return (start(task.params), clock), update


def whole(task: Task) -> tuple[Any, Update]:
    """The same for weight perturbation of whole sequences."""

    def total(params: jax.Array, xs: jax.Array) -> jax.Array:
        def step(h: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            h = task.f(params, x, h)
            return h, task.loss(params, h, None)

        return jnp.sum(jax.lax.scan(step, task.h0, xs)[1])

    rule = perturb.WeightPerturbation(
        difference=perturb.difference.Central(sigma=SIGMA), noise=perturb.noise.normal
    )
    one = perturb.value_and_grad(total, rule)

    def update(carry: Any, params: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        keys = jax.random.split(key, (2, SEQUENCES))
        xs = jax.vmap(lambda k: task.inputs(k, task.steps))(keys[1])
        return carry, jax.vmap(one, (0, None, 0))(keys[0], params, xs)[1].mean(0)

    return (), update


def learn(
    name: str,
    method: str,
    seeds: tuple[int, ...],
    rates: tuple[float, ...],
    budget: int,
    checkpoints: Checkpoints,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores ``[BLOCKS + 1, runs]`` of runs with those seeds and rates; parameters."""
    task = TASKS[name]()
    first, update = whole(task) if method == "wp" else windowed(method, task)
    updates = max(1, budget // cost(method, task) // BLOCKS)
    adam = optax.scale_by_adam()

    def one(state: tuple, key: jax.Array, rate: jax.Array) -> tuple:
        def body(state: tuple, key: jax.Array) -> tuple[tuple, None]:
            params, moments, carry = state
            carry, grads = update(carry, params, key)
            change, moments = adam.update(grads, moments)
            return (params - rate * change, moments, carry), None

        return jax.lax.scan(body, state, jax.random.split(key, updates))[0]

    block = jax.jit(jax.vmap(one))
    scores = jax.jit(jax.vmap(task.score))
    many = lambda a: jnp.broadcast_to(a, (len(seeds), *jnp.shape(a)))
    states = jax.tree.map(many, (task.params, adam.init(task.params), first))
    curve = jnp.full((BLOCKS + 1, len(seeds)), jnp.nan).at[0].set(scores(states[0]))

    def advance(saved: tuple, i: int) -> tuple:
        states, curve = saved
        keys = [jax.random.fold_in(jax.random.key(seed), i) for seed in seeds]
        states = block(states, jnp.stack(keys), jnp.array(rates))
        return states, curve.at[i + 1].set(scores(states[0]))

    label = f"{name}-{method}-{'-'.join(map(str, seeds))}-{budget}-{rates[0]:g}"
    states, curve = train(
        checkpoints, label, (states, curve), advance, BLOCKS, every=5, label=label
    )
    return np.asarray(curve), np.asarray(states[0])


def compare(
    name: str, seeds: tuple[int, ...], budget: int, checkpoints: Checkpoints
) -> dict[str, Any]:
    """Curves of all methods, each at the best rate of its pilot of half the length."""
    task, methods = TASKS[name](), {}
    for method in METHODS:
        run = partial(learn, name, method, checkpoints=checkpoints)
        validation = (VALIDATION_SEED,) * len(GRID)
        pilots = run(seeds=validation, rates=GRID, budget=budget // 2)[0][-3:].mean(0)
        best = int(np.argmin(np.where(np.isfinite(pilots), pilots, np.inf)))
        rates = (GRID[best],) * len(seeds)
        curve, params = run(seeds=seeds, rates=rates, budget=budget)
        say(f"{name}, {method:<9} rate {GRID[best]:g}, score {mean_std(curve[-1])}")
        methods[method] = {
            "rate": GRID[best],
            "pilot": dict(zip(map(str, GRID), pilots.tolist(), strict=True)),
            "curves": curve.T,
            "final": curve[-1],
            "params": params,
            "updates": max(1, budget // cost(method, task) // BLOCKS) * BLOCKS,
        }
    return {
        "steps": task.steps,
        "start": float(task.score(task.params)),
        "best": task.best,
        "methods": methods,
    }


@dataclasses.dataclass(frozen=True)
class PerturbUnrolls:
    """Long unrolls in windows: truncated, persistent and noise-reuse ES."""

    name: ClassVar[str] = "perturb-unrolls"

    seeds: Seeds = (0, 1, 2, 3, 4)
    """Seeds of noise and data."""
    budget: Annotated[int, Within(1)] = 1_000_000
    """Steps that are run in each training, perturbed or not."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> None:
        """Trains by all methods on both tasks: a JSON and a figure."""
        require(
            VALIDATION_SEED not in self.seeds,
            f"--seeds: not {VALIDATION_SEED}, it is for validation",
        )
        custom = "" if self == PerturbUnrolls(fresh=self.fresh) else "-custom"
        options = {"seeds": self.seeds, "budget": self.budget, "grid": GRID}
        options |= {"window": WINDOW, "sequences": SEQUENCES, "sigma": SIGMA}
        checkpoints = Checkpoints(self.name, options, self.fresh)
        tasks = {
            name: compare(name, self.seeds, self.budget, checkpoints) for name in TASKS
        }
        content = record(self.name, self.name, options, tasks=tasks)
        path = write_json(self.name + custom, content)
        checkpoints.clear()
        result = read_json(path.stem)
        say(table(rows(result)))
        say(f"written: {path.name}, {draw(result, path.stem).name}")


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row a method, a column a task."""
    tasks = result["tasks"]
    head = lambda name: (
        f"{TITLES[name]}: loss a step (start {tasks[name]['start']:.3g}, "
        f"least {tasks[name]['best']:.3g})"
    )
    return [
        {"method": words}
        | {
            head(name): mean_std(
                [float("nan") if v is None else v for v in at["methods"][m]["final"]]
            )
            for name, at in tasks.items()
        }
        for m, words in METHODS.items()
    ]


def draw(result: dict[str, Any], name: str) -> Any:
    """Loss against steps for each task."""
    fig, axes = figure(9, 3.8, ncols=len(result["tasks"]), squeeze=False)
    for ax, (task, at) in zip(axes[0], result["tasks"].items(), strict=True):
        for method, m in at["methods"].items():
            style, curves = look(METHODS[method]), np.array(m["curves"], float)
            millions = result["options"]["budget"] / 1e6
            steps = np.linspace(0, millions, curves.shape[1])
            ax.plot(steps, curves.mean(0), label=METHODS[method], **style)
            low, high = curves.min(0), curves.max(0)
            ax.fill_between(steps, low, high, color=style["color"], alpha=0.1)
        line_named(ax, at["best"], "the least there is")
        wide = ax.get_ylim()[1] > 10 * at["best"]
        scale = "log" if wide else "linear"
        ax.set(title=TITLES[task], xlabel="million steps run", yscale=scale)
    axes[0, 0].set_ylabel("loss a step")
    legend(fig, axes[0, 0])
    count = len(result["options"]["seeds"])
    fig.suptitle(f"Windows of {WINDOW} steps: mean and range over {count} seeds")
    return save_figure(fig, name)
