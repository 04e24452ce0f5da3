"""Tables and figures of ``unitary``."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.harness.figures import figure, legend, line_named, look, save_figure
from benchmarks.harness.tables import mean_std

TITLES = {
    "linear": "unitary conv., linear",
    "saturating": "unitary conv., φ",
    "modulus": "unitary conv., modulus",
    "mixed": "orthogonal + fading units",
    "exprnn": "dense expRNN, modReLU",
    "lstm": "LSTM",
}


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
        last = np.array([row[-1] for row in values], float)  # null is overflow
        return mean_std(last) if np.all(np.isfinite(last)) else "overflow"

    def largest(values: list[float]) -> str:
        found = np.array(values, float)
        return f"{found.max():.1g}" if np.all(np.isfinite(found)) else "overflow"

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
    fig, axes = figure(8, 4, ncols=2)
    for i, (title, sides) in enumerate(result["cases"].items()):
        sites = [int(side) ** 2 for side in sides]
        of = lambda key, sides=sides: [at[key]["median"] for at in sides.values()]
        style = {"color": f"C{i}", "marker": "o", "ms": 3}
        axes[0].loglog(sites, of("iteration"), label=f"iteration, {title}", **style)
        axes[0].loglog(sites, of("kernel"), ls="--", label=f"kernel, {title}", **style)
        axes[1].semilogx(sites, of("ratio"), **style)
    axes[0].set(title="time", ylabel="seconds", xlabel="sites of the lattice")
    axes[1].set(title="kernel ÷ one iteration", xlabel="sites of the lattice")
    axes[1].set_yscale("log")
    legend(fig, *axes, ncols=3)
    save_figure(fig, name)


def draw_norms(result: dict[str, Any], name: str) -> None:
    """Norms of state and gradient against time."""
    fig, axes = figure(9, 4.4, ncols=2, sharey=True)
    styles = ("-", "--", "-.", ":")
    for i, (title, at) in enumerate(result["networks"].items()):
        for ax, key in zip(axes, ("state", "gradient"), strict=True):
            values = np.array(at[key], float)
            # Overflow is null in a file and far outside the figure; so is zero.
            values = np.clip(np.nan_to_num(values, nan=1e30), 1e-30, 1e30)
            mean = np.exp(np.mean(np.log(values), 0))
            style = {"color": f"C{i}", "ls": styles[i % 4], "label": title}
            ax.loglog(result["steps"], mean, **style)
    axes[0].set(title="norm of the state", xlabel="steps", ylim=(1e-12, 1e6))
    axes[1].set(title="norm of the gradient", xlabel="steps back")
    legend(fig, axes[0], ncols=3)
    save_figure(fig, name)


def draw_memory(result: dict[str, Any], name: str) -> None:
    """Memory and time of one gradient against T."""
    fig, axes = figure(8, 3.7, ncols=2)
    for title, row in result["histories"].items():
        if title.startswith("modulus"):
            continue  # as the linear cell, without the inverse
        steps = [int(t) for t in row]
        history = title.removeprefix("linear: ")
        style = {"marker": "o", "ms": 3, "label": history, **look(history)}
        sizes = [at["temporary_bytes"] / 1e6 for at in row.values()]
        axes[0].loglog(steps, sizes, **style)
        axes[1].loglog(steps, [at["seconds"]["median"] for at in row.values()], **style)
    axes[0].set(title="memory of one gradient", ylabel="MB", xlabel="steps T")
    axes[1].set(title="time of one gradient", ylabel="seconds", xlabel="steps T")
    legend(fig, axes[0])
    save_figure(fig, name)


def draw_task(result: dict[str, Any], name: str) -> None:
    """Loss and accuracy on the test data against iterations."""
    fig, axes = figure(8.5, 3.9, ncols=2)
    for network, at in result["networks"].items():
        style = look(TITLES[network])
        for ax, key in zip(axes, ("loss", "accuracy"), strict=True):
            values = np.array(at[key], float)
            steps = at["iterations"][1:]
            ax.plot(steps, values.mean(0)[1:], label=TITLES[network], **style)
            low, high = values.min(0)[1:], values.max(0)[1:]
            ax.fill_between(steps, low, high, color=style["color"], alpha=0.12)
    line_named(axes[0], result["memoryless"], "without memory")
    axes[0].set(title="test loss", yscale="log", xlabel="iterations")
    axes[1].set(title="test accuracy", xlabel="iterations")
    legend(fig, axes[0], ncols=3)
    options = result["options"]
    # Each part has options of its own.
    words = {
        "copying": "Copying memory, delay {delay:,}",
        "copying-long": "Copying memory, delay {long_delay:,}",
        "adding": "The adding problem, length {length}",
        "adding-long": "The adding problem, length {long}",
        "digits": "Digits, pixel by pixel",
    }
    task = name.removeprefix("unitary-").removesuffix("-custom")
    title = words[task].format(**options)
    fig.suptitle(f"{title}: mean and range over {len(options['seeds'])} seeds")
    save_figure(fig, name)
