"""Result files: what was measured, and where, by which code and which command."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rbpjax
from benchmarks.harness import guard
from benchmarks.harness.options import UsageError

RESULTS = Path(__file__).parent.parent / "results"


def environment() -> dict[str, Any]:
    """Versions, device, command and code of a measurement, but nothing personal."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "optax", "flax", "numpy")
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "packages": {"rbpjax": rbpjax.__version__}
        | {name: version(name) for name in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "device": f"{device.platform}: {device.device_kind}",
        "x64": bool(jax.config.jax_enable_x64),
        "argv": [_without_folders(argument) for argument in sys.argv[1:]],
        **code(Path(rbpjax.__file__).parent),
    }


def code(package: Path) -> dict[str, Any]:
    """A hash of the sources of ``package``, and the commit that they are of, if any.

    The hash alone tells whether a result is of the code that one has before oneself.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    git = lambda *command: subprocess.run(
        ["git", *command], cwd=package, capture_output=True, text=True
    )
    try:
        commit = git("rev-parse", "HEAD")
        # In a checkout of another project, installed below it, there is no commit.
        inside = git("ls-files", "--error-unmatch", "__init__.py").returncode == 0
        changed = git("status", "--porcelain", "--", ".").stdout != ""
    except OSError:  # no git
        return {"sources": digest.hexdigest()[:16], "commit": None}
    known = commit.stdout.strip() + "+changes" * changed
    return {"sources": digest.hexdigest()[:16], "commit": known if inside else None}


def _without_folders(argument: str) -> str:
    """A path by its last part: folders of one machine are of no use on another."""
    return Path(argument).name if os.path.isabs(argument) else argument


def record(
    experiment: str, command: str, options: Mapping[str, Any], **content: Any
) -> dict[str, Any]:
    """The content of a result file, under the same heads in all of them.

    ``command`` is what makes the committed result anew; what was typed is in the
    environment.
    """
    return {
        "experiment": experiment,
        "command": f"python -m benchmarks {command}",
        "options": dict(options),
        "environment": environment(),
        **content,
    }


def write_json(name: str, content: Mapping[str, Any]) -> Path:
    """Writes ``results/name.json`` whole or not at all."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True, parents=True)
    text = json.dumps(plain(content), indent=1, allow_nan=False)
    # Innermost lists on one line: a person reads the file, and diffs it.
    line = lambda m: "[" + " ".join(m[1].split()) + "]"
    text = re.sub(r"\[([^][{}]*)\]", line, text)
    partial = path.with_suffix(".json.partial")
    partial.write_text(text + "\n")
    os.replace(partial, path)
    return path


def prepare() -> None:
    """Makes the folder of results, and tries to write: before a run, not after it."""
    guard.room(RESULTS, 2**20)


def read_json(name: str) -> dict[str, Any]:
    """Reads ``results/name.json``; UsageError if it is missing or damaged."""
    path = RESULTS / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"no result file {path.name}: run its benchmark") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"damaged result file {path.name}: {error}") from None


def plain(x: Any) -> Any:
    """Arrays as lists, floats to six significant digits, what is not finite as null."""
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if isinstance(x, (np.ndarray, np.generic, jax.Array)):
        return plain(np.asarray(x).tolist())
    if isinstance(x, float):
        return float(f"{x:.6g}") if math.isfinite(x) else None
    return x
