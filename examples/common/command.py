"""The command line of an example: options by tyro, errors in one line."""

from __future__ import annotations

import tyro

from benchmarks.harness.experiment import attempt


def main(example: type, given: list[str] | None = None) -> int:
    """Runs the dataclass ``example`` with the options given; the exit code."""
    return attempt(lambda: tyro.cli(example, args=given))
