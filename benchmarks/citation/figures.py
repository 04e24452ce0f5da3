"""The figure of a citation run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.figures import figure, save_figure


def draw(result: dict[str, Any], titles: Mapping[str, str]) -> Path:
    """Test accuracy by split and method, and memory against rounds."""
    splits = result["splits"]
    fig, axes = figure(
        3.6 * (len(splits) + 1), 3.3, ncols=len(splits) + 1, squeeze=False
    )
    for ax, (split, found) in zip(axes[0], splits.items(), strict=False):
        arms = {k: v["test_accuracy"] for k, v in found["methods"].items()}
        arms |= found["baselines"]
        for i, values in enumerate(arms.values()):
            across = i + 0.2 * (np.linspace(-1, 1, len(values)) if values[1:] else 0)
            ax.plot(across, values, "o", ms=3, alpha=0.5, color=f"C{i}")
            ax.plot([i - 0.3, i + 0.3], 2 * [np.mean(values)], color=f"C{i}", lw=2)
        names = [titles[k] for k in arms]
        ax.set_xticks(range(len(arms)), names, rotation=35, ha="right")
        ax.set(title=f"test accuracy, {split} split")
        ax.grid(axis="x", visible=False)
    ax = axes[0, -1]
    for i, (name, cost) in enumerate(result["costs"].items()):
        rounds = [int(n) for n in cost["temporary_bytes"]]
        sizes = [b / 1e6 for b in cost["temporary_bytes"].values()]
        # Of several equal lines the last would hide the others.
        style = ("-", "--", ":", "-.", (0, (1, 3)))[i % 5]
        ax.loglog(rounds, sizes, ls=style, marker="o", ms=3, label=titles[name])
    ax.set(title="compiled memory of a training step", xlabel="rounds", ylabel="MB")
    ax.set_ylim(top=30 * ax.get_ylim()[1])  # room for the legend, above the lines
    ax.legend(loc="upper left", fontsize=8)
    size = f"{result['nodes']:,} nodes"
    fig.suptitle(
        f"{result['options']['dataset']}, {result['options']['model']}: {size}"
    )
    return save_figure(fig, result["experiment"])
