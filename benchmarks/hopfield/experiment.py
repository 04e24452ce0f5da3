"""A continuous Hopfield network learns digit images, by five gradient methods.

The network of Liao et al. 2018, section 5.1: visible units clamped to an image, hidden
units, and output units that learn to show the image; symmetric weights without
self-loops, logistic units,

    h ← free ⊙ W σ(h/2) + clamp,    loss = mean |output - image|,

50 updates from h = clamp, Adam, one image a step. All methods start from the same
weights, see the images in the same order and run the same 50 updates forward; they
differ in the gradient alone. What the original code never measured is measured here:
the retrieval error, which is the fraction of wrong pixels in the thresholded output
against the *clean* image when half of the on-pixels of the input are removed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rbpjax
from benchmarks import data
from benchmarks.harness import (
    Checkpoint,
    environment,
    figure,
    interleaved_times,
    mean_std,
    progress,
    read_json,
    require,
    save_figure,
    say,
    spread,
    table,
    temporary_bytes,
    write_json,
)
from rbpjax import RBP, CGNormal, FixedPointIteration, Neumann

PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "dataset": "digits",
        "hidden": 128,
        "epochs": 500,
        "learning_rate": 3e-3,
        "seeds": (0, 1, 2),
    },
    "paper": {
        "dataset": "mnist",
        "hidden": 1024,
        "epochs": 100,
        "learning_rate": 1e-3,
        "seeds": (0,),
    },
}

# In the order of the tables: (options, step function) -> the differentiable solve.
METHODS: dict[str, Callable[[Hopfield, Callable], Callable]] = {
    "bptt": lambda o, f: rbpjax.bptt(f, o.num_steps),
    "tbptt": lambda o, f: rbpjax.tbptt(f, o.num_steps, o.truncation),
    "rbp": lambda o, f: _implicit(
        o, f, RBP(FixedPointIteration(steps=o.truncation), seed=1234)
    ),
    "cg": lambda o, f: _implicit(o, f, CGNormal(max_steps=o.truncation)),
    "neumann": lambda o, f: _implicit(o, f, Neumann(steps=o.truncation)),
}
TITLES = {
    "bptt": "BPTT",
    "tbptt": "TBPTT",
    "rbp": "RBP, uniform start",
    "cg": "CG-RBP",
    "neumann": "Neumann-RBP",
}
SWEEP = (10, 30, 100, 300, 1000)
BLOCKS = 20  # evaluations, and checkpoints, of one training run
DRAWS = 20  # corruptions of each image for the retrieval error


@dataclasses.dataclass(frozen=True)
class Hopfield:
    """Train an associative memory of digit images by five gradient methods."""

    preset: str = "small"
    """small: 8×8 digits, no download; paper: MNIST and 784 + 1024 + 784 units."""
    dataset: str | None = None
    """digits (bundled with scikit-learn) or mnist (downloaded, or in RBPJAX_DATA)."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Any of bptt, tbptt, rbp, cg, neumann."""
    hidden: int | None = None
    """Number of hidden units."""
    num_images: int = 10
    """How many of the ten classes' first images to store."""
    num_steps: int = 50
    """Updates of the network for one image."""
    truncation: int = 20
    """Steps of TBPTT, RBP and Neumann-RBP; the budget of CG-RBP."""
    epochs: int | None = None
    """Passes over the images; each image is one Adam step."""
    learning_rate: float | None = None
    """Adam's step size."""
    seeds: tuple[int, ...] | None = None
    """Seeds of weights and order; all run at once, by vmap."""
    sweep: bool = True
    """Also measure time and memory for truncations of 10 … 1000."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> dict[str, Any]:
        """Runs the experiment: JSON, figures, and a table on standard output."""
        options = resolve(self)
        images = load_images(options)
        network = Network(images.shape[1], options.hidden)
        kept = dataclasses.asdict(dataclasses.replace(options, fresh=False))
        checkpoint = Checkpoint("hopfield", kept, options.fresh)
        say(
            f"{len(images)} images of {options.dataset}, {network.units} units, "
            f"{options.num_steps} updates, truncation {options.truncation}, "
            f"{options.epochs * len(images)} Adam steps, seeds {list(options.seeds)}"
        )
        corrupted = corrupt(images, DRAWS)
        result: dict[str, Any] = {
            "experiment": result_name(options),
            "command": f"python -m benchmarks hopfield --preset {options.preset}",
            "options": kept,
            "environment": environment(),
            "image_side": math.isqrt(images.shape[1]),
            "clean": pack(images),
            "corrupted": pack(corrupted[0]),
            # What doing nothing would give: the corrupted image against the clean one.
            "input_error": float(np.mean(corrupted != images)),
            "methods": {},
        }
        for name in options.methods:
            result["methods"][name] = train(
                options, name, network, images, corrupted, checkpoint
            )
        for name, cost in costs(options, network, images).items():
            result["methods"][name].update(cost)
        if options.sweep:
            result["sweep"] = sweep(options, network, images)
        path = write_json(result["experiment"], result)
        checkpoint.clear()
        result = read_json(path.stem)  # the figures and the table show the file
        figures = draw(result)
        say(table(rows(result)))
        say(f"a corrupted image itself is wrong in {result['input_error']:.3g} of its")
        say("pixels. Written: " + ", ".join(p.name for p in (path, *figures)))
        return result


def resolve(options: Hopfield) -> Hopfield:
    """The options with the preset filled in; UsageError if they make no sense."""
    known = lambda name, value, of: require(
        value in of, f"unknown {name} {value!r}; choose from {', '.join(of)}"
    )
    known("preset", options.preset, PRESETS)
    given = {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
    options = dataclasses.replace(Hopfield(), **(PRESETS[options.preset] | given))
    known("dataset", options.dataset, ("digits", "mnist"))
    require(bool(options.methods), f"no methods; choose from {', '.join(METHODS)}")
    for name in options.methods:
        known("method", name, METHODS)
    for name in ("hidden", "num_steps", "truncation", "epochs"):
        value = getattr(options, name)
        require(value >= 1, f"{name} must be at least 1; got {value}")
    require(
        options.truncation <= options.num_steps,
        f"truncation {options.truncation} is beyond the {options.num_steps} updates; "
        "lower --truncation or raise --num-steps",
    )
    require(
        1 <= options.num_images <= 10,
        f"num_images must be 1 to 10, one a class; got {options.num_images}",
    )
    require(
        options.learning_rate > 0,
        f"learning_rate must be positive; got {options.learning_rate}",
    )
    require(
        len(set(options.seeds)) == len(options.seeds) > 0,
        f"seeds must be one or more different numbers; got {list(options.seeds)}",
    )
    return options


def result_name(options: Hopfield) -> str:
    """The name of the result file: a run with other options has another name."""
    default = resolve(Hopfield(preset=options.preset))
    same = dataclasses.replace(options, fresh=False) == default
    return f"hopfield-{options.preset}" + ("" if same else "-custom")


# --- data ----------------------------------------------------------------------------


def load_images(options: Hopfield) -> np.ndarray:
    """The first image of each class, binary, flattened: float32 ``[image, pixel]``."""
    images, labels = data.mnist() if options.dataset == "mnist" else data.digits()
    # The paper's code calls every non-zero MNIST pixel on. The small digits are means
    # over 4×4 blocks, non-zero nearly everywhere: there, on is half or more.
    threshold = 1 if options.dataset == "mnist" else 8
    images = data.first_of_each_class(images, labels)[: options.num_images]
    return (images >= threshold).reshape(len(images), -1).astype(np.float32)


def corrupt(images: np.ndarray, draws: int) -> np.ndarray:
    """Half of the on-pixels of each image set to 0: ``[draw, image, pixel]``."""
    random = np.random.default_rng(1234)
    result = np.repeat(images[None], draws, axis=0)
    for image in result.reshape(-1, images.shape[1]):
        on = np.flatnonzero(image)
        image[random.choice(on, len(on) // 2, replace=False)] = 0
    return result


def pack(images: np.ndarray) -> list[str]:
    """Binary images as hexadecimal strings, for the result file."""
    return [np.packbits(image > 0.5).tobytes().hex() for image in images]


def unpack(packed: list[str], side: int) -> np.ndarray:
    """The inverse of ``pack``: ``[image, side, side]``."""
    bits = [np.unpackbits(np.frombuffer(bytes.fromhex(p), np.uint8)) for p in packed]
    return np.stack(bits)[:, : side * side].reshape(-1, side, side)


# --- the network ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Network:
    """Visible, hidden and output units; as many outputs as visible."""

    visible: int
    hidden: int

    @property
    def units(self) -> int:
        return 2 * self.visible + self.hidden

    def init(self, key: jax.Array) -> jax.Array:
        return 1e-3 * jax.random.normal(key, (self.units, self.units))

    def clamp(self, image: jax.Array) -> jax.Array:
        return jnp.concatenate([image, jnp.zeros(self.units - self.visible)])

    def step(self, weights: jax.Array, clamp: jax.Array, h: jax.Array) -> jax.Array:
        """One update; the visible units stay at the clamp."""
        free = jnp.arange(self.units) >= self.visible
        return jnp.where(free, jax.nn.sigmoid(0.5 * h) @ weights, clamp)

    def output(self, h: jax.Array) -> jax.Array:
        return h[-self.visible :]


def symmetric(w: jax.Array) -> jax.Array:
    """W + Wᵀ without self-loops, computed once and not in each update."""
    return (w + w.T) * (1 - jnp.eye(len(w), dtype=w.dtype))


def _implicit(options: Hopfield, f: Callable, rule: rbpjax.BackwardRule) -> Callable:
    forward = FixedPointIteration(steps=options.num_steps)
    return rbpjax.rbp_solve(f, forward=forward, backward=rule)


def loss(
    network: Network, solve: Callable, w: jax.Array, image: jax.Array, probe: Any = None
) -> tuple[jax.Array, rbpjax.Solution]:
    """Mean absolute error of the output units, and the solution."""
    clamp = network.clamp(image)
    solution = solve(symmetric(w), clamp, clamp, probe=probe)
    return jnp.mean(jnp.abs(network.output(solution.value) - image)), solution


# --- training ------------------------------------------------------------------------


def make_update(options: Hopfield, network: Network, solve: Callable) -> Callable:
    """``(w, adam, image) -> (w, adam)``: one training step."""
    adam = optax.adam(options.learning_rate)
    grad = jax.grad(partial(loss, network, solve), has_aux=True)

    def update(w: jax.Array, state: Any, image: jax.Array) -> tuple[jax.Array, Any]:
        updates, state = adam.update(grad(w, image)[0], state)
        return optax.apply_updates(w, updates), state

    return update


def train(
    options: Hopfield,
    name: str,
    network: Network,
    images: np.ndarray,
    corrupted: np.ndarray,
    checkpoint: Checkpoint,
) -> dict[str, Any]:
    """Trains by one method, all seeds at once; returns curves and final images."""
    solve = METHODS[name](options, network.step)
    update = make_update(options, network, solve)
    measure = jax.jit(jax.vmap(partial(evaluate, network, solve, images, corrupted)))
    ends = np.unique(np.linspace(0, options.epochs, BLOCKS + 1).astype(int))

    def epoch(carry: tuple, number: jax.Array) -> tuple[tuple, None]:
        seed, w, state = carry
        key = jax.random.fold_in(jax.random.key(seed), number)
        order = jax.random.permutation(key, len(images))
        visit = lambda c, i: (update(*c, jnp.asarray(images)[i]), None)
        return (seed, *jax.lax.scan(visit, (w, state), order)[0]), None

    @partial(jax.jit, static_argnums=3)
    def block(w: jax.Array, state: Any, first: jax.Array, length: int) -> tuple:
        numbers = first + jnp.arange(length)
        one = lambda s, w, a: jax.lax.scan(epoch, (s, w, a), numbers)[0][1:]
        return jax.vmap(one)(seeds, w, state)

    seeds = jnp.array(options.seeds, jnp.uint32)
    w = jax.vmap(lambda s: network.init(jax.random.key(s)))(seeds)
    state = jax.vmap(optax.adam(options.learning_rate).init)(w)
    first = measure(w)
    empty = {k: jnp.zeros((len(ends), *v.shape), v.dtype) for k, v in first.items()}
    history = jax.tree.map(lambda h, v: h.at[0].set(v), empty, first)
    done, saved = checkpoint.restore(name, (w, state, history))
    w, state, history = saved
    start = time.perf_counter()
    for i in progress(range(done, len(ends) - 1), len(ends) - 1, TITLES[name], done):
        begin, end = int(ends[i]), int(ends[i + 1])
        w, state = block(w, state, jnp.int32(begin), end - begin)
        set_row = lambda h, v, row=i + 1: h.at[row].set(v)
        history = jax.tree.map(set_row, history, measure(w))
        checkpoint.save(name, i + 1, (w, state, history))
    final = jax.tree.map(lambda h: h[-1], history)
    say(
        f"{TITLES[name]:<19} loss {mean_std(final['loss'])}, retrieval error "
        f"{mean_std(final['retrieval_error'])}, {time.perf_counter() - start:.1f} s"
    )
    output = jax.jit(partial(retrieve, network, solve))(w[0], corrupted[0])
    return {
        "steps": ends * len(images),
        "history": {k: np.asarray(v) for k, v in history.items()},
        "retrieved": pack(np.asarray(output)),
    }


def retrieve(
    network: Network, solve: Callable, w: jax.Array, inputs: jax.Array
) -> jax.Array:
    """The thresholded output for each of ``inputs [image, pixel]``."""
    weights = symmetric(w)
    clamp = jax.vmap(network.clamp)(inputs)
    h = jax.vmap(lambda c: solve(weights, c, c).value)(clamp)
    return (jax.vmap(network.output)(h) > 0.5).astype(jnp.float32)


def evaluate(
    network: Network,
    solve: Callable,
    images: np.ndarray,
    corrupted: np.ndarray,
    w: jax.Array,
) -> dict[str, jax.Array]:
    """All measures of one set of weights; means over the images."""
    probed = rbpjax.value_and_grad(partial(loss, network, solve), has_aux=True)
    (losses, solution), _, report = jax.vmap(probed, (None, 0))(w, images)
    rho = jax.vmap(
        lambda clamp, h: rbpjax.spectral_radius(
            network.step, symmetric(w), clamp, h, jax.random.key(0), num_steps=60
        )
    )(jax.vmap(network.clamp)(images), solution.value)
    wrong = lambda inputs: jnp.mean(retrieve(network, solve, w, inputs) != images)
    solved = report.cotangent_norm > 0  # BPTT and TBPTT solve no adjoint
    return {
        "loss": losses.mean(),
        "retrieval_error": jax.lax.map(wrong, corrupted).mean(),
        "forward_residual": solution.residual.max(),
        "spectral_radius": rho.max(),
        "adjoint_residual": jnp.where(solved, report.residual, jnp.nan).max(),
        "adjoint_steps": jnp.where(solved, report.num_steps, jnp.nan).mean(),
    }


# --- cost ----------------------------------------------------------------------------


def costs(
    options: Hopfield, network: Network, images: np.ndarray, repetitions: int = 30
) -> dict[str, dict[str, Any]]:
    """Time and temporary memory of one training step on one image, by method."""
    w = network.init(jax.random.key(options.seeds[0]))
    state = optax.adam(options.learning_rate).init(w)
    image = jnp.asarray(images[0])
    calls, memory = {}, {}
    for name in options.methods:
        solve = METHODS[name](options, network.step)
        compiled = jax.jit(make_update(options, network, solve)).lower(w, state, image)
        compiled = compiled.compile()
        calls[name] = partial(compiled, w, state, image)
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
    times = interleaved_times(calls, repetitions)
    return {
        name: {
            "temporary_bytes": int(memory[name]),
            "step_seconds": spread(times[name]),
        }
        for name in options.methods
    }


def sweep(
    options: Hopfield, network: Network, images: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Time and temporary memory of one gradient against the truncation.

    The forward run has as many updates as the truncation, 50 at least.
    """
    w = network.init(jax.random.key(options.seeds[0]))
    image = jnp.asarray(images[0])
    result: dict[str, dict[str, Any]] = {n: {} for n in options.methods}
    for k in SWEEP:
        at = dataclasses.replace(
            options, truncation=k, num_steps=max(k, options.num_steps)
        )
        grads = {
            name: jax.grad(
                partial(loss, network, METHODS[name](at, network.step)), has_aux=True
            )
            for name in options.methods
        }
        jitted = {
            n: partial(jax.jit(lambda w, x, g=g: g(w, x)[0]), w, image)
            for n, g in grads.items()
        }
        times = interleaved_times(jitted, 5)
        for name, grad in grads.items():
            cost = {
                "temporary_bytes": temporary_bytes(
                    lambda w, x, g=grad: g(w, x)[0], w, image
                ),
                "seconds": spread(times[name]),
            }
            result[name][str(k)] = cost
    return result


