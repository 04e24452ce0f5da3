"""What a run has found, from its result file: a table and the figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.figures import figure, legend, look, save_figure
from benchmarks.harness.progress import say
from benchmarks.harness.tables import mean_std

NEAR, FAR = (50, 101), (150, 201)
NOTE = (
    "Cora: the standard split, the block of training that is best on the validation "
    "nodes. Chains: trained on 100 nodes, tested on those 50 to 100 edges from the "
    "first one, then on those 150 to 200 edges away; one guess in four is right. What "
    "BPTT has trained is at its fixed point in tests. Steps of the forward and of the "
    "adjoint solve, in the last block of training."
)


def say_run(task: str, kind: str, seed: int, found: Mapping[str, Any]) -> None:
    """A line for one network."""
    spent = float(found["history"]["core_seconds"][-1])
    say(f"{task}, {kind}, seed {seed}: {found['test']:.1f} %, {spent:.0f} core-seconds")


def rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """A line for each task and network."""
    made = []
    for task, kinds in result["networks"].items():
        for kind, runs in kinds.items():
            row = {"task": task, "network": kind}
            if task == "chains":
                near, far = (
                    [np.mean(run["by_distance"][slice(*part)]) for run in runs]
                    for part in (NEAR, FAR)
                )
                row["test accuracy, %"] = each(near)
                row["150 to 200 edges, %"] = each(far)
            else:
                row["test accuracy, %"] = mean_std([run["test"] for run in runs])
                row["150 to 200 edges, %"] = "–"
            histories = [run["history"] for run in runs]
            row["core-seconds"] = mean_std(
                [h["core_seconds"][-1] for h in histories], 2
            )
            steps = [
                np.mean([h["mean"][f"solve/{which}_steps"][-1] for h in histories])
                for which in ("forward", "adjoint")
            ]
            solved = kind == "fixed point"
            row["steps"] = "{:.0f} and {:.0f}".format(*steps) if solved else "–"
            made.append(row)
    return made


def each(values: list[Any]) -> str:
    """The numbers of all seeds."""
    return ", ".join(f"{value:.0f}" for value in values)


def draw(result: Mapping[str, Any], name: str) -> Path:
    """Accuracy in training, and against the distance."""
    fig, (first, second) = figure(9, 3.4, ncols=2)
    for task, kinds in result["networks"].items():
        for kind, runs in kinds.items():
            style = look(kind)
            if task == "chains":
                curves = np.array([run["by_distance"] for run in runs])
                second.plot(curves.mean(0), label=kind, **style)
                continue
            seen = np.array([run["history"]["watched"]["test"] for run in runs])
            at = 20 * np.arange(1, 1 + seen.shape[1])
            first.plot(at, seen.mean(0), label=kind, **style)
            first.fill_between(
                at, seen.min(0), seen.max(0), color=style["color"], alpha=0.1
            )
    first.set(title="Citations: test accuracy, %", xlabel="training steps")
    second.set(
        title="Chains: accuracy, %", xlabel="edges to the node that shows the class"
    )
    legend(fig, first, second)
    return save_figure(fig, name)
