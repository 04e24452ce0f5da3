"""Before the work begins: is the folder ours, can it be written, is there room."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import IO

from benchmarks.harness.options import UsageError

_held: dict[Path, IO[str]] = {}  # until the process ends, by itself or by kill -9


def lock(folder: Path, what: str) -> None:
    """Makes ``folder`` this process's own; UsageError if it is another one's.

    By a lock of the system's on a file beside it, which ends with the process.
    """
    path = folder.with_name(folder.name + ".lock")
    if path in _held:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UsageError(f"cannot write into {path.parent}: {reason(error)}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UsageError(
            f"{what} is running already (process {holder}): wait for it, or give "
            "another option"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    _held[path] = file


def unlock(folder: Path) -> None:
    """Gives the folder back."""
    file = _held.pop(folder.with_name(folder.name + ".lock"), None)
    if file is not None:
        file.close()


def room(folder: Path, size: int) -> None:
    """Raises UsageError unless ``size`` bytes can be written into ``folder``."""
    trial = folder / f".trial-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with trial.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.write(bytes(size))
    except OSError as error:
        what = f" {size / 1e6:.3g} MB" * trial.exists()
        raise UsageError(f"cannot write{what} into {folder}: {reason(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()


def reason(error: OSError) -> str:
    """In the system's words."""
    return error.strerror or type(error).__name__
