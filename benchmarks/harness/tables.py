"""Numbers as a person reads them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence


def mean_std(values: Sequence[float], digits: int = 3) -> str:
    """``mean ± standard deviation`` over seeds."""
    values = [float(v) for v in values]
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    shown = f"{statistics.fmean(values):.{digits}g}"
    rounded = f"{float(f'{spread:.1g}'):.0f}" if 10 <= spread < 1e5 else f"{spread:.1g}"
    return f"{shown} ± {rounded}" if len(values) > 1 else shown


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a Markdown table, aligned so that it reads in a terminal too."""
    names = list(rows[0])
    widths = [max(len(n), *(len(row[n]) for row in rows)) for n in names]
    line = lambda cells: (
        "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"
    )
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(names), rule, *(line([r[n] for n in names]) for r in rows)])