# --- what a person looks at ----------------------------------------------------------


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """The rows of the table, one a method."""
    baseline = result["methods"].get("bptt")
    made = []
    for name, m in result["methods"].items():
        last = {k: v[-1] for k, v in m["history"].items()}
        seconds = m["step_seconds"]["median"]
        ratio = (
            f" ({seconds / baseline['step_seconds']['median']:.2f}×)"
            if baseline
            else ""
        )
        exists = [r for r in last["adjoint_residual"] if r is not None]
        made.append(
            {
                "method": TITLES[name],
                "training loss": mean_std(last["loss"]),
                "retrieval error": mean_std(last["retrieval_error"]),
                "forward residual": f"{max(last['forward_residual']):.1g}",
                "ρ(J)": f"{max(last['spectral_radius']):.2f}",
                "adjoint residual": f"{max(exists):.1g}" if exists else "–",
                "step": f"{1e3 * seconds:.2f} ms{ratio}",
                "memory": f"{m['temporary_bytes'] / 1e3:.1f} kB",
            }
        )
    return made


def draw(result: dict[str, Any]) -> list[Any]:
    """All figures of a result file."""
    name = result["experiment"]
    paths = [draw_curves(result, name), draw_images(result, name)]
    return [*paths, draw_costs(result, name)] if "sweep" in result else paths


