"""What a run has found, from its result file: a table and the figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.figures import (
    figure,
    legend,
    line_named,
    look,
    save_figure,
)
from benchmarks.harness.progress import say
from benchmarks.harness.tables import mean_std

NOTE = (
    "PSNR in decibels on 1,000 test images, after some iterations; the residual and "
    "ρ(J) after 64 of them, the largest over seeds. Ridge is plain regularized least "
    "squares; the other linear one knows the covariance of the training images."
)
SHOWN = (1, 4, 16, 64)


def say_run(kind: str, seed: int, history: Any, found: Mapping[str, Any]) -> None:
    """A line for one network."""
    decibels = ", ".join(f"{float(x):.2f}" for x in found["psnr"])
    spent = float(history["core_seconds"][-1])
    say(f"{kind}, seed {seed}: {spent:.0f} core-seconds, PSNR {decibels}")


def rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """A line for each method."""
    columns = [f"{n} iterations" for n in SHOWN]
    blank = dict.fromkeys((*columns, "residual", "ρ(J)", "core-seconds"), "–")
    made = []
    for name, value in result["linear"].items():
        made.append({"method": name} | blank | {columns[0]: f"{value:.1f}"})
    for kind, runs in result["networks"].items():
        row = {"method": kind}
        for n, column in zip(SHOWN, columns, strict=True):
            i = runs[0]["tests"]["iterations"].index(n)
            row[column] = mean_std([number(run["tests"]["psnr"][i]) for run in runs])
        last = max(number(run["tests"]["residual"][-1]) for run in runs)
        row["residual"] = f"{last:.0e}"
        row["ρ(J)"] = f"{max(number(run['tests']['radius']) for run in runs):.2f}"
        spent = [run["history"]["core_seconds"][-1] for run in runs]
        row["core-seconds"] = mean_std(spent, 2)
        made.append(row)
    return made


def number(x: float | None) -> float:
    """NaN where a file has none."""
    return float("nan") if x is None else x


def draw(result: Mapping[str, Any], name: str) -> Path:
    """PSNR and residuals against iterations."""
    fig, (first, second) = figure(8, 3.4, ncols=2)
    for kind, runs in result["networks"].items():
        for i, run in enumerate(runs):
            found, style = run["tests"], look(kind)
            label = kind if i == 0 else None
            numbers = lambda key, found=found: [number(x) for x in found[key]]
            first.plot(found["iterations"], numbers("psnr"), label=label, **style)
            second.plot(found["iterations"], numbers("residual"), **style)
    best = "least squares, covariance"
    line_named(first, result["linear"][best], best)
    first.set(title="PSNR of test images, dB")
    second.set(title="Residual of the iteration", yscale="log")
    for ax in (first, second):
        ax.set(xlabel="iterations in the test")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
    legend(fig, first)
    return save_figure(fig, name)
