"""What stands in a checkpoint's folder: what it is, and a checksum of each file.

It is written last, whole or not at all: a checkpoint without is not complete. What it
says is compared with what is asked for before anything is restored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax

from benchmarks.harness.options import UsageError

NAME = "manifest.json"
WORDS = {
    "code": "it was written by another version of the code",
    "config": "it was written with other options",
    "arrays": "its arrays have other shapes or dtypes",
    "step": "its folder was renamed",
}


@cache
def sources(*packages: Path) -> str:
    """A hash of the sources of ``packages``."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def arrays(state: Any) -> list[str]:
    """The leaves of ``state``: where, and of which dtype and shape."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    name = jax.tree_util.keystr
    return [f"{name(path)} {x.dtype}{list(x.shape)}" for path, x in leaves]


def write(folder: Path, about: Mapping[str, Any]) -> None:
    """Seals the checkpoint in ``folder``: ``about`` it, and all its files."""
    content = json.loads(json.dumps(dict(about) | {"files": _checksums(folder)}))
    partial = folder / (NAME + ".partial")
    with partial.open("w") as file:
        file.write(json.dumps(content | {"checksum": _checksum(content)}, indent=1))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / NAME)


def is_complete(folder: Path) -> bool:
    """Whether the checkpoint in ``folder`` was sealed."""
    return (folder / NAME).is_file()


def check(folder: Path, about: Mapping[str, Any]) -> None:
    """Raises UsageError, of what has changed, unless all is as it was written."""
    try:
        content = json.loads((folder / NAME).read_text())
        right = content.pop("checksum") == _checksum(content)
    except (OSError, ValueError, KeyError, AttributeError):
        right = False
    if not right:
        raise UsageError(f"its {NAME} is damaged")
    wanted = json.loads(json.dumps(dict(about)))
    for name, value in wanted.items():
        if content.get(name) != value:
            changed = _first_change(content.get(name), value)
            raise UsageError(f"{WORDS[name]}: {changed}")
    found = _checksums(folder)
    for name in sorted({*found, *content["files"]}):
        if found.get(name) != content["files"].get(name):
            state = "damaged" if name in found else "missing"
            state = state if name in content["files"] else "new"
            raise UsageError(f"its file {name} is {state}")


def _first_change(old: Any, new: Any) -> str:
    """The first part in which two values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        name = next(k for k in {**old, **new} if old.get(k) != new.get(k))
        return f"{name} {_first_change(old.get(name), new.get(name))}"
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return _first_change(
            *next((a, b) for a, b in zip(old, new, strict=True) if a != b)
        )
    return f"{_short(old)}, not {_short(new)}"


def _short(value: Any) -> str:
    text = f"{len(value)} of them" if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in ``folder``."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (NAME, NAME + ".partial"):
            with path.open("rb") as file:
                name = path.relative_to(folder).as_posix()
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
