"""A problem's measurements in a few numbers a method: what the result file keeps."""

from __future__ import annotations

from typing import Any

COLUMNS = (
    "forward",  # the setting: two tolerances, or numbers of steps
    "backward",
    "error",
    "q25",  # seconds of value and gradient: quartiles of the turns
    "median",
    "q75",
    "bytes",
    "compile_s",  # median of the method's trials, whatever their settings
)


def summarize(entry: dict[str, Any], fronts: bool = True) -> dict[str, Any]:
    """What was measured on one problem, without the single trials.

    Args:
      entry: ``methods`` with all trials (``curve``) by name, and ``targets`` with the
        chosen ones on the clock.
      fronts: whether to keep error against time, for a figure.

    Returns:
      ``targets``: by target ``methods``, a row of ``COLUMNS`` each, and all ``turns``
      of the three methods that are compared: ratios are made turn by turn.
      ``failures``: what the methods said that gave up. ``fronts``: the trials of each
      method that no other of its trials beats in error and time both (by 10 %), errors
      and seconds in turn.
    """
    methods = entry["methods"]
    curves = {name: _front(m["curve"]) for name, m in methods.items() if fronts}
    return {
        "title": entry["title"],
        "states": entry["states"],
        "rho": entry["rho"],
        "failures": {n: m["failure"][:60] for n, m in methods.items() if m["failure"]},
        "fronts": {name: curve for name, curve in curves.items() if curve},
        "targets": {
            target: {
                "methods": {
                    name: _row(found, methods[name]["compile_s"])
                    for name, found in at["methods"].items()
                },
                "turns": {
                    role: turn | {"steps": at["methods"][turn["method"]].get("steps")}
                    for role, turn in at["turns"].items()
                },
            }
            for target, at in entry["targets"].items()
        },
    }


def rows(entry: dict[str, Any], target: str) -> dict[str, dict[str, Any]]:
    """The methods that met the target, with their columns by name."""
    found = entry["targets"][target]["methods"]
    return {name: dict(zip(COLUMNS, row, strict=True)) for name, row in found.items()}


def _row(found: dict[str, Any], compiles: dict[str, float] | None) -> list[Any]:
    """A method's columns. The median and the bytes are shown: as they were measured."""
    seconds = found["seconds"]
    return [
        found["forward"],
        found["backward"],
        _short(found["error"]),
        _short(seconds["q25"], 2),
        seconds["median"],
        _short(seconds["q75"], 2),
        found.get("bytes"),
        compiles and round(compiles["median"], 4),
    ]


def _front(curve: list[dict[str, float]]) -> list[float]:
    """Error and seconds in turn, from the smallest error on, ever faster by 10 %."""
    kept: list[float] = []
    points = [(p["error"], p["seconds"]) for p in curve if p["error"] is not None]
    for error, seconds in sorted(points):
        if error < 1 and (not kept or seconds < 0.9 * kept[-1]):
            kept += [error, seconds]
    return [_short(x, 2) for x in kept]


def _short(x: float, digits: int = 3) -> float:
    return float(f"{x:.{digits}g}")
