"""The newer gradients of fixed points, at equal budget, on one small real task.

A dense equilibrium network, h = tanh(hW + xU + b), learns scikit-learn's digits, twice:

* together: every unit sees the image, and every unit is read;
* apart: the units that are read do not see the image, which comes to them through the
  others alone. What adds no step to the adjoint then cannot move U.

All methods have the same network, start, order of images and optimizer (Adam), and the
same budget of evaluations of f and products with its Jacobians: an update costs its
forward solve, its backward solve, and one VJP for the parameters. Each has the best of
three rates of a seed that is not reported. Accuracy is that of the network as the
method computes it (``own``) and that of its fixed point (``at rest``).
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

import rbpjax
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.figures import figure, legend, look, save_figure
from benchmarks.harness.measurement import core_times, spread
from benchmarks.harness.options import Count, OneOf, Seeds, require
from benchmarks.harness.progress import say
from benchmarks.harness.results import read_json, record, write_json
from benchmarks.harness.tables import mean_std, table
from benchmarks.harness.training import train
from benchmarks.hyperopt.descent import accuracy, cross_entropy, images
from rbpjax import (
    JFB,
    Adaptive,
    AdjointReport,
    Broyden,
    FixedPointIteration,
    Neumann,
    Phantom,
    bptt,
    rbp_solve,
    reversible,
    unrolled_phantom,
)

UNITS, SEEING = 96, 64  # SEEING: how many see the image where they are apart
GAIN = 0.7  # about ρ(J) at the start
TRAINING = 1200  # images; the other 597 are tested
BATCH = 64
RATES = (1e-3, 3e-3, 1e-2)
POINTS = 10  # of a curve
VALIDATION_SEED = 1000
TASKS = {"together": "every unit sees and is read", "apart": "seen and read apart"}
LOOSE = FixedPointIteration(tol=1e-2, max_steps=50)
UNROLLED, DAMPED = 20, 10  # steps of BPTT, and of the reversible pair
SETTLING = FixedPointIteration(tol=1e-4, max_steps=1000)

Params = dict[str, jax.Array]


class Method(NamedTuple):
    """How a step function is solved and differentiated.

    Attributes:
      title: its name.
      make: the ``Solve`` of a step function.
      price: what its backward pass costs beyond what the report counts, and beyond the
        VJP for the parameters.
    """

    title: str
    make: Callable[[rbpjax.StepFn], rbpjax.Solve]
    price: int = 0


def implicit(forward: Any, backward: Any) -> Callable:
    """``rbp_solve`` by these two."""
    return partial(rbp_solve, forward=forward, backward=backward)


METHODS = {
    "default": Method("default", rbp_solve),
    "adaptive": Method("Adaptive(1e-2)", implicit(LOOSE, Adaptive(tol=1e-2))),
    "neumann": Method("Neumann(5)", implicit(LOOSE, Neumann(steps=5))),
    "jfb": Method("JFB", implicit(LOOSE, JFB())),
    "phantom": Method("Phantom(5)", implicit(LOOSE, Phantom(steps=5))),
    # Its steps are solved once more for the gradient; the last VJP is everyone's.
    "unrolled": Method(
        "unrolled phantom, 5",
        lambda f: unrolled_phantom(f, 5, forward=LOOSE),
        price=4,
    ),
    "broyden": Method("Broyden, JFB", implicit(Broyden(tol=1e-2, max_steps=50), JFB())),
    "shine": Method(
        "Broyden(share), JFB",
        implicit(Broyden(tol=1e-2, max_steps=50, share=True), JFB()),
    ),
    # 2 evaluations and 2 VJPs a step, less the one that is everyone's, and as many
    # evaluations forward, of which the solution counts half.
    "reversible": Method(
        f"reversible, {DAMPED} steps",
        lambda f: reversible(f, DAMPED, anchors=2),
        price=2 * DAMPED - 1,
    ),
    "bptt": Method(
        f"BPTT, {UNROLLED} steps", lambda f: bptt(f, UNROLLED), price=UNROLLED - 1
    ),
}


# --- the network ----------------------------------------------------------------------


class Net(NamedTuple):
    """A step function, and what it starts and ends with.

    Attributes:
      f: ``f(params, x, h) -> h``, a batch.
      init: ``init(key) -> params``.
      logits: ``logits(params, h)``.
    """

    f: Callable[[Params, jax.Array, jax.Array], jax.Array]
    init: Callable[[jax.Array], Params]
    logits: Callable[[Params, jax.Array], jax.Array]


def network(task: str) -> Net:
    """The network of a task."""
    number = jnp.arange(UNITS)
    apart = task == "apart"
    sees = (number < SEEING) if apart else jnp.ones(UNITS, bool)
    read = ~sees if apart else sees

    def f(params: Params, x: jax.Array, h: jax.Array) -> jax.Array:
        drive = jnp.where(sees, x @ params["in"], 0.0)
        return jnp.tanh(h @ params["between"] + drive + params["bias"])

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 3)
        normal = lambda key, *shape: jax.random.normal(key, shape)
        return {
            "in": normal(keys[0], 64, UNITS) / 2,  # ‖x‖² is 1 in the mean
            "between": GAIN * normal(keys[1], UNITS, UNITS) / UNITS**0.5,
            "bias": jnp.zeros(UNITS),
            "out": normal(keys[2], UNITS, 10) / UNITS**0.5,
            "offset": jnp.zeros(10),
        }

    def logits(params: Params, h: jax.Array) -> jax.Array:
        return jnp.where(read, h, 0.0) @ params["out"] + params["offset"]

    return Net(f, init, logits)


def start(x: jax.Array) -> jax.Array:
    """States of zeros."""
    return jnp.zeros((len(x), UNITS), x.dtype)


def gradient(net: Net, solve: rbpjax.Solve) -> Callable:
    """``(params, x, y) -> (loss, solution), grads, report``."""

    def loss(
        params: Params, x: jax.Array, y: jax.Array, probe: AdjointReport | None = None
    ) -> tuple[jax.Array, rbpjax.Solution]:
        solution = solve(params, x, start(x), probe)
        value = cross_entropy(net.logits(params, solution.value), y).mean()
        return value, solution

    return rbpjax.value_and_grad_with_report(loss, has_aux=True)


@cache
def exact(task: str) -> Callable:
    """``(params, x, y) -> (settled, grads)`` at the fixed point, by dense solves."""
    net = network(task)
    settle = rbp_solve(net.f, forward=FixedPointIteration(tol=1e-12, max_steps=10_000))

    @jax.jit
    def dense(params: Params, x: jax.Array, y: jax.Array) -> tuple:
        solution = settle(params, x, start(x))
        h = jax.lax.stop_gradient(solution.value)
        outer = lambda params, h: cross_entropy(net.logits(params, h), y).mean()
        direct, g = jax.grad(outer, (0, 1))(params, h)
        one = lambda x, h: net.f(params, x[None], h[None])[0]
        jacobians = jax.vmap(jax.jacrev(one, 1))(x, h)
        systems = jnp.eye(UNITS) - jnp.swapaxes(jacobians, 1, 2)
        z = jnp.linalg.solve(systems, g[..., None])[..., 0]
        through = jax.vjp(lambda params: net.f(params, x, h), params)[1](z)[0]
        return solution.residual < 1e-9, jax.tree.map(jnp.add, direct, through)

    return dense


def error(task: str, got: Params, params: Params, *data: jax.Array) -> float | None:
    """Relative to the dense gradient, over all parameters; None without fixed point."""
    with jax.enable_x64(True):
        wide = lambda v: v.astype(float) if v.dtype.kind == "f" else v
        given = jax.tree.map(wide, (params, *data))
        settled, want = exact(task)(*given)
    flat = lambda grads: np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])
    got, want = flat(got), flat(want)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want)) if settled else None


# --- learning -------------------------------------------------------------------------


class Learner(NamedTuple):
    """The state of a training; the last two grow with each update."""

    params: Params
    moments: Any
    updates: jax.Array
    spent: jax.Array  # evaluations and products


def learner(task: str, method: str) -> tuple[Callable, Callable]:
    """``advance(learner, until, rate, seed, data)`` and ``scores(params, test)``."""
    net, how = network(task), METHODS[method]
    solve, rest = how.make(net.f), rbp_solve(net.f, forward=SETTLING)
    take = gradient(net, solve)

    def update(now: Learner, rate: jax.Array, seed: jax.Array, data: tuple) -> Learner:
        key = jax.random.fold_in(jax.random.key(seed), now.updates)
        rows = jax.random.choice(key, TRAINING, (BATCH,), replace=False)
        (_, solution), grads, report = take(now.params, *(v[rows] for v in data))
        steps, moments = optax.scale_by_adam().update(grads, now.moments)
        params = jax.tree.map(lambda p, s: p - rate * s, now.params, steps)
        cost = solution.num_products + report.num_products.astype(int) + 1 + how.price
        return Learner(params, moments, now.updates + 1, now.spent + cost)

    @jax.jit
    def advance(
        now: Learner, until: jax.Array, rate: jax.Array, seed: jax.Array, data: tuple
    ) -> Learner:
        unfinished = lambda now: now.spent < until
        step = lambda now: update(now, rate, seed, data)
        return jax.lax.while_loop(unfinished, step, now)

    @jax.jit
    def scores(params: Params, test: tuple) -> jax.Array:
        x, y = test
        found = [s(params, x, start(x)) for s in (solve, rest)]
        values = [accuracy(net.logits(params, s.value), y) for s in found]
        return jnp.stack([*values, found[1].converged.astype(float)])

    return advance, scores


def learn(
    task: str,
    method: str,
    functions: tuple[Callable, Callable],
    seed: int,
    rate: float,
    budget: int,
    checkpoints: Checkpoints,
) -> tuple[np.ndarray, Learner]:
    """Accuracy own and at rest, and whether at rest, at each point; and the end."""
    advance, scores = functions
    data, test = images("digits", seed, (TRAINING,))
    data, test = jax.tree.map(jnp.asarray, (data, test))
    params = network(task).init(jax.random.key(seed))
    zero = jnp.zeros((), jnp.int32)
    first = Learner(params, optax.scale_by_adam().init(params), zero, zero)
    curve = jnp.full((POINTS + 1, 3), jnp.nan).at[0].set(scores(params, test))

    def block(saved: tuple, i: int) -> tuple:
        now, curve = saved
        until = jnp.int32(budget * (i + 1) // POINTS)
        now = advance(now, until, jnp.float32(rate), jnp.int32(seed), data)
        return now, curve.at[i + 1].set(scores(now.params, test))

    label = f"{task}-{method}-{seed}-{rate:g}-{budget}"
    now, curve = train(checkpoints, label, (first, curve), block, POINTS, every=5)
    return np.asarray(curve), now


def compare(
    task: str, method: str, options: dict[str, Any], checkpoints: Checkpoints
) -> tuple[dict[str, Any], Callable]:
    """One method on one task: its rate, curves and gradients; and a call of one."""
    budget, net = options["budget"], network(task)
    functions = learner(task, method)
    run = partial(learn, task, method, functions, checkpoints=checkpoints)
    pilots = {
        rate: run(VALIDATION_SEED, rate, budget // 2)[0][-3:, 0].mean()
        for rate in RATES
    }
    rate = max(RATES, key=lambda rate: np.nan_to_num(pilots[rate]))
    ends = [run(seed, rate, budget) for seed in options["seeds"]]
    curves = np.array([curve for curve, _ in ends])
    x, y = (jnp.asarray(v[:BATCH]) for v in images("digits", 0, (TRAINING,))[0])
    first = net.init(jax.random.key(options["seeds"][0]))
    take = gradient(net, METHODS[method].make(net.f))
    take = jax.jit(take).lower(first, x, y).compile()
    errors = {
        name: error(task, take(params, x, y)[1], params, x, y)
        for name, params in (("start", first), ("end", ends[0][1].params))
    }
    memory = take.memory_analysis().temp_size_in_bytes
    say(
        f"{task}, {METHODS[method].title:<22} rate {rate:g}, accuracy "
        f"{mean_std(curves[:, -1, 0])}, at rest {mean_std(curves[:, -1, 1])}"
    )
    return {
        "rate": rate,
        "pilot": {f"{r:g}": a for r, a in pilots.items()},
        "own": curves[:, :, 0],
        "at_rest": curves[:, :, 1],
        "settled": curves[:, -1, 2],
        "updates": [int(now.updates) for _, now in ends],
        "spent": [int(now.spent) for _, now in ends],
        "gradient_error": errors,
        "temporary_bytes": int(memory),
    }, partial(take, first, x, y)


@dataclasses.dataclass(frozen=True)
class Modern:
    """Reversible, phantom, JFB, SHINE beside the exact gradient, at equal budget."""

    name: ClassVar[str] = "modern"

    tasks: Annotated[tuple[str, ...], OneOf(TASKS)] = tuple(TASKS)
    """Any of together, apart."""
    methods: Annotated[tuple[str, ...], OneOf(METHODS)] = tuple(METHODS)
    """Which gradients."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of splits, weights and batches."""
    budget: Count = 8_000
    """Evaluations of f and products with its Jacobians, of each training."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> None:
        """Trains by all methods on all tasks: a JSON and a figure."""
        require(
            VALIDATION_SEED not in self.seeds,
            f"--seeds: not {VALIDATION_SEED}, it is for validation",
        )
        custom = "" if self == Modern(fresh=self.fresh) else "-custom"
        options = {"methods": self.methods, "seeds": self.seeds, "budget": self.budget}
        checkpoints = Checkpoints(self.name, options, self.fresh)
        tasks = {}
        for task in self.tasks:
            found, calls = {}, {}
            for m in self.methods:
                found[m], calls[m] = compare(task, m, options, checkpoints)
            for m, seconds in core_times(calls, 15).items():
                found[m]["core_seconds"] = spread(seconds)
            tasks[task] = found
        content = record(self.name, self.name, options, tasks=tasks)
        path = write_json(self.name + custom, content)
        checkpoints.clear()
        result = read_json(path.stem)
        say(show(result))
        say(f"written: {path.name}, {draw(result, path.stem).name}")


# --- what a person looks at -----------------------------------------------------------


def rows(found: dict[str, Any]) -> list[dict[str, str]]:
    """A row a method of one task."""
    made = []
    number = lambda e: "no fixed point" if e is None else f"{e:.2g}"
    for method, m in found.items():
        own, rest = (np.array(m[k], float)[:, -1] for k in ("own", "at_rest"))
        each = np.array(m["spent"]) / np.array(m["updates"])
        made.append(
            {
                "gradient": METHODS[method].title,
                "accuracy": mean_std(own),
                "at rest": mean_std(rest),
                "settled": f"{int(sum(m['settled']))} of {len(own)}",
                "rate": f"{m['rate']:g}",
                "updates": f"{np.mean(m['updates']):.0f}",
                "units an update": f"{each.mean():.0f}",
                "gradient error, start": number(m["gradient_error"]["start"]),
                "end": number(m["gradient_error"]["end"]),
                "memory": f"{m['temporary_bytes'] / 1e3:.0f} kB",
                "core time": f"{1e3 * m['core_seconds']['median']:.2g} ms",
            }
        )
    return made


def show(result: dict[str, Any]) -> str:
    """A table a task."""
    return "\n\n".join(
        f"{task.capitalize()} ({TASKS[task]}):\n\n{table(rows(found))}"
        for task, found in result["tasks"].items()
    )


def draw(result: dict[str, Any], name: str) -> Any:
    """Accuracy against the budget spent, for each task."""
    tasks, budget = result["tasks"], result["options"]["budget"]
    fig, axes = figure(9, 4.2, ncols=len(tasks), squeeze=False)
    for ax, (task, found) in zip(axes[0], tasks.items(), strict=True):
        for method, m in found.items():
            title, curves = METHODS[method].title, np.array(m["own"], float)
            style = look(title)
            x = np.linspace(0, budget, curves.shape[1])
            ax.plot(x, curves.mean(0), label=title, **style)
            low, high = curves.min(0), curves.max(0)
            ax.fill_between(x, low, high, color=style["color"], alpha=0.1)
        ax.set(title=TASKS[task], xlabel="evaluations and products", ylim=(0.5, 1))
    axes[0, 0].set_ylabel("accuracy, own forward pass")
    legend(fig, axes[0, 0])
    seeds = len(result["options"]["seeds"])
    fig.suptitle(f"Digits by an equilibrium network: mean and range of {seeds} seeds")
    return save_figure(fig, name)
