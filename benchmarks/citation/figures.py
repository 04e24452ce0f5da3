"""The figure of a citation run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.figures import figure, legend, look, save_figure


def draw(result: dict[str, Any], titles: Mapping[str, str]) -> Path:
    """Test accuracy by split and method, and memory against rounds."""
    splits = result["splits"]
    fig, axes = figure(
        3.4 * (len(splits) + 1) + (not splits),
        3.6,
        ncols=len(splits) + 1,
        squeeze=False,
    )
    words = {"standard": "standard split", "random": "1 % of the labels"}
    for ax, (split, found) in zip(axes[0], splits.items(), strict=False):
        arms = {k: v["test_accuracy"] for k, v in found["methods"].items()}
        arms |= found["baselines"]
        for i, (arm, values) in enumerate(arms.items()):
            color = look(titles[arm])["color"]
            across = i + 0.2 * (np.linspace(-1, 1, len(values)) if values[1:] else 0)
            ax.plot(across, values, "o", ms=3, alpha=0.5, color=color)
            ax.plot([i - 0.3, i + 0.3], 2 * [np.mean(values)], color=color, lw=2)
        names = [titles[k] for k in arms]
        ax.set_xticks(range(len(arms)), names, rotation=35, ha="right")
        ax.set(title=f"test accuracy, {words.get(split, split)}")
        ax.grid(axis="x", visible=False)
    ax = axes[0, -1]
    for name, cost in result["costs"].items():
        rounds = [int(n) for n in cost["temporary_bytes"]]
        sizes = [b / 1e6 for b in cost["temporary_bytes"].values()]
        style = look(titles[name])
        ax.loglog(rounds, sizes, marker="o", ms=3, label=titles[name], **style)
    ax.set(title="memory of a training step", xlabel="rounds", ylabel="MB")
    legend(fig, ax)
    model = {"paper": ", the network of the paper's code"}
    words = model.get(result["options"]["model"], "")
    fig.suptitle(
        f"{result['options']['dataset'].title()}, {result['nodes']:,} nodes{words}"
    )
    return save_figure(fig, result["experiment"])
