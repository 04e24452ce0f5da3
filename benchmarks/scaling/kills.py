"""Does a training on several processes survive kill -9, at any time, of any of them?

The example of ``examples/distributed`` is started on one process with two devices, or
on two with one each, by chance; at a random time one of its processes, or all of them,
are killed; what is left must end by itself; then it is started again, until it is done.
Its losses must be those of a run that nobody disturbed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, ClassVar

from benchmarks.harness import manifest
from benchmarks.harness.checkpoints import CHECKPOINTS
from benchmarks.harness.options import Count, Natural, Within, require
from benchmarks.harness.progress import progress, say
from benchmarks.harness.results import record, write_json

PROJECT = Path(__file__).parents[2]
DEVICES = 2


@dataclasses.dataclass(frozen=True)
class Kills:
    """Kill -9 a training on several processes at random times; is anything lost?"""

    name: ClassVar[str] = "kills"

    kills: Count = 50
    """How many."""
    steps: Count = 150
    """Steps of the training."""
    every: Count = 5
    """Steps between two checkpoints."""
    patience: Annotated[float, Within(5)] = 30.0
    """Seconds within which the others must end when a process is killed."""
    seed: Natural = 0
    """Of times, processes and numbers of them."""

    def run(self) -> dict[str, Any]:
        """The kills: JSON, and a line on standard output."""
        folder = CHECKPOINTS / "kills"
        shutil.rmtree(folder, ignore_errors=True)
        found = kill_often(self, folder)
        options = dataclasses.asdict(self)
        whole = self == Kills()
        result = record("kills", "kills", options, **found)
        path = write_json("kills" if whole else "kills-custom", result)
        shutil.rmtree(folder, ignore_errors=True)
        say(
            f"{found['kills']} kills, {found['lost']} checkpoints lost, "
            f"{found['hangs']} hangs; {found['finished']} runs to the end, "
            f"{found['bit_for_bit']} of them bit for bit. Written: {path.name}"
        )
        return result


def kill_often(options: Kills, folder: Path) -> dict[str, Any]:
    """Trains again and again in ``folder``; what came of it."""
    draw = random.Random(options.seed)
    begin = time.monotonic()
    _, said = ended(start(options, folder / "alone", 1), 600)
    duration = time.monotonic() - begin
    require(result(folder / "alone") is not None, f"the run itself failed: {said}")
    right = result(folder / "alone")
    found: dict[str, Any] = {"kills": 0, "lost": 0, "hangs": 0, "finished": 0}
    found |= {"bit_for_bit": 0, "difference": 0.0}
    ends, waits, resumed, number = Counter(), [], [], 0
    bar = iter(progress(range(options.kills), options.kills, "kills"))
    while True:
        place = folder / f"run-{number}"
        last = sealed(place)
        count = draw.choice((1, DEVICES))
        runs = start(options, place, count)
        over = found["kills"] == options.kills
        spared, seconds = [], 0.0
        if not over and alive(runs, draw.uniform(0, duration)):
            next(bar)
            found["kills"] += 1
            struck = draw.sample(runs, draw.choice((1, count)))
            for run in struck:
                run.send_signal(signal.SIGKILL)
            spared = [run for run in runs if run not in struck]
            begin = time.monotonic()
        hung, said = ended(runs, options.patience if spared else 600)
        found["hangs"] += hung
        first = re.search(r"from step (\d+)", said[0])
        if first:
            resumed.append(int(first[1]))
            found["lost"] += resumed[-1] < last
        if spared:
            seconds = time.monotonic() - begin
            waits.append(seconds)
            ends.update(str(run.returncode) for run in spared)
        if result(place) is not None:
            found["finished"] += 1
            values = zip(result(place), right, strict=True)
            difference = max(abs(a - b) for a, b in values)
            found["difference"] = max(found["difference"], difference)
            found["bit_for_bit"] += difference == 0
            number += 1
            if over:
                break
        elif over:
            require(bool(first), f"a restart failed: {said}")
    return found | {
        "ends_of_the_others": dict(ends),
        "slowest_end_of_the_others": max(waits, default=0.0),
        "resumed_from": resumed,
        "seconds_of_a_run": duration,
    }


def start(options: Kills, folder: Path, count: int) -> list[subprocess.Popen]:
    """The example on ``count`` processes, ``DEVICES`` in all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    arguments = (
        f"--tiny --steps {options.steps} --every {options.every} --folder".split()
    )
    common = [*arguments, str(folder), "--patience", str(options.patience * 0.6)]
    joined = ["--coordinator", address, "--processes", str(count), "--process"]
    devices = {"JAX_NUM_CPU_DEVICES": str(DEVICES // count), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "examples.distributed.train", *common]
    return [
        subprocess.Popen(
            [*command, *joined, str(process)] if count > 1 else command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | devices,
            cwd=PROJECT,
            text=True,
        )
        for process in range(count)
    ]


def alive(runs: list[subprocess.Popen], seconds: float) -> bool:
    """Waits; whether all are still there then."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and all(run.poll() is None for run in runs):
        time.sleep(0.01)
    return all(run.poll() is None for run in runs)


def ended(runs: list[subprocess.Popen], seconds: float) -> tuple[int, list[str]]:
    """How many did not end by themselves within that time, and what all said."""
    hung, said = 0, []
    until = time.monotonic() + seconds
    for run in runs:
        try:
            output, _ = run.communicate(timeout=max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            hung += 1
            run.kill()
            output, _ = run.communicate()
        said.append(output)
    return hung, said


def sealed(folder: Path) -> int:
    """The last complete checkpoint, 0 if there is none."""
    paths = [path.parent for path in (folder / "steps").glob(f"*/{manifest.NAME}")]
    return max((int(path.name) for path in paths if path.name.isdigit()), default=0)


def result(folder: Path) -> list[float] | None:
    """The losses of a run that is done."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    return [float.fromhex(x) for x in json.loads(path.read_text())["losses"]]