def draw_curves(result: dict[str, Any], name: str) -> Any:
    """Training loss, retrieval error and ρ(J) against Adam steps."""
    panels = {
        "loss": "training loss (mean |output - image|)",
        "retrieval_error": "retrieval error (wrong pixels)",
        "spectral_radius": "spectral radius ρ(J)",
    }
    fig, axes = figure(10, 3.2, ncols=3)
    for ax, (key, title) in zip(axes, panels.items(), strict=True):
        for i, (method, m) in enumerate(result["methods"].items()):
            values = np.array(m["history"][key], float)
            style = {"color": f"C{i}", "ls": ("-", "--", "-.", ":", (0, (5, 1)))[i % 5]}
            ax.plot(m["steps"], values.mean(1), label=TITLES[method], **style)
            ax.fill_between(
                m["steps"], values.min(1), values.max(1), color=f"C{i}", alpha=0.15
            )
        ax.set(title=title, xlabel="Adam steps")
    axes[0].set_yscale("log")
    axes[1].axhline(result["input_error"], color="k", lw=0.8)
    axes[1].annotate(
        "corrupted input",
        (0.98, result["input_error"]),
        ha="right",
        xycoords=("axes fraction", "data"),
        va="bottom",
        fontsize=8,
    )
    axes[1].set_ylim(0)
    axes[2].axhline(1, color="k", lw=0.8)
    axes[0].legend()
    seeds = len(result["options"]["seeds"])
    fig.suptitle(
        f"Hopfield memory, {result['options']['dataset']}: mean and range over "
        f"{seeds} seed{'s' * (seeds > 1)}"
    )
    return save_figure(fig, f"{name}-curves")


