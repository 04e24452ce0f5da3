"""Norm-preserving recurrence: what it costs, what it keeps, what it learns.

Parts: `cost` (is the parametrisation as cheap as one iteration?), `norms` (state and
gradient over 10,000 steps, against plain and orthogonally initialised convolutional
RNNs), `memory` (stored, checkpointed and recomputed histories against T), and the
tasks `copying`, `adding` and `digits` against an LSTM and a dense expRNN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness import (
    Checkpoint,
    environment,
    figure,
    mean_std,
    require,
    save_figure,
    say,
    table,
    write_json,
)
from benchmarks.unitary import costs as unitary_costs
from benchmarks.unitary import sequences
from benchmarks.unitary.sequences import Training
from rbpjax.unitary import Activation, identity, modulus, saturate

PARTS = ("cost", "norms", "memory", "copying", "adding", "digits")
TITLES = {
    "linear": "unitary conv., linear",
    "saturating": "unitary conv., φ",
    "modulus": "unitary conv., modulus",
    "exprnn": "dense expRNN, modReLU",
    "lstm": "LSTM",
}


@dataclasses.dataclass(frozen=True)
class Unitary:
    """Cost, norms, memory and sequence tasks of the convolutional unitary RNN."""

    parts: tuple[str, ...] = PARTS
    """Any of cost, norms, memory, copying, adding, digits; one result file each."""
    networks: tuple[str, ...] = tuple(TITLES)
    """Networks of the tasks: linear, saturating, modulus, exprnn, lstm."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of weights and data."""
    largest: int = 512
    """Side of the largest lattice of `cost`."""
    num_steps: int = 10_000
    """Steps of `norms`, and the longest history of `memory`."""
    delay: int = 1000
    """Delay of the copying task."""
    length: int = 100
    """Length of the adding problem."""
    dataset: str = "digits"
    """digits (bundled with scikit-learn) or mnist (downloaded, or in RBPJAX_DATA)."""
    shorten: float = 1.0
    """Fraction of the training iterations to run."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> None:
        """Runs the parts one by one: JSON, figure and a table of each."""
        for name, known in (("parts", PARTS), ("networks", NETWORKS)):
            chosen = getattr(self, name)
            unknown = set(chosen) - set(known)
            require(
                bool(chosen) and not unknown, f"--{name}: any of {', '.join(known)}"
            )
        require(bool(self.seeds), "--seeds: at least one")
        require(self.dataset in ("digits", "mnist"), "--dataset: digits or mnist")
        require(16 <= self.largest <= 4096, "--largest: from 16 to 4096")
        require(self.num_steps >= 100, "--num-steps: at least 100")
        require(self.delay >= 2 and self.length >= 4, "--delay or --length too short")
        require(0 < self.shorten <= 1, "--shorten: above 0, at most 1")
        same = dataclasses.replace(Unitary(), parts=self.parts, fresh=self.fresh)
        options = dataclasses.asdict(self)
        del options["parts"], options["fresh"]
        for part in self.parts:
            make, rows, draw = MAKERS[part]
            result = make(self) | {"options": options, "environment": environment()}
            # A run with other options does not overwrite the committed results.
            name = f"unitary-{part}" + ("" if self == same else "-custom")
            write_json(name, result)
            draw(result, name)
            say(f"{name}\n{table(rows(result))}\n")


# --- tasks ---------------------------------------------------------------------------

# The network of a task: (task, gain, scale) -> sequences.Network.
NETWORKS: dict[str, Callable] = {
    "linear": lambda *args: _unitary(identity, *args),
    "saturating": lambda *args: _unitary(saturate, *args),
    "modulus": lambda *args: _unitary(modulus, *args),
    "exprnn": lambda task, *_: sequences.exp_rnn(task, 64),
    "lstm": lambda task, *_: sequences.lstm(task, 64),
}

# (task, network): gain and scale (see `sequences.unitary`), and how to train. Found by
# a few short runs with seed 0, more of them for the unitary cells than for the others.
PLANS: dict[tuple[str, str], tuple[float, float, Training]] = {
    ("copying", "linear"): (1.0, 1.8, Training(1000, 16, 3e-2, 1e-5)),
    ("copying", "saturating"): (0.03, 1.8, Training(700, 16, 3e-2, 1e-5)),
    ("copying", "modulus"): (1.0, 0.1, Training(600, 16, 1e-2, 1e-4)),
    ("copying", "exprnn"): (1.0, 1.8, Training(300, 16, 3e-3, 1e-4)),
    ("copying", "lstm"): (1.0, 1.8, Training(300, 16, 3e-3, 3e-3)),
    ("adding", "linear"): (1.0, 1.8, Training(2000, 32, 1e-2, 1e-3)),
    ("adding", "saturating"): (1.0, 0.1, Training(5000, 32, 3e-3, 3e-4)),
    ("adding", "modulus"): (1.0, 1.8, Training(8000, 32, 1e-2, 1e-3)),
    ("adding", "exprnn"): (1.0, 1.8, Training(3000, 32, 3e-3, 3e-4)),
    ("adding", "lstm"): (1.0, 1.8, Training(3000, 32, 3e-3, 3e-3)),
    ("digits", "linear"): (1.0, 1.8, Training(2000, 64, 3e-3, 3e-4)),
    ("digits", "saturating"): (1.0, 1.8, Training(2000, 64, 3e-3, 3e-4)),
    ("digits", "modulus"): (1.0, 1.8, Training(2000, 64, 3e-3, 3e-4)),
    ("digits", "exprnn"): (1.0, 1.8, Training(600, 64, 3e-3, 3e-4)),
    ("digits", "lstm"): (1.0, 1.8, Training(2000, 64, 3e-3, 3e-3)),
}


def _unitary(activation: Activation, task: Any, gain: float, scale: float) -> Any:
    return sequences.unitary(task, 128, activation, gain, scale)


def train(name: str, make: Callable, options: Unitary) -> dict[str, Any]:
    """Trains the chosen networks on one task; stacks the curves of the seeds."""
    # Runs are kept by task and plan, so that other networks or seeds may join them.
    kept = {k: getattr(options, k) for k in ("delay", "length", "dataset", "shorten")}
    kept["plans"] = {n: p for (task, n), p in PLANS.items() if task == name}
    checkpoint = Checkpoint(f"unitary-{name}", kept, options.fresh)
    result: dict[str, Any] = {}
    for network in options.networks:
        gain, scale, plan = PLANS[name, network]
        short = max(plan.blocks, round(plan.iterations * options.shorten))
        plan = dataclasses.replace(plan, iterations=short)
        logs = []
        for seed in options.seeds:
            task = make(seed)
            run = f"{network}-{seed}"
            logs.append(
                sequences.train(
                    task,
                    NETWORKS[network](task, gain, scale),
                    plan,
                    seed,
                    run,
                    checkpoint,
                )
            )
        curves = {k: [log[k] for log in logs] for k in logs[0] if k != "iterations"}
        iterations = logs[0]["iterations"]
        result[network] = {
            "gain": gain,
            "scale": scale,
            "training": dataclasses.asdict(plan),
            "iterations": iterations,
            **curves,
        }
        losses = mean_std([c[-1] for c in curves["loss"]])
        say(f"{name}: {TITLES[network]}: loss {losses}")
    checkpoint.clear()
    return {"memoryless": task.memoryless, "networks": result}


# --- what a person looks at ----------------------------------------------------------


def cost_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """Kernel ÷ iteration by lattice."""
    return [
        {
            "kernel": title,
            "lattice": f"{side}²",
            "iteration": f"{1e3 * at['iteration']['median']:.3g} ms",
            "kernel time": f"{1e3 * at['kernel']['median']:.3g} ms",
            "ratio": f"{at['ratio']['median']:.2f}",
            "gradient ÷ iteration": (
                f"{at['kernel_gradient']['median'] / at['iteration']['median']:.2f}"
            ),
        }
        for title, sides in result["cases"].items()
        for side, at in sides.items()
    ]


def norm_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """What is left of a state and of a gradient after the last step."""

    def shown(values: Any) -> str:
        last = [row[-1] for row in values]
        return mean_std(last) if np.all(np.isfinite(last)) else "overflow"

    def largest(values: list[float]) -> str:
        return f"{max(values):.1g}" if np.all(np.isfinite(values)) else "overflow"

    return [
        {
            "network": title,
            "state": shown(at["state"]),
            "gradient": shown(at["gradient"]),
            "off by": largest(at["state_deviation"] + at["gradient_deviation"]),
        }
        for title, at in result["networks"].items()
    ]


def memory_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """Memory, time and error by history and T."""
    return [
        {
            "history": title,
            "T": steps,
            "memory": f"{at['temporary_bytes'] / 1e3:.1f} kB",
            "time": f"{1e3 * at['seconds']['median']:.3g} ms",
            "error": f"{at['error']:.1g}",
            "drift": f"{at['drift']:.1g}" if "verse" in title else "–",
        }
        for title, row in result["histories"].items()
        for steps, at in row.items()
    ]


def task_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """Last loss and accuracy, mean ± standard deviation over seeds."""
    last = lambda values: [row[-1] for row in values]
    return [
        {
            "network": TITLES[name],
            "loss": mean_std(last(at["loss"])),
            "of memoryless": f"{np.mean(last(at['loss'])) / result['memoryless']:.3f}",
            "accuracy": mean_std(last(at["accuracy"])),
            "iterations": str(at["iterations"][-1]),
            "time": f"{np.mean(last(at['seconds'])):.0f} s",
        }
        for name, at in result["networks"].items()
    ]


def draw_cost(result: dict[str, Any], name: str) -> None:
    """Times and their ratio against the number of sites."""
    fig, axes = figure(8, 3.2, ncols=2)
    for i, (title, sides) in enumerate(result["cases"].items()):
        sites = [int(side) ** 2 for side in sides]
        of = lambda key, sides=sides: [at[key]["median"] for at in sides.values()]
        style = {"color": f"C{i}", "marker": "o", "ms": 3}
        axes[0].loglog(sites, of("iteration"), label=f"iteration, {title}", **style)
        axes[0].loglog(sites, of("kernel"), ls="--", label=f"kernel, {title}", **style)
        axes[1].semilogx(sites, of("ratio"), label=title, **style)
    axes[0].set(title="time", ylabel="seconds", xlabel="sites of the lattice")
    axes[1].set(title="kernel ÷ one iteration", xlabel="sites of the lattice")
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=7)
    axes[1].legend(fontsize=7)
    save_figure(fig, name)


def draw_norms(result: dict[str, Any], name: str) -> None:
    """Norms of state and gradient against time."""
    fig, axes = figure(9, 4.2, ncols=2, sharey=True)
    styles = ("-", "--", "-.", ":")
    for i, (title, at) in enumerate(result["networks"].items()):
        for ax, key in zip(axes, ("state", "gradient"), strict=True):
            values = np.array(at[key], float)
            # Overflow is null in a file and far outside the figure; so is zero.
            values = np.clip(np.nan_to_num(values, nan=1e30), 1e-30, 1e30)
            mean = np.exp(np.mean(np.log(values), 0))
            ax.loglog(
                result["steps"], mean, color=f"C{i}", ls=styles[i % 4], label=title
            )
    axes[0].set(title="‖h_t‖ / ‖h_0‖", xlabel="steps t", ylim=(1e-12, 1e6))
    axes[1].set(title="‖∂L/∂h_{T-k}‖ / ‖∂L/∂h_T‖", xlabel="steps back k")
    fig.legend(
        *axes[0].get_legend_handles_labels(),
        ncols=3,
        loc="outside lower center",
        fontsize=7,
    )
    save_figure(fig, name)


def draw_memory(result: dict[str, Any], name: str) -> None:
    """Memory and time of one gradient against T."""
    fig, axes = figure(8, 3.4, ncols=2)
    for i, (title, row) in enumerate(result["histories"].items()):
        if title.startswith("modulus"):
            continue  # as the linear cell, without the inverse
        steps = [int(t) for t in row]
        style = {"marker": "o", "ms": 3, "color": f"C{i}", "label": title[8:]}
        axes[0].loglog(steps, [at["temporary_bytes"] for at in row.values()], **style)
        axes[1].loglog(steps, [at["seconds"]["median"] for at in row.values()], **style)
    axes[0].set(title="compiled temporary memory", ylabel="bytes", xlabel="steps T")
    axes[1].set(title="time of one gradient", ylabel="seconds", xlabel="steps T")
    axes[0].legend(fontsize=7)
    save_figure(fig, name)


def draw_task(result: dict[str, Any], name: str) -> None:
    """Loss and accuracy on the test data against iterations."""
    fig, axes = figure(8.5, 3.4, ncols=2)
    for i, (network, at) in enumerate(result["networks"].items()):
        for ax, key in zip(axes, ("loss", "accuracy"), strict=True):
            values = np.array(at[key], float)
            style = {"color": f"C{i}", "label": TITLES[network]}
            ax.plot(at["iterations"][1:], values.mean(0)[1:], **style)
            ax.fill_between(
                at["iterations"][1:],
                values.min(0)[1:],
                values.max(0)[1:],
                color=f"C{i}",
                alpha=0.15,
            )
    axes[0].axhline(result["memoryless"], color="k", lw=0.8, ls=":")
    axes[0].annotate(
        "no memory",
        (0.02, result["memoryless"]),
        xycoords=("axes fraction", "data"),
        va="bottom",
        fontsize=7,
    )
    axes[0].set(title="test loss", yscale="log", xlabel="iterations")
    axes[1].set(title="test accuracy", xlabel="iterations")
    axes[1].legend(fontsize=7)
    seeds = len(result["options"]["seeds"])
    fig.suptitle(f"{name.removeprefix('unitary-')}: mean and range over {seeds} seeds")
    save_figure(fig, name)


MAKERS: dict[str, tuple[Callable, Callable, Callable]] = {
    "cost": (lambda o: unitary_costs.cost(o.largest), cost_rows, draw_cost),
    "norms": (
        lambda o: unitary_costs.norms(o.num_steps, o.seeds),
        norm_rows,
        draw_norms,
    ),
    "memory": (lambda o: unitary_costs.memory(o.num_steps), memory_rows, draw_memory),
    "copying": (
        lambda o: train("copying", lambda s: sequences.copying(o.delay, s), o),
        task_rows,
        draw_task,
    ),
    "adding": (
        lambda o: train("adding", lambda s: sequences.adding(o.length, s), o),
        task_rows,
        draw_task,
    ),
    "digits": (
        lambda o: train("digits", lambda s: sequences.digits(o.dataset, s), o),
        task_rows,
        draw_task,
    ),
}
