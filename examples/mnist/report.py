"""What a run has found, from its result file: a table and the figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import results
from benchmarks.harness.figures import (
    few_decades,
    figure,
    legend,
    line_named,
    look,
    save_figure,
)
from benchmarks.harness.tables import mean_std

TITLES = {
    "equilibrium": "at equilibrium",
    "explicit": "explicit, one step",
    "loose": "no contraction, σ ≤ 0.9",
}
LOOSE = "example-mnist-loose"
NOTE = (
    "All 10,000 test images. Memory is temporary memory of a gradient for 128 images; "
    "unrolled networks are the same cell by BPTT, and were not trained. Steps and the "
    "residuals are those of the solves, ρ(J) the largest of 1,000 test images. What is "
    "no contraction is one seed."
)


def networks(result: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a result, and of the run with a bound of 0.9, if it is like it else.

    That is ``--bound 0.9 --kinds equilibrium --seeds 0``, kept under another name.
    """
    found = dict(result["networks"])
    if (results.RESULTS / f"{LOOSE}.json").exists():
        loose = results.read_json(LOOSE)
        apart = {k: result["options"][k] for k in ("bound", "kinds", "seeds")}
        if loose["options"] | apart == result["options"]:
            found["loose"] = loose["networks"]["equilibrium"]
    return found


def rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """A line for each network, and one for each unrolled one, of which only memory."""
    made, same = [], {"loose": "equilibrium"}
    for kind, runs in networks(result).items():
        of = lambda group, name, runs=runs: [
            run["history"][group].get(f"solve/{name}", [0.0]) for run in runs
        ]
        solves = [s for run in runs for s in run["test_solves"] if "residual" in s]
        spent = [run["history"]["core_seconds"][-1] / 60 for run in runs]
        row = {
            "network": TITLES[kind],
            "test error, %": mean_std([run["test_error"] for run in runs], 2),
            "each seed": ", ".join(f"{run['test_error']:.2f}" for run in runs),
            "core-minutes": mean_std(spent, 2),
            "memory, MB": f"{result['memory'][same.get(kind, kind)] / 1e6:.1f}",
            "steps": "1",
        }
        if solves:
            row["steps"] = f"{np.mean([s['num_steps'] for s in solves]):.1f}"
            residual = np.max(of("max", "forward_residual"))
            row["largest residual in training"] = f"{residual:.4f}"
            worst = max(s["residual"] for s in solves)
            row["in the test"] = f"{worst:.4f}"
            row["largest ρ(J)"] = f"{max(s['radius'] for s in solves):.2f}"
        else:
            row |= dict.fromkeys(
                ("largest residual in training", "in the test", "largest ρ(J)"), "–"
            )
        made.append(row)
    blank = dict.fromkeys(made[0], "–")
    for name, size in result["memory"].items():
        if name.startswith("unrolled"):
            row = {"network": f"{name} steps", "memory, MB": f"{size / 1e6:.1f}"}
            made.append(blank | row | {"steps": name.split()[1]})
    return made


def draw(result: Mapping[str, Any], name: str) -> Path:
    """Errors in training, residuals and radii against processor time."""
    fig, (first, second, third) = figure(10, 3.4, ncols=3)
    for kind, runs in networks(result).items():
        style = look(TITLES[kind])
        for i, run in enumerate(runs):
            history = run["history"]
            at = np.array(history["core_seconds"]) / 60
            label = TITLES[kind] if i == 0 else None
            errors = 100 * np.array(history["mean"]["error"])
            first.plot(at, errors, label=label, **style)
            first.plot(at[-1], run["test_error"], "o", color=style["color"], ms=5)
            if kind == "explicit":
                continue
            worst = history["max"]["solve/forward_residual"]
            second.plot(at, worst, label=label, **style)
            third.plot(at, history["watched"]["radius"], **style)
    line_named(second, 1e-2, "tolerance")
    line_named(third, 1.0, "limit of settling", ls="--")
    first.set(title="Error in training, % (points: test)", yscale="log")
    second.set(title="Largest residual of a solve", yscale="log", ylim=(1e-3, 1.2))
    third.set(title="ρ(J), largest of 64 images", ylim=(0, None))
    few_decades(first.yaxis)
    for ax in (first, second, third):
        ax.set(xlabel="core-minutes")
    legend(fig, first, second, third)
    return save_figure(fig, name)
