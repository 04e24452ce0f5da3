"""The command line of an example: options by tyro, errors in one line."""

from __future__ import annotations

import sys
from typing import Any

import tyro

from benchmarks.harness import results
from benchmarks.harness.options import UsageError, check


def main(example: type, given: list[str] | None = None) -> int:
    """Runs the dataclass ``example`` with the options given; the exit code."""
    try:
        made: Any = tyro.cli(example, args=given)
        check(made)
        results.prepare()
        made.run()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
