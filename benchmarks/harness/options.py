"""Options of an experiment: what is wrong with them, in one line.

An option is a field of the experiment's dataclass, and what it may be stands in its
type: ``steps: Count = 30``. ``check`` looks at all of them before the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Annotated, Any, get_type_hints


class UsageError(Exception):
    """Something that the user can mend; ends the program in one line, exit code 2."""


def require(condition: bool, message: str) -> None:
    """Raises UsageError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UsageError(message)


@dataclasses.dataclass(frozen=True)
class Within:
    """From ``minimum`` to ``maximum``, the first itself left out if ``above``."""

    minimum: float
    maximum: float = float("inf")
    above: bool = False

    def complaint(self, value: Any) -> str | None:
        """What the option must be, unless it is."""
        low = value > self.minimum if self.above else value >= self.minimum
        if low and value <= self.maximum:  # NaN is neither
            return None
        first = f"{'above' if self.above else 'at least'} {self.minimum:g}"
        return first + (f", at most {self.maximum:g}" * (self.maximum < float("inf")))


@dataclasses.dataclass(frozen=True, init=False)
class OneOf:
    """One of some names."""

    names: tuple[Any, ...]

    def __init__(self, names: Iterable[Any]):
        """The keys of a table will do."""
        object.__setattr__(self, "names", tuple(names))

    def complaint(self, value: Any) -> str | None:
        """What the option must be, unless it is."""
        return (
            None if value in self.names else f"any of {', '.join(map(str, self.names))}"
        )


# Of an option with several values, each has to be right; there must be one at least.
Count = Annotated[int, Within(1)]
Natural = Annotated[int, Within(0)]
Positive = Annotated[float, Within(0, above=True)]
Seeds = Annotated[tuple[int, ...], Within(0)]
Dataset = Annotated[str, OneOf(("digits", "mnist"))]


def check(options: Any) -> None:
    """Raises UsageError for the first field that is not what its type says.

    None is right wherever the type allows it. Of several values none may be repeated.
    """
    hints = get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        name = "--" + field.name.replace("_", "-")
        several = isinstance(value, tuple)
        if several:
            distinct = len(set(value)) == len(value) > 0
            require(distinct, f"{name}: one or more, no two alike; got {list(value)}")
        for limit in _limits(hints[field.name]):
            for one in value if several else (value,):
                complaint = None if one is None else limit.complaint(one)
                require(complaint is None, f"{name}: {complaint}; got {one!r}")


def _limits(hint: Any) -> list[Any]:
    """What a type says of its values, also where None is the other choice."""
    parts = [hint, *getattr(hint, "__args__", ())]
    found = [limit for part in parts for limit in getattr(part, "__metadata__", ())]
    return [limit for limit in found if isinstance(limit, (Within, OneOf))]
