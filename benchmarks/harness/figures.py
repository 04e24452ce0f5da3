"""Figures in one style: one color a method, legends below, words as titles."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import results

# Color and line of every method, wherever it is drawn. The longest key that begins a
# title counts; relatives share a color and differ in their lines.
LOOKS: Mapping[str, tuple[str, Any]] = {
    # Backward passes.
    "BPTT": ("C0", "-"),
    "BPTT, remat": ("C0", ":"),
    "TBPTT": ("C1", "-"),
    "TBPTT(2)": ("C1", "--"),
    "TBPTT(4)": ("C1", "-."),
    "TBPTT(10)": ("C1", "--"),
    "TBPTT(16)": ("C1", ":"),
    "TBPTT(100)": ("C1", "-."),
    "TBPTT(200)": ("C1", ":"),
    "Adaptive": ("C3", "-"),
    "RBP, default rule": ("C3", "-"),
    "default": ("0.1", "-"),
    "JFB": ("C9", "-."),
    "Phantom": ("C5", "-"),
    "unrolled phantom": ("C5", "--"),
    "Broyden": ("C8", ":"),
    "Broyden(share)": ("C8", "-"),
    "reversible": ("C6", "-"),
    "Neumann": ("C4", "--"),
    "one step": ("C9", "-."),
    "RBP, uniform start": ("C2", "-."),
    "RBP(Anderson)": ("C2", "-"),
    "CGNormal": ("C5", ":"),
    "CG-RBP": ("C5", ":"),
    "CG, symmetric J": ("C7", "-"),
    "BiCGSTAB": ("C8", "-"),
    "GMRES": ("C9", "--"),
    "softmax": ("0.5", "-"),
    "SGC": ("0.2", "-"),
    # Streaming.
    "step + its loss gradient": ("0.5", ":"),
    "RTRL": ("0.1", "-"),
    "UORO": ("C3", "-"),
    "UORO, 16 copies": ("C3", "--"),
    "NoBackTrack": ("C6", "-"),
    "NoBackTrack, rows": ("C6", ":"),
    "Kalman NoBackTrack": ("C6", "--"),
    "KF-RTRL": ("C5", "-"),
    "SnAp-1": ("C2", "-"),
    "Diagonal RTRL": ("C4", "-"),
    "Diagonal RTRL, two layers": ("C4", "--"),
    "RFLO": ("C9", "--"),
    "RFLO, e-prop, random feedback": ("C9", ":"),
    # Forward only.
    "WP": ("C2", "-"),
    "NP": ("C3", "-"),
    "NP, instant": ("C3", "--"),
    "ANP": ("C4", "-"),
    "ANP, instant": ("C4", "--"),
    "ANP, paper's code": ("C4", ":"),
    "Truncated ES": ("C1", "-"),
    "PES": ("C6", "-"),
    "NRES": ("C3", "-"),
    # Unitary.
    "unitary conv., linear": ("C2", "-"),
    "unitary conv., φ": ("C4", "-"),
    "unitary conv., modulus": ("C3", "-"),
    "orthogonal + fading units": ("C0", "-"),
    "dense expRNN": ("C5", "--"),
    "LSTM": ("0.4", "--"),
    "stored": ("C0", "-"),
    "checkpointed": ("C0", ":"),
    "Replay": ("C2", "-"),
    "Inverse": ("C3", "-"),
    "Inverse, 10 anchors": ("C3", "--"),
    # Examples.
    "bounded kernel": ("C3", "-"),
    "contraction": ("C2", "--"),
    "no bound": ("C1", "-."),
    "BPTT, 40 steps": ("C0", "-"),
    "BPTT, 20 steps": ("C0", "--"),
    "feed-forward": ("0.5", ":"),
    "at equilibrium": ("C3", "-"),
    "explicit": ("0.5", "--"),
    "explicit, 2 layers": ("0.5", ":"),
    "fixed point": ("C3", "-"),
    "finite differences": ("C2", "--"),
    "BPTT, 8 steps": ("C0", "--"),
    "BPTT, 1000 steps": ("C0", "-"),
    "no contraction": ("C1", "-."),
    # Libraries.
    "rbpjax, default": ("C3", "-"),
    "rbpjax": ("C3", "--"),
    "jaxopt": ("C1", "-"),
    "optimistix": ("C2", "-"),
    "jax": ("0.4", "-"),
    "torchdeq": ("C4", "-"),
}


def look(title: str) -> dict[str, Any]:
    """Color and line style of a method."""
    known = [key for key in LOOKS if title.startswith(key)]
    color, line = LOOKS[max(known, key=len)] if known else ("0.6", "-")
    return {"color": color, "ls": line}


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
            "axes.titlesize": 10,
            "figure.titlesize": 11,
            "font.size": 9,
            "grid.alpha": 0.3,
            "legend.fontsize": 8,
            "legend.frameon": False,
            "lines.linewidth": 1.4,
        }
    )
    return plt.subplots(figsize=(width, height), layout="constrained", **grid)


def legend(fig: Any, *axes: Any, ncols: int = 5) -> None:
    """One legend below the figure, each label of these axes once."""
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    fig.legend(
        list(found.values()),
        list(found),
        loc="outside lower center",
        ncols=min(ncols, len(found)),
    )


def few_decades(axis: Any) -> None:
    """Ticks at 1, 2, 5 for a logarithmic axis of less than two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def line_named(ax: Any, value: float, name: str, **options: Any) -> None:
    """A horizontal line with its name in the legend."""
    ax.axhline(value, **{"color": "k", "lw": 0.9, "ls": ":", "label": name, **options})


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
