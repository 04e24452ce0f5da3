"""What every experiment shares: progress, checkpoints, results, tables, figures."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rbpjax

RESULTS = Path(__file__).parent.parent / "results"
CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


class UsageError(Exception):
    """Something that the user can mend; ends the program in one line, exit code 2."""


def require(condition: bool, message: str) -> None:
    """Raises UsageError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UsageError(message)


def progress(steps: Iterable, total: int, label: str, done: int = 0) -> Iterable:
    """A progress bar around ``steps``; silent where standard error is no terminal."""
    from tqdm import tqdm

    return tqdm(steps, total=total, desc=label, initial=done, disable=None, leave=False)


# --- results -------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Where a result was measured: versions and device, but nothing personal."""
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
    }


def write_json(name: str, content: Mapping[str, Any]) -> Path:
    """Writes ``results/name.json`` whole or not at all."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".json.partial")
    text = json.dumps(_plain(content), indent=1, allow_nan=False)
    # Innermost lists on one line: a person reads the file, and diffs it.
    text = re.sub(r"\[[^][{}]*\]", lambda m: " ".join(m[0].split()), text)
    partial.write_text(text + "\n")
    os.replace(partial, path)
    return path


def read_json(name: str) -> dict[str, Any]:
    """Reads ``results/name.json``; UsageError if it is missing or damaged."""
    path = RESULTS / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"no result file {path.name}: run its benchmark") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"damaged result file {path.name}: {error}") from None


def _plain(x: Any) -> Any:
    """Arrays as lists, floats to six significant digits, what is not finite as null."""
    if isinstance(x, Mapping):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(v) for v in x]
    if isinstance(x, (np.ndarray, np.generic, jax.Array)):
        return _plain(np.asarray(x).tolist())
    if isinstance(x, float):
        return float(f"{x:.6g}") if math.isfinite(x) else None
    return x


def mean_std(values: Sequence[float], digits: int = 3) -> str:
    """``mean ± standard deviation`` over seeds."""
    values = [float(v) for v in values]
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    shown = f"{statistics.fmean(values):.{digits}g}"
    return f"{shown} ± {spread:.1g}" if len(values) > 1 else shown


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a Markdown table, aligned so that it reads in a terminal too."""
    names = list(rows[0])
    widths = [max(len(n), *(len(row[n]) for row in rows)) for n in names]
    line = lambda cells: (
        "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"
    )
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(names), rule, *(line([r[n] for n in names]) for r in rows)])


# --- measurement ---------------------------------------------------------------------


def temporary_bytes(function: Callable, *args: Any) -> int:
    """Bytes of temporary memory that the compiled ``function`` asks for."""
    analysis = jax.jit(function).lower(*args).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes)


def interleaved_times(
    calls: Mapping[str, Callable[[], Any]], repetitions: int
) -> dict[str, list[float]]:
    """Wall-clock seconds of each call, taking turns so that noise hits all alike.

    In another order each time: what stands behind a call that leaves its threads
    spinning, or the caches full, would else always be the slower for it.
    """
    random = np.random.default_rng(0)
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name in random.permutation(list(calls)).tolist():
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            times[name].append(time.perf_counter() - start)
    return times


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(times, [25, 50, 75])
    return {"median": float(middle), "q25": float(low), "q75": float(high)}


# --- checkpoints ---------------------------------------------------------------------


class Checkpoint:
    """The last complete state of one run, kept by orbax until the run is over.

    A run is named by its experiment and all of its options: other options never resume
    from it. The state is a pytree of arrays; a resumed run is the same, bit for bit.
    """

    def __init__(self, experiment: str, options: Mapping[str, Any], fresh: bool):
        """Opens the run's folder; ``fresh`` forgets what an earlier one left."""
        text = json.dumps(_plain(options), sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.folder = (CHECKPOINTS / f"{experiment}-{digest}").absolute()
        if fresh:
            self.clear()

    def restore(self, name: str, like: Any) -> tuple[int, Any]:
        """``(step, state)``: the last saved under ``name``, or ``(0, like)``."""
        # Only whole ones: an interrupted save leaves 3.orbax-checkpoint-tmp.
        names = [path.name for path in (self.folder / name).glob("[0-9]*")]
        steps = [int(step) for step in names if step.isdigit()]
        if not steps:
            return 0, like
        path = self.folder / name / str(max(steps))
        try:
            kind = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            return max(steps), _checkpointer().restore(path, jax.tree.map(kind, like))
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(
                f"damaged checkpoint {path.relative_to(CHECKPOINTS.parent.parent)} "
                f"({reason[:80]}): delete it, or start over with --fresh"
            ) from None

    def save(self, name: str, step: int, state: Any) -> None:
        """Saves, then forgets the step before: there is always a complete one."""
        checkpointer = _checkpointer()
        checkpointer.save(self.folder / name / str(step), state, force=True)
        checkpointer.wait_until_finished()
        for path in (self.folder / name).glob("[0-9]*"):
            if not path.name.isdigit() or int(path.name) < step:
                shutil.rmtree(path)

    def clear(self) -> None:
        """Forgets the run."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp  # two seconds to import: only where it is used

    return ocp.StandardCheckpointer()


# --- figures -------------------------------------------------------------------------


def figure(width: float, height: float, **grid: Any) -> tuple[Any, Any]:
    """A matplotlib figure in the house style: ``(figure, axes)``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "axes.grid": True,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "font.size": 9,
            "grid.alpha": 0.3,
            "legend.frameon": False,
        }
    )
    return plt.subplots(figsize=(width, height), layout="constrained", **grid)


def save_figure(fig: Any, name: str) -> Path:
    """Writes ``results/name.png`` whole or not at all."""
    import matplotlib.pyplot as plt

    path = RESULTS / f"{name}.png"
    partial = path.with_suffix(".partial")
    # No date or version in the file: the same numbers give the same bytes.
    fig.savefig(partial, format="png", dpi=120, metadata={"Software": None})
    plt.close(fig)
    os.replace(partial, path)
    return path


def say(text: str) -> None:
    """A line of output at once, also where it goes into a file."""
    print(text, flush=True)
    sys.stdout.flush()
