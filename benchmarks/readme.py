"""``python -m benchmarks readme``: the tables of README.md, from the result files."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import hopfield
from benchmarks.harness import read_json, require, table

README = Path(__file__).parent.parent / "README.md"


def hopfield_table() -> str:
    """The Hopfield table with where it was measured."""
    result = read_json("hopfield-small")
    options, where = result["options"], result["environment"]
    return (
        table(hopfield.rows(result))
        + f"\n\n{options['num_images']} images, {len(options['seeds'])} seeds (mean ± "
        "standard deviation; residuals and ρ(J) are the largest), "
        f"{options['epochs'] * options['num_images']} Adam steps; the corrupted images "
        f"themselves are wrong in {result['input_error']:.3g} of their pixels. "
        f"JAX {where['packages']['jax']}, {where['device']}, {where['cores']} cores, "
        f"{where['date']}."
    )


# A block of README between <!-- name:begin --> and <!-- name:end -->, and its maker.
BLOCKS: dict[str, Callable[[], str]] = {"hopfield": hopfield_table}


def render(text: str) -> str:
    """``text`` with every generated block made anew."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        require(begin in text and end in text, f"README.md has no block {name}")
        block = f"{begin}\n{make()}\n{end}"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


@dataclasses.dataclass(frozen=True)
class Readme:
    """Make the tables of README.md from the result files."""

    def run(self) -> None:
        """Rewrites README.md whole or not at all."""
        partial = README.with_suffix(".md.partial")
        partial.write_text(render(README.read_text()))
        os.replace(partial, README)
