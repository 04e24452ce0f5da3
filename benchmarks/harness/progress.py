"""What a person sees while an experiment runs."""

from __future__ import annotations

from collections.abc import Iterable


def progress(steps: Iterable, total: int, label: str, done: int = 0) -> Iterable:
    """A progress bar around ``steps``; silent where standard error is no terminal."""
    from tqdm import tqdm

    return tqdm(steps, total=total, desc=label, initial=done, disable=None, leave=False)


def say(text: str) -> None:
    """A line of output at once, also where it goes into a file."""
    print(text, flush=True)
