"""Counts of what a solver did, and the table of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks.comparison.collection.drawn import KINDS
from benchmarks.comparison.collection.problems import tuned
from benchmarks.comparison.collection.verdict import Entry, describe


def counts(found: dict[str, Entry]) -> dict[str, Any]:
    """How many problems ended how."""
    entries = list(found.values())
    solved = [e for e in entries if e["verdict"] == "solved"]
    flagged = Counter(e["status"] for e in entries if e["verdict"] == "flagged")
    with_gradient = [e for e in entries if "gradient" in e]
    return {
        "problems": len(entries),
        "solved": len(solved),
        "silent": sum(e["verdict"] == "silent" for e in entries),
        "flagged": dict(flagged),
        "flagged_though_right": sum(
            e["verdict"] == "flagged" and e["right"] for e in entries
        ),
        "work_on_solved": sum(e["work"] for e in solved),
        "gradients": dict(Counter(e["gradient"] for e in with_gradient)),
        "report_alone_wrong": sum(e["report_alone_wrong"] for e in with_gradient),
    }


def summary(found: dict[str, Entry]) -> dict[str, Any]:
    """Counts of all and of each half, and the names of what is not solved."""
    halves = {
        "tune": {n: e for n, e in found.items() if n in tuned()},
        "report": {n: e for n, e in found.items() if n not in tuned()},
    }
    silent = [n for n, e in found.items() if e["verdict"] == "silent"]
    gradients = [n for n, e in found.items() if e.get("gradient") == "silent"]
    flagged = {n: e["status"] for n, e in found.items() if e["verdict"] == "flagged"}
    return {
        "all": counts(found),
        **{half: counts(part) for half, part in halves.items()},
        "silent": silent,
        "silent_gradients": gradients,
        "flagged": flagged,
    }


def summary_of_kinds(found: dict[str, Entry]) -> dict[str, Any]:
    """Counts of all and by kind, and the names of what is silent."""
    return {
        "all": counts(found),
        "kinds": {
            kind: counts({n: e for n, e in found.items() if n.startswith(f"{kind} ")})
            for kind in KINDS
        },
        "silent": {
            n: describe(e)
            for n, e in found.items()
            if "silent" in (e["verdict"], e["gradient"])
        },
    }


def rows(solvers: dict[str, Any]) -> list[dict[str, str]]:
    """A row a solver and precision, of their summaries."""
    return [
        {"solver": solver, "precision": precision} | row(found)
        for solver, by_precision in solvers.items()
        for precision, found in by_precision.items()
    ]


def row(found: dict[str, Any]) -> dict[str, str]:
    """One summary as a person reads it."""
    c, held_out = found["all"], found.get("report")
    words = ", ".join(f"{n} {s}" for s, n in c["flagged"].items())
    cells = {
        "solved": f"{c['solved']} of {c['problems']}",
        "silent": f"{c['silent']}",
        "flagged": words or "–",
        "flagged, right": f"{c['flagged_though_right']}",
        "evaluations + products": f"{c['work_on_solved']}",
    }
    if held_out is not None:
        share = f"{held_out['solved']} of {held_out['problems']}"
        cells["held out: solved"] = share
        cells["held out: silent"] = f"{held_out['silent']}"
    gradients = c["gradients"]
    for kind in ("right", "silent"):
        count = gradients.get(kind, 0)
        cells[f"gradients {kind}"] = f"{count}" if gradients else "–"
    alone = c["report_alone_wrong"]
    cells["report alone wrong"] = f"{alone}" if gradients else "–"
    return cells
