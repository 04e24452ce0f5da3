"""What a run has found, from its result file: a table and the figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.figures import figure, legend, look, save_figure
from benchmarks.harness.progress import say
from benchmarks.harness.tables import mean_std

TITLES = {
    "bounded": "bounded kernel, σ ≤ 1.4",
    "contraction": "contraction, σ ≤ 0.55",
    "unbounded": "no bound",
    "bptt-20": "BPTT, 20 steps",
    "bptt-40": "BPTT, 40 steps",
    "feed-forward": "feed-forward, 16 layers",
}
NOTE = (
    "Bits right, in %, after twice as many iterations as bits (256 at least); strings "
    "right in all bits, the residual of the state and its relative distance from that "
    "of a random start, at 512 bits after 1,024 iterations; ρ(J) at the end of "
    "training, at 32 bits. 4,096 bits were tried where 512 were right."
)


def say_run(kind: str, seed: int, history: Any, found: Mapping[str, Any]) -> None:
    """A line for one network."""
    last = {n: f"{part['bits'][-1]:.4g}" for n, part in found.items()}
    spent = float(history["core_seconds"][-1])
    say(f"{kind}, seed {seed}: {spent:.0f} core-seconds, % of bits by length {last}")


def longest(result: Mapping[str, Any]) -> str:
    """The length of strings that all networks were tested on, 512 if it was tried."""
    lengths = result["options"]["lengths"]
    return str(max((n for n in lengths if n <= 512), default=min(lengths)))


def rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """A line for each network: each seed, where they are not alike."""
    made, long = [], longest(result)
    for kind, runs in result["networks"].items():
        last = lambda n, what, runs=runs: [
            run["tests"][n][what][-1] for run in runs if what in run["tests"].get(n, {})
        ]
        row = {"network": TITLES[kind]}
        row["core-seconds"] = mean_std(
            [run["history"]["core_seconds"][-1] for run in runs], 2
        )
        for n in map(str, result["options"]["lengths"]):
            row[f"{int(n):,} bits"] = each(last(n, "bits"), "{:.4g}")
        row[f"strings of {long}"] = each(last(long, "strings"), "{:.3g}")
        row["residual"] = each(last(long, "residual"), "{:.0e}")
        far = [run["tests"].get(long, {}).get("distance") for run in runs]
        row["from a random start"] = each([x for x in far if x is not None], "{:.0e}")
        radii = [run["history"]["watched"].get("radius", [None])[-1] for run in runs]
        row["ρ(J)"] = each([x for x in radii if x is not None], "{:.2f}")
        made.append(row)
    return made


def each(values: list[float], form: str) -> str:
    """All values, one where they are alike, a dash where there are none."""
    shown = [form.format(value) for value in values]
    return ", ".join(shown[:1] if len(set(shown)) == 1 else shown) or "–"


def draw(result: Mapping[str, Any], name: str) -> Path | None:
    """The figure: more iterations, longer strings; None without what it is about."""
    if "bounded" not in result["networks"]:
        return None
    fig, (first, second, third) = figure(10, 3.6, ncols=3)
    networks, long = result["networks"], longest(result)
    for i, n in enumerate(map(str, result["options"]["lengths"])):
        style = {"color": f"C{i + 4}", "marker": ".", "ms": 4}
        lines(first, networks["bounded"], n, "bits", **style)
        part = networks["bounded"][0]["tests"][n]
        steep = np.searchsorted(part["bits"], 85)  # where the line has room to its left
        at = part["iterations"][min(steep, len(part["bits"]) - 1)] / 1.25
        first.text(at, 93, f"{int(n):,}\nbits", ha="right", va="center", fontsize=8)
    first.axvline(64, color="k", lw=0.8, ls=":")
    first.text(70, 45.6, "training: 64 iterations, 32 bits", fontsize=7)
    for kind, runs in networks.items():
        style = {"label": TITLES[kind], **look(TITLES[kind])}
        if kind == "feed-forward":
            level = np.mean([run["tests"][long]["bits"][-1] for run in runs])
            second.axhline(level, **style)
            continue
        lines(second, runs, long, "bits", **style)
        lines(third, runs, long, "residual", **style)
    first.set(title="Bounded kernel: bits right, %", ylim=(44, 101.5))
    second.set(title=f"{long} bits: bits right, %", ylim=(44, 101.5))
    third.set(title=f"{long} bits: residual of the state", yscale="log")
    for ax in (first, second, third):
        ax.set(xlabel="iterations")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        ax.tick_params(axis="x", labelsize=8)
    legend(fig, second, third, ncols=6)
    return save_figure(fig, name)


def lines(ax: Any, runs: list[Any], n: str, what: str, **style: Any) -> None:
    """The median over seeds, and each of them thinly."""
    found = [run["tests"][n] for run in runs if n in run["tests"]]
    if not found:
        return
    at, values = found[0]["iterations"], np.array([part[what] for part in found])
    ax.plot(at, np.median(values, axis=0), **style)
    thin = {k: v for k, v in style.items() if k == "color"}
    ax.plot(at, values.T, lw=0.6, alpha=0.5, **thin)
