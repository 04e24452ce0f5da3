"""What an experiment is: options, a name, and a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import ClassVar, Protocol

from benchmarks.harness import results
from benchmarks.harness.options import UsageError, check


class Experiment(Protocol):
    """A frozen dataclass: the fields are its options, the first line its help.

    To add one, write it in a file of its own and add a row to ``EXPERIMENTS`` in
    ``benchmarks/__main__.py``, of which the table ``COMMANDS`` is made.
    """

    name: ClassVar[str]
    """What ``python -m benchmarks`` knows it by."""

    def run(self) -> object:
        """Does the work. The options have been checked one by one."""
        ...


def attempt(parse: Callable[[], Experiment]) -> int:
    """Runs what ``parse`` reads from a command line; the exit code."""
    try:
        experiment = parse()
        check(experiment)
        results.prepare()
        experiment.run()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as exit_:
        return int(exit_.code or 0)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
