"""What an experiment is: options, a name, and a run."""

from __future__ import annotations

from typing import ClassVar, Protocol


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
