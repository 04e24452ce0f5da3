"""Tables and figures of ``rules``, from its result file."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.comparison.peers import DEFAULT
from benchmarks.comparison.summary import rows
from benchmarks.harness.figures import figure, legend, look, save_figure
from benchmarks.harness.progress import say
from benchmarks.harness.tables import table

LIBRARIES = ("rbpjax", "jaxopt", "optimistix", "jax", "torchdeq")
DEFAULTS = ("jaxopt normal CG", "optimistix default (LU)")
"""What the peers do when nothing is chosen; the forward iteration is theirs too."""
Entry = dict[str, Any]


def ratio(entry: Entry, target: str, role: str) -> dict[str, Any] | None:
    """The best peer's time ÷ ours, turn by turn: median and quartiles."""
    turns = entry["targets"][target]["turns"]
    if role not in turns or "peer" not in turns:
        return None
    pair = (np.array(turns[who]["seconds"]) for who in ("peer", role))
    return _quartiles(np.divide(*pair))


def overall(result: Entry, target: str, role: str) -> dict[str, Any] | None:
    """The geometric mean over problems, made in each turn: median and quartiles."""
    logs = []
    for entry in result["problems"].values():
        turns = entry["targets"][target]["turns"]
        if role in turns and "peer" in turns:
            pair = (np.log(turns[who]["seconds"]) for who in ("peer", role))
            logs.append(np.subtract(*pair))
    if not logs:
        return None
    return _quartiles(np.exp(np.mean(logs, axis=0))) | {"problems": len(logs)}


def untuned(result: Entry, target: str, peer: str) -> str:
    """A library's own default ÷ ours, tolerances apart: mean over problems, extremes.

    Of medians, not turn by turn: far slower ones have only the time of their trial.
    """
    ratios = []
    for entry in result["problems"].values():
        found = rows(entry, target)
        if peer in found and DEFAULT in found:
            pair = (found[name]["median"] for name in (peer, DEFAULT))
            ratios.append(np.divide(*pair))
    if not ratios:
        return f"{peer} met it nowhere"
    return (
        f"{peer} {np.exp(np.mean(np.log(ratios))):.2f} ({min(ratios):.2f} to "
        f"{max(ratios):.3g}, {len(ratios)} problems)"
    )


def line(entry: Entry) -> str:
    """One problem in a line, as it is done."""
    parts = [entry["title"]]
    for target in entry["targets"]:
        shown = (_shown(ratio(entry, target, role)) for role in ("default", "ours"))
        parts.append(f"error {target}: peer/default {', peer/best rule '.join(shown)}")
    return "; ".join(parts)


def write(result: Entry) -> Entry:
    """Draws the figures, and says what ``benchmarks readme`` writes into the pages."""
    draw_all(result)
    say(tables(result))
    return result


def draw_all(result: Entry) -> None:
    """Both figures."""
    for name, draw in (("rules-error", draw_error), ("rules-memory", draw_memory)):
        save_figure(draw(result), name)


