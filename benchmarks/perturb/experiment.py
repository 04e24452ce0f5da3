"""Forward-only gradients: do they learn what BPTT learns, and what do they cost?

Parts, each with a result file of its own: the tasks ``forecast``, ``recall``,
``copying`` and ``weather`` (see ``perturb_tasks``), ``scaling`` (forecast, 100 to 1,000
units) and ``cost``.

Every method trains the same network from the same weights with Adam, on fresh data,
with the same budget of forward passes: an update costs K + 1 = 16 for a perturbation
rule and 3 for backpropagation. Each has the best of the same step sizes, chosen on a
validation seed with data of its own; the score is measured on data never trained on.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import numpy as np

from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.figures import (
    few_decades,
    figure,
    legend,
    look,
    save_figure,
)
from benchmarks.harness.options import OneOf, Seeds, Within, require
from benchmarks.harness.progress import say
from benchmarks.harness.results import read_json, record, write_json
from benchmarks.harness.tables import mean_std, table
from benchmarks.perturb.costs import SIZES, by_units, many
from benchmarks.perturb.learning import ARMS, SAMPLES, Setting, compare, methods
from benchmarks.perturb.tasks import VALIDATION_SEED, make

TASKS = ("forecast", "recall", "copying", "weather")
PARTS = (*TASKS, "scaling", "cost")
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SCALED = ("bptt", "tbptt1", "wp", "np", "anp")


@dataclasses.dataclass(frozen=True)
class Perturb:
    """Forward-only gradients: learning, scaling and cost."""

    name: ClassVar[str] = "perturb"

    parts: Annotated[tuple[str, ...], OneOf(PARTS)] = PARTS
    """Any of forecast, recall, copying, weather, scaling, cost."""
    methods: Annotated[tuple[str, ...], OneOf(ARMS)] = ARMS
    """Arms of the tasks: a method's name, with +d for decorrelated."""
    seeds: Seeds = (0, 1, 2, 3, 4)
    """Seeds of weights, data and noise."""
    budget: Annotated[int, Within(320)] = 8_000
    """Forward passes of a batch, for each run of a task."""
    units: Annotated[int, Within(2)] = 100
    """Units of the tasks' network."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> None:
        """Runs the parts: a JSON and a figure for each."""
        require(
            VALIDATION_SEED not in self.seeds,
            f"--seeds: not {VALIDATION_SEED}, it is for validation",
        )
        standard = Perturb(parts=self.parts, fresh=self.fresh)
        custom = "" if self == standard else "-custom"
        for part in self.parts:
            options = {"seeds": self.seeds, "budget": self.budget}
            options |= {"units": self.units, "methods": self.methods, "grid": GRID}
            checkpoints = Checkpoints(f"perturb-{part}", options, self.fresh)
            found = self.measure(part, checkpoints)
            kept = {} if part == "cost" else options
            content = record(
                f"perturb, {part}", f"perturb --parts {part}", kept, **found
            )
            path = write_json(f"perturb-{part}{custom}", content)
            checkpoints.clear()
            result = read_json(path.stem)
            say(show(part, result))
            say(f"written: {path.name}, {draw(part, result, path.stem).name}")

    def measure(self, part: str, checkpoints: Checkpoints) -> dict[str, Any]:
        """The numbers of one part."""
        if part == "cost":
            return {"many": many(9), "by_units": by_units(5)}
        if part == "scaling":
            return {"sizes": self.scale(checkpoints)}
        setting = Setting(part, self.units, 16, self.budget, 1e-3)
        task = make(part, self.seeds[0])
        return {
            "setting": setting._asdict(),
            "samples": SAMPLES,
            "measure": task.measure,
            "naive": task.naive,
            "methods": compare(
                setting, self.methods, self.seeds, GRID, 0.5, checkpoints
            ),
        }

    def scale(self, checkpoints: Checkpoints) -> dict[str, Any]:
        """Final scores against units, at an eighth of the tasks' budget."""
        arms = [m for m in SCALED if m in self.methods]
        result = {}
        for units in SIZES if self.units == Perturb.units else (self.units,):
            setting = Setting("forecast", units, 8, self.budget // 8, 1e-3)
            result[str(units)] = {
                "setting": setting._asdict(),
                "methods": compare(
                    setting,
                    # K copies of the weights: at 1,000 units they take minutes.
                    tuple(a for a in arms if a != "wp" or units <= 200),
                    self.seeds,
                    GRID[:4],
                    0.5,
                    checkpoints,
                ),
            }
        return result


# --- what a person looks at ----------------------------------------------------------


def title(arm: str) -> str:
    """An arm as it is called in tables."""
    name = methods(2, 1, 1)[arm.removesuffix("+d")].title
    return name + (", decorrelated" if arm.endswith("+d") else "")


def shown(values: list[float | None]) -> str:
    """Mean ± standard deviation, and how many runs diverged."""
    finite = [v for v in values if v is not None]
    lost = len(values) - len(finite)
    text = mean_std(finite) if finite else "–"
    return text + (f" ({lost} diverged)" if lost else "")


def rows(part: str, result: dict[str, Any]) -> list[dict[str, str]]:
    """A part's rows."""
    if part == "cost":
        return [
            {
                "K = 1,000": name,
                "seconds": f"{r['seconds']['median']:.3f}",
                "against bare passes": f"{r['ratio']['median']:.2f} "
                f"({r['ratio']['q25']:.2f}–{r['ratio']['q75']:.2f})",
                "memory": f"{r['temporary_bytes']['1000'] / 1e6:.1f} MB",
            }
            for name, r in result["many"]["rules"].items()
        ]
    if part == "scaling":
        sizes = result["sizes"]
        arms = list(next(iter(sizes.values()))["methods"])
        cell = lambda at, arm: (
            shown(at["methods"][arm]["final"]) if arm in at["methods"] else "–"
        )
        return [
            {"NMSE, forecast": title(arm)}
            | {f"{units} units": cell(at, arm) for units, at in sizes.items()}
            for arm in arms
        ]
    naive = ", ".join(f"{k} {v:.3g}" for k, v in result["naive"].items())
    return [
        {
            "method": title(arm),
            f"{result['measure']} ({naive})": shown(m["final"]),
            "step size": f"{m['rate']:g}",
        }
        for arm, m in result["methods"].items()
    ]


def show(part: str, result: dict[str, Any]) -> str:
    """A part's result as a Markdown table."""
    return table(rows(part, result))


def draw(part: str, result: dict[str, Any], name: str) -> Any:
    """The figure of one part."""
    if part == "cost":
        return draw_cost(result, name)
    if part == "scaling":
        return draw_scaling(result, name)
    fig, axes = figure(9, 3.9, ncols=2, sharey=True)
    budget = result["options"]["budget"]
    for arm, m in result["methods"].items():
        base = arm.removesuffix("+d")
        style = look(title(base))
        curves = np.array(m["curves"], float)
        passes = np.linspace(0, budget, curves.shape[1])
        for ax, here in ((axes[0], not arm.endswith("+d")), (axes[1], "+d" in arm)):
            if here:
                ax.plot(passes, np.nanmean(curves, 0), label=title(base), **style)
                low, high = np.nanmin(curves, 0), np.nanmax(curves, 0)
                ax.fill_between(passes, low, high, color=style["color"], alpha=0.1)
    for words, value in result["naive"].items():
        for ax in axes:
            ax.axhline(value, color="k", lw=0.9, ls=":", label=words)
    axes[0].set(title="plain", ylabel=result["measure"] + " on test data")
    axes[1].set(title="with decorrelation")
    for ax in axes:
        ax.set(xlabel="forward passes", yscale="log", ylim=(None, 2))
    if np.log10(axes[0].get_ylim()[1] / axes[0].get_ylim()[0]) < 2:
        few_decades(axes[0].yaxis)
    legend(fig, axes[0], ncols=5)
    words = {
        "forecast": "Mackey-Glass, 15 units ahead",
        "recall": "Mackey-Glass, 15 units ago",
        "copying": "Copying",
        "weather": "Weather",
    }
    fig.suptitle(
        f"{words[part]}: mean and range over {len(result['options']['seeds'])} seeds"
    )
    return save_figure(fig, name)


def draw_scaling(result: dict[str, Any], name: str) -> Any:
    """Final score against units."""
    fig, ax = figure(5.2, 3.9)
    for arm in SCALED:
        sizes = {
            int(u): np.array(at["methods"][arm]["final"], float)
            for u, at in result["sizes"].items()
            if arm in at["methods"]
        }
        mean = [np.nanmean(v) for v in sizes.values()]
        error = [np.nanstd(v) for v in sizes.values()]
        style = look(title(arm))
        ax.errorbar(
            list(sizes), mean, error, marker="o", ms=3, label=title(arm), **style
        )
    ax.set(xscale="log", yscale="log", xlabel="units", ylabel="NMSE on test data")
    ax.set_xticks(SIZES, [str(s) for s in SIZES])
    ax.minorticks_off()
    few_decades(ax.yaxis)
    legend(fig, ax)
    ax.set_title("Mackey-Glass ahead, the same budget of passes")
    return save_figure(fig, name)


def draw_cost(result: dict[str, Any], name: str) -> Any:
    """Time and memory of one gradient against units."""
    fig, axes = figure(8, 3.6, ncols=2)
    at = result["by_units"]
    for arm, sizes in at["methods"].items():
        units = [int(u) for u in sizes]
        style = dict(marker="o", ms=3, label=title(arm), **look(title(arm)))
        seconds = [1e3 * s["seconds"]["median"] for s in sizes.values()]
        axes[0].loglog(units, seconds, **style)
        memory = [s["temporary_bytes"] / 1e6 for s in sizes.values()]
        axes[1].loglog(units, memory, **style)
    axes[0].set(title="time of one gradient", ylabel="ms")
    axes[1].set(title="compiled temporary memory", ylabel="MB")
    for ax in axes:
        ax.set_xlabel("units")
        ax.set_xticks(SIZES, [str(s) for s in SIZES])
        ax.minorticks_off()
    legend(fig, axes[0])
    fig.suptitle(
        f"{at['steps']} steps, {at['examples']} examples, {at['samples']} samples"
    )
    return save_figure(fig, name)
