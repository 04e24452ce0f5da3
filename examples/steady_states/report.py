"""What a run has found, from its result file: a table and the figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.figures import few_decades, figure, legend, look, save_figure
from benchmarks.harness.tables import mean_std

PANELS = {
    "reactions": ("ligand", "Receptors at rest", ("free", "bound", "inside")),
    "kinetics": ("time", "Robertson's reactions, amounts", ("A", "B · 10⁴", "C")),
    "decisions": ("mileage", "Share of engines replaced", ("replaced",)),
}
NOTE = (
    "The error of a fit is the root mean square over parameters of the relative "
    "deviation from the truth; in standard errors, that of the logarithms, which is "
    "near 1 where nothing but the noise of the data is left. Diverges: the loss is not "
    "finite at the start. An evaluation is one of the loss, with its gradient but for "
    "finite differences: their mean number, and the median time of one. Memory is "
    "temporary memory of loss and gradient. Float64."
)


def rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """A line for each model and method."""
    made = []
    for kind, methods in result["fits"].items():
        for method, fits in methods.items():
            row = {"model": kind, "method": method}
            done = [fit for fit in fits if fit["found"] is not None]
            if not done:
                made.append(
                    dict.fromkeys(made[0], "–") | row | {"error, %": "diverges"}
                )
                continue
            far = [relative(fit) for fit in done]
            row["error, %"] = mean_std([100 * rms(x - 1) for x in far])
            scaled = [
                rms(np.log(x) / np.array(fit["standard_errors"]))
                for x, fit in zip(far, done, strict=True)
                if fit["standard_errors"] is not None
            ]
            row["in standard errors"] = mean_std(scaled, 2) if scaled else "–"
            count = [fit["evaluations"] for fit in done]
            row["evaluations"] = f"{np.mean(count):.0f}"
            each = [1e3 * fit["core_seconds"] / fit["evaluations"] for fit in done]
            row["ms an evaluation"] = f"{np.median(each):.2g}"
            if method == "finite differences":  # of the loss alone, not of a gradient
                made.append(row | {"memory, kB": "–"})
                continue
            row["memory, kB"] = f"{done[0]['memory'] / 1e3:,.0f}"
            made.append(row)
    return made


def relative(fit: Mapping[str, Any]) -> np.ndarray:
    """Found over true parameters."""
    return np.array(fit["found"]) / np.array(fit["truth"])


def rms(x: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(x**2)))


def draw(result: Mapping[str, Any], name: str) -> Path:
    """Data and fits of the first seed, and errors of all."""
    fig, axes = figure(11, 3.3, ncols=4)
    for ax, (kind, curve) in zip(axes, result["curves"].items(), strict=False):
        label, title, names = PANELS[kind]
        seen, fitted = np.array(curve["seen"]), np.array(curve["fitted"])
        if kind == "kinetics":
            seen[:, 1], fitted[:, 1] = 1e4 * seen[:, 1], 1e4 * fitted[:, 1]
        for i, part in enumerate(names):
            color = f"C{i}"
            ax.plot(curve["at"], seen[:, i], ".", ms=4, color=color, alpha=0.6)
            ax.plot(curve["at"], fitted[:, i], color=color, label=part)
        ax.set(xlabel=label, title=title)
        if kind != "decisions":
            ax.set_xscale("log")
        else:
            ax.set_ylim(-0.005, 0.1)  # few buses get farther
        if kind == "reactions":
            few_decades(ax.xaxis)
        ax.legend()
    last, kinds = axes[-1], list(result["fits"])
    methods = list(next(iter(result["fits"].values())))
    for j, method in enumerate(methods):
        label = method
        for i, kind in enumerate(kinds):
            done = [f for f in result["fits"][kind][method] if f["found"] is not None]
            far = [100 * rms(relative(fit) - 1) for fit in done]
            at = i + 0.14 * (j - (len(methods) - 1) / 2)
            style = look(method)
            fill = style["color"] if style.pop("ls") == "-" else "none"
            if far:
                style |= {"marker": "o", "ms": 4, "mfc": fill, "ls": ""}
                last.plot([at] * len(far), far, label=label, **style)
                label = None
    last.set(title="Error of the parameters, %", yscale="log")
    last.set_xticks(range(len(kinds)), kinds)
    legend(fig, last)
    return save_figure(fig, name)