def summary(result: Entry) -> str:
    """The ratios of all problems in one table, their means, and our own costs."""
    targets = list(next(iter(result["problems"].values()))["targets"])
    means = [
        f"{_shown(overall(result, target, role))} ({name}) at {target}"
        for target in targets
        for role, name in (("ours", "best rule"), ("default", "default"))
    ]
    costs, ratios = result["costs"], []
    for k, c in costs["truncation"].items():
        ratios.append(f"{_shown(c['ratio'])} at K = {k}")
    memory = []
    for batch, methods in costs["memory"].items():
        last = {name: list(sizes.values())[-1] for name, sizes in methods.items()}
        pair = (last["BPTT"] / last[name] for name in ("Neumann", "Adaptive"))
        memory.append(f"{', '.join(f'{r:,.0f}' for r in pair)} for {batch} × 256 units")
    overhead = "; ".join(
        f"{n} {_shown(c['ratio'])}" for n, c in costs["overhead"].items()
    )
    least = ""
    if "limit" in costs:
        above = _above_limit(costs["limit"])
        least = (
            "Products of a backward solve ÷ the fewest that any method of products "
            f"with Jᵀ can do with: {above['the best of these']} for our best rule, "
            f"{above['BiCGSTAB']} for BiCGSTAB, mostly the fastest that others have "
            "(geometric means over as many problems). "
        )
    return "\n\n".join(
        [
            table([_summary_row(e, targets) for e in result["problems"].values()]),
            "The fastest other library's time ÷ ours, for value and gradient at the "
            "same relative gradient error, by the fastest of our rules, then by the "
            "default; medians and quartiles of interleaved turns, above 1 is faster.",
            "\n".join(
                [
                    f"- Geometric means: {'; '.join(means)}.",
                    f"- Neumann(K) ÷ TBPTT(K + 1): {', '.join(ratios)}.",
                    "- BPTT's temporary memory at 5,000 steps ÷ ours (Neumann, "
                    f"default): {'; '.join(memory)}.",
                    "- Time of a backward solve ÷ its products in a bare loop: "
                    f"{overhead}.",
                    *([f"- {least.strip()}"] if least else []),
                    "- `import rbpjax`: "
                    f"{costs['imports']['above']['median']:.2f} s above `import jax`.",
                ]
            ),
        ]
    )


def _summary_row(entry: Entry, targets: list[str]) -> dict[str, str]:
    """Who is compared with whom, and how they compare."""
    row = {"problem": entry["title"]}
    for target in targets:
        turns = entry["targets"][target]["turns"]
        names = [
            turns.get(role, {}).get("method", "–").removeprefix("rbpjax ")
            for role in ("ours", "peer")
        ]
        row[f"ours, other at {target}"] = ", ".join(names)
        row[f"ratio at {target}"] = _shown(ratio(entry, target, "ours"))
        row[f"default at {target}"] = _shown(ratio(entry, target, "default"))
    return row


def tables(result: Entry) -> str:
    """Everything that the report says in Markdown."""
    where = result["environment"]
    packages = ", ".join(f"{k} {v}" for k, v in where["packages"].items())
    parts = []
    for target in next(iter(result["problems"].values()))["targets"]:
        parts += [
            f"Milliseconds of value and gradient at a relative gradient error of "
            f"{target}; *ratio* is the fastest other library's time ÷ ours, turn by "
            "turn, median and quartiles. – none of its settings met the error.",
            table([_row(entry, target) for entry in result["problems"].values()]),
            f"Geometric means at {target}: "
            + "; ".join(
                f"{title} {_shown(overall(result, target, role))}"
                for role, title in (("default", "default"), ("ours", "best rule"))
            )
            + ". The defaults of other libraries ÷ our default, where they meet the "
            "error at all: "
            + "; ".join(untuned(result, target, peer) for peer in DEFAULTS)
            + ".",
        ]
    parts += [
        "Compile time and temporary memory of the default and of the fastest peer (at "
        f"{target}):",
        table([_cost_row(entry, target) for entry in result["problems"].values()]),
        *_costs(result["costs"], result["problems"]),
        f"{where['date']}, {where['device']}, {where['cores']} cores, {packages}.",
    ]
    return "\n\n".join(parts)


def _row(entry: Entry, target: str) -> dict[str, str]:
    """Times of the default, and the best of each library."""
    found = rows(entry, target)
    row = {"problem": entry["title"], "default": _time(found, [DEFAULT])}
    row["best rule"] = _time(found, [n for n in found if n.startswith("rbpjax")], True)
    for library in ("jaxopt", "optimistix"):
        row[library] = _time(found, [n for n in found if n.startswith(library)], True)
    row["custom_root"] = _time(found, ["jax custom_root"])
    row["BPTT, TBPTT"] = _time(found, ["jax BPTT", "jax TBPTT"])
    row["torchdeq"] = _time(found, [n for n in found if n.startswith("torch")], True)
    row["ratio, default"] = _shown(ratio(entry, target, "default"))
    row["ratio, best rule"] = _shown(ratio(entry, target, "ours"))
    return row


