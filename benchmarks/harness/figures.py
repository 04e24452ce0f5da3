"""Figures in one style."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.harness import results


def figure(width: float, height: float, **grid: Any) -> tuple[Any, Any]:
    """A matplotlib figure: ``(figure, axes)``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "axes.grid": True,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "font.size": 9,
            "grid.alpha": 0.3,
            "legend.frameon": False,
        }
    )
    return plt.subplots(figsize=(width, height), layout="constrained", **grid)


def save_figure(fig: Any, name: str) -> Path:
    """Writes ``results/name.png`` whole or not at all."""
    import matplotlib.pyplot as plt

    path = results.RESULTS / f"{name}.png"
    partial = path.with_suffix(".partial")
    # No date or version in the file: the same numbers give the same bytes.
    fig.savefig(partial, format="png", dpi=120, metadata={"Software": None})
    plt.close(fig)
    os.replace(partial, path)
    return path
