"""The figures of ``python -m benchmarks online``, drawn from its result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.figures import figure, legend, look, save_figure
from benchmarks.harness.options import UsageError
from benchmarks.harness.results import read_json
from benchmarks.online.learning import METHODS, POINT


def draw(part: str, name: str) -> list[Path]:
    """The figures of one result file."""
    make = {"quality": draw_quality, "cost": draw_cost, "balance": draw_balance}
    return [make.get(part, draw_learning)(read_json(name), name)]


def draw_quality(result: dict[str, Any], name: str) -> Path:
    """Cosine, spread and bias of every method, before and after training."""
    panels = {
        "cosine_step": "cosine of one step's gradient",
        "cosine_sum": "cosine of 24 steps' sum",
        "spread": "spread / size of the gradient",
        "bias": "bias / size of the gradient",
    }
    fig, axes = figure(11, 3.7, ncols=4, sharey=True)
    names = list(result["methods"])[::-1]
    for ax, (key, title) in zip(axes, panels.items(), strict=True):
        for stage, marker, shift in (("start", "o", 0.15), ("trained", "s", -0.15)):
            values = np.array(
                [[r[key] for r in result["methods"][m][stage]] for m in names], float
            )
            y = np.arange(len(names)) + shift
            if key == "spread":  # deterministic methods have none
                y, values = y[values.max(1) > 0], values[values.max(1) > 0]
            mean = values.mean(1)
            reach = np.stack([mean - values.min(1), values.max(1) - mean])
            ax.errorbar(mean, y, xerr=reach, fmt=marker, ms=4, lw=1, label=stage)
        if key in ("spread", "bias"):
            ax.set_xscale("log")
        ax.set_title(title, fontsize=9)
    noise = [
        [r["bias_noise"] for stage in m.values() for r in stage]
        for m in (result["methods"][m] for m in names)
    ]
    for y, values in enumerate(noise):
        if max(values) > 0:
            axes[3].plot([np.mean(values)] * 2, [y - 0.35, y + 0.35], "k", lw=1)
    axes[3].plot([], [], "k", lw=1, label="sampling error of the mean")
    axes[0].set_yticks(range(len(names)), [METHODS[m].title for m in names])
    legend(fig, axes[0], axes[3])
    seeds = len(result["options"]["seeds"])
    fig.suptitle(
        f"Gradients of a GRU, {result['units']} units, on brackets, against RTRL: "
        f"mean and range over {seeds} networks, {result['draws']} draws of the signs"
    )
    return save_figure(fig, name)


def draw_cost(result: dict[str, Any], name: str) -> Path:
    """Time a step against units, temporary memory against sequence length."""
    fig, axes = figure(9, 4, ncols=2)
    titles = {
        "one_step": "step + its loss gradient",
        "nobacktrack_rows": "NoBackTrack, rows one by one",
        "rtrl": "RTRL",
        "bptt": "BPTT over 100 steps",
    }
    for method, m in result["methods"].items():
        label = titles.get(method) or METHODS[method].title
        style = {**look(label), "marker": "o", "ms": 3, "label": label}
        units = [int(u) for u in m["seconds"]]
        times = np.array([list(s.values()) for s in m["seconds"].values()]) * 1e6
        axes[0].loglog(units, times[:, 0], **style)
        low, high = times[:, 1], times[:, 2]
        axes[0].fill_between(units, low, high, color=style["color"], alpha=0.15)
        lengths = [int(t) for t in m["bytes"]]
        axes[1].loglog(lengths, np.array(list(m["bytes"].values())) / 1e3, **style)
    axes[0].set(title="time a step", xlabel="units", ylabel="µs, median and quartiles")
    axes[0].set_xticks([32, 64, 128, 256], ["32", "64", "128", "256"])
    axes[0].set_xticks([], minor=True)
    axes[1].set(
        title="temporary memory, 64 units", xlabel="length of the run", ylabel="kB"
    )
    legend(fig, axes[1])
    fig.suptitle("A dense tanh layer, float32, one sequence")
    return save_figure(fig, name)


def draw_balance(result: dict[str, Any], name: str) -> Path:
    """The truncated influence, and θ over time."""
    fig, axes = figure(9, 3.8, ncols=2, width_ratios=(1, 1.6))
    influence = result["truncated_influence"]
    axes[0].plot(range(1, len(influence) + 1), influence)
    axes[0].axhline(-6, color="k", lw=0.8, ls="--")
    axes[0].axhline(0, color="k", lw=0.8)
    axes[0].annotate("the truth, -6", (60, -6.2), va="top", fontsize=8)
    axes[0].set(
        title="∂h₁/∂θ through the last T steps",
        xlabel="T",
        ylim=(-9, 18),
        xlim=(0, 200),
    )
    shown = ("RTRL", "UORO", "NoBackTrack", "TBPTT(1)", "TBPTT(10)", "TBPTT(100)")
    for method in (*shown, "TBPTT(200)"):
        m = result["methods"][method]
        for j, curve in enumerate(m["theta"]):
            steps = m["stride"] * (np.arange(len(curve)) + 1)
            theta = np.array(curve, float)
            style = look(method) | ({"label": method} if j == 0 else {})
            axes[1].plot(np.append(0, steps), np.append(0.5, theta), lw=1.2, **style)
    axes[1].axhline(result["optimum"], color="k", lw=0.8, label="θ* = -1/6")
    axes[1].set(title="θ, online", xlabel="steps", ylim=(-0.5, 1.5))
    axes[1].set_xlim(0, result["steps"] / 6)
    legend(fig, axes[1], ncols=8)
    fig.suptitle("Influence balancing: short truncations go the wrong way")
    return save_figure(fig, name)


def draw_learning(result: dict[str, Any], name: str) -> Path:
    """Bits a character against characters read, and against computation."""
    task = name.removeprefix("online-").removesuffix("-custom")
    try:
        pace = read_json("online-cost")["seconds_a_character"][task]
    except UsageError:
        pace = {}
    fig, axes = figure(9, 3.9, ncols=2 if pace else 1, squeeze=False)
    floor = np.inf
    full = {name: m for name, m in result["methods"].items() if m["bits"]}
    for method, m in full.items():
        title = METHODS[method].title
        bits = np.array(m["bits"], float)
        width = max(1, bits.shape[1] // 25)
        bits = bits[:, : bits.shape[1] // width * width]
        bits = bits.reshape(len(bits), -1, width).mean(2)
        read = POINT * width * (np.arange(bits.shape[1]) + 1)
        floor = min(floor, np.nanmin(bits))
        for ax, x in zip(
            axes[0], (read / 1e3, read * pace.get(method, 0)), strict=False
        ):
            ax.plot(x, bits.mean(0), label=title, lw=1.2, **look(title))
            low, high = bits.min(0), bits.max(0)
            ax.fill_between(x, low, high, color=look(title)["color"], alpha=0.07)
    # From the second point on: the first is dominated by the untrained network.
    start = max(np.nanmean(np.array(m["bits"], float)[:, 1]) for m in full.values())
    for ax, label in zip(axes[0], ("thousand characters", "seconds"), strict=False):
        ax.set(xlabel=label, ylim=(0.95 * (result["entropy"] or floor), start))
        if result["entropy"]:
            ax.axhline(result["entropy"], color="k", lw=0.8, label="entropy")
    axes[0, 0].set_ylabel("bits a character, online")
    if pace:
        axes[0, 1].set_xscale("log")
    legend(fig, axes[0, 0], ncols=6)
    titles = {
        "anbn": "aⁿbⁿ, n to 32",
        "brackets": "Distant brackets (1, 5, 10)",
        "text": "WikiText-2 characters",
    }
    units, seeds = result["options"]["units"], len(result["options"]["seeds"])
    fig.suptitle(f"{titles[task]}: GRU, {units} units, mean and range of {seeds} seeds")
    return save_figure(fig, name)