def _time(found: Entry, names: list[str], tell: bool = False) -> str:
    """The shortest median of these methods, with the name of it."""
    seconds = {n: found[n]["median"] for n in names if n in found}
    if not seconds:
        return "–"
    name = min(seconds, key=seconds.__getitem__)
    shown = f"{1e3 * seconds[name]:.3g}"
    return f"{shown} {name.split(' ', 1)[1]}" if tell else shown


def _cost_row(entry: Entry, target: str) -> dict[str, str]:
    row = {"problem": entry["title"]}
    turns, found = entry["targets"][target]["turns"], rows(entry, target)
    for role, title in (
        ("default", "default"),
        ("ours", "best rule"),
        ("peer", "peer"),
    ):
        name = turns.get(role, {}).get("method")
        compile_s, size = (found.get(name, {}).get(k) for k in ("compile_s", "bytes"))
        row[f"{title}: compile"] = f"{compile_s:.2f} s" if compile_s else "–"
        row[f"{title}: memory"] = f"{size / 1e6:.3g} MB" if size else "–"
    return row


def _costs(costs: Entry, problems: Entry) -> list[str]:
    parts = []
    if "truncation" in costs:
        listed = [
            {
                "K": k,
                "Neumann(K) ÷ TBPTT(K + 1)": _shown(c["ratio"]),
                "TBPTT": f"{c['bytes']['tbptt'] / 1e6:.2f} MB",
                "Neumann": f"{c['bytes']['neumann'] / 1e6:.2f} MB",
            }
            for k, c in costs["truncation"].items()
        ]
        parts += [
            "Time of the gradient by Neumann(K) ÷ by TBPTT(K + 1), tanh RNN 128 × 256 "
            "with 101 steps forward, and temporary memory:",
            table(listed),
        ]
    if "overhead" in costs:
        listed = [
            {
                "rule": name,
                "products": str(c["products"]),
                "time ÷ bare products": _shown(c["ratio"]),
            }
            for name, c in costs["overhead"].items()
        ]
        parts += [
            "Time of the backward solve ÷ time of as many products in a bare loop, "
            "tanh RNN 128 × 256, ‖W‖₂ = 0.9, tolerance 1e-6:",
            table(listed),
        ]
    if "limit" in costs:
        parts += _limit(costs["limit"], problems)
    if "memory" in costs:
        made = []
        for batch, methods in costs["memory"].items():
            last = {name: list(sizes.values())[-1] for name, sizes in methods.items()}
            made.append(
                f"{last['BPTT'] / last['Neumann']:,.0f} (Neumann) and "
                f"{last['BPTT'] / last['Adaptive']:,.0f} (default) times ours for "
                f"{batch} × 256 units"
            )
        parts.append("BPTT's temporary memory at 5,000 steps: " + "; ".join(made) + ".")
    if "imports" in costs:
        c = costs["imports"]
        parts.append(
            f"`import rbpjax` takes {c['above']['median']:.2f} s "
            f"[{c['above']['q25']:.2f}, {c['above']['q75']:.2f}] more than `import "
            f"jax` ({c['jax']['median']:.2f} s)."
        )
    return parts


def _limit(limit: Entry, problems: Entry) -> list[str]:
    """Products of each rule, and how far they are from the fewest."""
    listed = [
        {"problem": problems[name]["title"]}
        | {rule: "–" if n is None else str(n) for rule, n in counts.items()}
        for name, counts in limit.items()
    ]
    means = (f"{rule} {mean}" for rule, mean in _above_limit(limit).items())
    return [
        "Products with Jᵀ (CGNormal: and J) of a backward solve to a residual of 1e-4, "
        "and the fewest that any method can do with whose iterate is made of products "
        "with Jᵀ: GMRES without a restart. All aim at half of it, and verify it by one "
        "product, which is counted but for the fewest. – not reached.",
        table(listed),
        "Products ÷ the fewest, geometric means over the problems (as many) where both "
        f"reach it: {', '.join(means)}.",
    ]