def draw_images(result: dict[str, Any], name: str) -> Any:
    """Clean, corrupted and retrieved images, a row for each method."""
    side = result["image_side"]
    grid = {"clean": result["clean"], "corrupted": result["corrupted"]}
    grid |= {TITLES[m]: v["retrieved"] for m, v in result["methods"].items()}
    fig, axes = figure(7.5, 0.72 * len(grid) + 0.5, nrows=len(grid), squeeze=False)
    for ax, (title, packed) in zip(axes[:, 0], grid.items(), strict=True):
        strip = np.pad(
            unpack(packed, side), ((0, 0), (1, 1), (1, 1)), constant_values=0
        )
        ax.imshow(np.concatenate(list(strip), axis=1), cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(title, rotation=0, ha="right", va="center")
    fig.suptitle("Retrieval from half of the on-pixels (first seed)")
    return save_figure(fig, f"{name}-images")


def draw_costs(result: dict[str, Any], name: str) -> Any:
    """Memory and time of one gradient against the truncation."""
    fig, axes = figure(8, 3.2, ncols=2)
    for i, (method, at) in enumerate(result["sweep"].items()):
        k = [int(x) for x in at]
        style = {"color": f"C{i}", "marker": "o", "ms": 3, "label": TITLES[method]}
        memory = [c["temporary_bytes"] / 1e6 for c in at.values()]
        times = [1e3 * c["seconds"]["median"] for c in at.values()]
        axes[0].loglog(k, memory, **style)
        axes[1].loglog(k, times, **style)
    axes[0].set(title="compiled temporary memory", ylabel="MB")
    axes[1].set(title="time of one gradient", ylabel="ms")
    for ax in axes:
        ax.set(xlabel="truncation K (forward run of max(K, 50) updates)")
    axes[0].legend()
    return save_figure(fig, f"{name}-cost")
