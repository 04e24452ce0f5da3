"""Table and figures of ``hopfield``."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.harness.figures import (
    few_decades,
    figure,
    legend,
    line_named,
    look,
    save_figure,
)
from benchmarks.harness.tables import mean_std
from benchmarks.hopfield.images import unpack

TITLES = {
    "bptt": "BPTT",
    "tbptt": "TBPTT",
    "rbp": "RBP, uniform start",
    "cg": "CG-RBP",
    "neumann": "Neumann-RBP",
}


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
        for method, m in result["methods"].items():
            values = np.array(m["history"][key], float)
            style = look(TITLES[method])
            ax.plot(m["steps"], values.mean(1), label=TITLES[method], **style)
            ax.fill_between(
                m["steps"],
                values.min(1),
                values.max(1),
                color=style["color"],
                alpha=0.1,
            )
        ax.set(title=title, xlabel="Adam steps")
    axes[0].set_yscale("log")
    few_decades(axes[0].yaxis)
    line_named(axes[1], result["input_error"], "corrupted input")
    axes[1].set_ylim(0)
    line_named(axes[2], 1, "ρ(J) = 1", ls="--")
    axes[2].set_ylim(0, 1.1)
    legend(fig, *axes, ncols=7)
    seeds = len(result["options"]["seeds"])
    fig.suptitle(
        f"Associative memory, {result['options']['dataset']}: mean and range over "
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
    for method, at in result["sweep"].items():
        k = [int(x) for x in at]
        style = {
            "marker": "o",
            "ms": 3,
            "label": TITLES[method],
            **look(TITLES[method]),
        }
        memory = [c["temporary_bytes"] / 1e6 for c in at.values()]
        times = [1e3 * c["seconds"]["median"] for c in at.values()]
        axes[0].loglog(k, memory, **style)
        axes[1].loglog(k, times, **style)
    axes[0].set(title="compiled temporary memory", ylabel="MB")
    axes[1].set(title="time of one gradient", ylabel="ms")
    for ax in axes:
        ax.set(xlabel="truncation K (forward: max(K, 50) updates)")
    legend(fig, axes[0])
    return save_figure(fig, f"{name}-cost")