def _above_limit(limit: Entry) -> dict[str, str]:
    """Products ÷ the fewest of each rule, and of the best of them: geometric means."""
    counts = [
        {rule: n for rule, n in found.items() if n} | {"fewest": found["fewest"]}
        for found in limit.values()
        if found["fewest"]
    ]
    for found in counts:
        others = [n for rule, n in found.items() if rule != "fewest"]
        if others:
            found["the best of these"] = min(others)
    shown = {}
    for rule in [*next(iter(limit.values())), "the best of these"]:
        logs = [
            np.log(found[rule] / found["fewest"]) for found in counts if rule in found
        ]
        if rule != "fewest" and logs:
            shown[rule] = f"{np.exp(np.mean(logs)):.2f} ({len(logs)})"
    return shown


def draw_error(result: Entry) -> Any:
    """Time against error: for each library the best that any of its methods does."""
    names = [n for n in result["problems"] if not n.startswith("family")]
    columns = 5
    lines = max(-(-len(names) // columns), 1)
    fig, axes = figure(13, 2.8 * lines + 0.4, nrows=lines, ncols=columns, squeeze=False)
    words = {"rbpjax": "rbpjax, best rule", "jax": "jax: custom_root, BPTT, TBPTT"}
    for ax, name in zip(axes.flat, names, strict=False):
        entry = result["problems"][name]
        for library in LIBRARIES:
            best = front(entry, lambda m, library=library: m.split()[0] == library)
            if best:
                label = words.get(library, library)
                ax.loglog(*zip(*best, strict=True), label=label, **look(library))
        default = front(entry, lambda method: method == DEFAULT)
        if default:
            style = look("rbpjax, default") | {"lw": 2.2, "zorder": 4}
            ax.loglog(*zip(*default, strict=True), label="rbpjax, default", **style)
        ax.set_title(entry["title"])
        ax.invert_xaxis()
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("time, ms")
    for ax in axes[-1]:
        ax.set_xlabel("relative gradient error")
    legend(fig, *axes.flat, ncols=6)
    return fig


def front(entry: Entry, wanted: Any) -> list[tuple[float, float]]:
    """(error, milliseconds) that no other trial of the wanted methods beats in both."""
    trials = sorted(
        (error, 1e3 * seconds)
        for method, values in entry["fronts"].items()
        if wanted(method)
        for error, seconds in zip(values[::2], values[1::2], strict=True)
    )
    kept: list[tuple[float, float]] = []
    for error, time in trials:  # from the smallest error on
        if not kept or time < kept[-1][1]:
            kept.append((error, time))
    return kept


def draw_memory(result: Entry) -> Any:
    """Temporary bytes against steps, for one example and a batch."""
    memory = result["costs"]["memory"]
    words = {
        "TBPTT, half": "TBPTT, half of the steps",
        "Neumann": "rbpjax, Neumann",
        "Adaptive": "rbpjax, default",
    }
    fig, axes = figure(8, 3.4, ncols=len(memory), squeeze=False)
    for ax, (batch, methods) in zip(axes[0], memory.items(), strict=True):
        for name, sizes in methods.items():
            ax.loglog(
                list(map(int, sizes)),
                [size / 1e6 for size in sizes.values()],
                marker="o",
                ms=3,
                label=words.get(name, name),
                **look(name),
            )
        ax.set_title(f"{batch} example{'s' * (batch != '1')} of 256 units")
        ax.set_xlabel("steps of the network")
    axes[0, 0].set_ylabel("memory of one gradient, MB")
    legend(fig, axes[0, 0])
    return fig


def _quartiles(values: np.ndarray) -> dict[str, Any]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "q25": float(low), "q75": float(high)}


def _shown(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    return f"{found['median']:.2f} [{found['q25']:.2f}, {found['q75']:.2f}]"
