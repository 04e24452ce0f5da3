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
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, ClassVar

from benchmarks.harness import manifest
from benchmarks.harness.checkpoints import Checkpoints
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
    steps: Count = 100
    """Steps of the training."""
    every: Count = 5
    """Steps between two checkpoints."""
    patience: Annotated[float, Within(5)] = 120.0
    """Seconds within which the others must end when a process is killed."""
    seed: Natural = 0
    """Of times, processes and numbers of them."""

    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> dict[str, Any]:
        """The kills: JSON, and a line on standard output."""
        options = {k: v for k, v in dataclasses.asdict(self).items() if k != "fresh"}
        checkpoints = Checkpoints("kills", options, self.fresh)
        kept = checkpoints.folder / "kept.json"
        found = kill_often(self, checkpoints.folder, kept)
        whole = dataclasses.replace(self, fresh=False) == Kills()
        result = record("kills", "kills", options, **found)
        path = write_json("kills" if whole else "kills-custom", result)
        checkpoints.clear()
        say(
            f"{found['kills']} kills, {found['lost']} checkpoints lost, "
            f"{found['hangs']} hangs; {found['finished']} runs to the end, "
            f"{found['bit_for_bit']} of them bit for bit. Written: {path.name}"
        )
        return result


FIRST: dict[str, Any] = {
    "kills": 0,
    "lost": 0,
    "hangs": 0,
    "finished": 0,
    "bit_for_bit": 0,
    "difference": 0.0,
    "ends_of_the_others": {},
    "seconds_to_the_end_of_the_others": [],
    "resumed_from": [],
    "starts": 0,
}


def kill_often(options: Kills, folder: Path, kept: Path) -> dict[str, Any]:
    """Trains again and again in ``folder``; what came of it, also in ``kept``."""
    found = json.loads(kept.read_text()) if kept.is_file() else dict(FIRST)
    alone = folder / "alone"
    if "seconds_of_a_run" not in found:
        begin = time.monotonic()
        said = started(options, alone, 1, None, found)
        found["seconds_of_a_run"] = time.monotonic() - begin
        require(losses(alone) is not None, f"the run itself failed: {said}")
    begun = found["kills"]
    steps = range(begun, options.kills)
    for number in (*progress(steps, options.kills, "kills", begun), options.kills):
        # The last one is not killed: it runs to the end.
        draw = random.Random(f"{options.seed}-{found['starts']}")
        while found["kills"] == number:
            place = folder / f"run-{found['finished']}"
            last, count = sealed(place), draw.choice((1, DEVICES))
            wait = draw.uniform(0, found["seconds_of_a_run"])
            over = number == options.kills
            said = started(options, place, count, None if over else wait, found, draw)
            found["starts"] += 1
            first = re.search(r"from step (\d+)", said)
            if first:
                found["resumed_from"].append(int(first[1]))
                found["lost"] += int(first[1]) < last
            if losses(place) is not None:
                pairs = zip(losses(place), losses(alone), strict=True)
                difference = max(abs(a - b) for a, b in pairs)
                found["finished"] += 1
                found["difference"] = max(found["difference"], difference)
                found["bit_for_bit"] += difference == 0
            elif over:
                require(False, f"the last run failed: {said}")
            kept.with_suffix(".partial").write_text(json.dumps(found))
            os.replace(kept.with_suffix(".partial"), kept)
            if over:
                break
    return found


def started(
    options: Kills,
    folder: Path,
    count: int,
    wait: float | None,
    found: dict[str, Any],
    draw: random.Random = random.Random(0),
) -> str:
    """What process 0 of a training said, of which some were killed after ``wait``."""
    runs = start(options, folder, count)
    try:
        spared: list[subprocess.Popen] = []
        if wait is not None and alive(runs, wait):
            found["kills"] += 1
            struck = draw.sample(runs, draw.choice((1, count)))
            for run in struck:
                run.send_signal(signal.SIGKILL)
            spared = [run for run in runs if run not in struck]
        begin = time.monotonic()
        hung, said = ended(runs, options.patience if spared else 3600)
        found["hangs"] += hung
        if spared:
            seconds = round(time.monotonic() - begin, 2)
            found["seconds_to_the_end_of_the_others"].append(seconds)
        for run in spared:
            ends, code = found["ends_of_the_others"], str(run.returncode)
            ends[code] = ends.get(code, 0) + 1
        return said[0]
    finally:
        for run in runs:
            run.kill()


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
    devices = {
        "JAX_NUM_CPU_DEVICES": str(DEVICES // count),
        "JAX_PLATFORMS": "cpu",
        # Restarts load the program that the first start compiled.
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
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


def losses(folder: Path) -> list[float] | None:
    """The losses of a run that is done."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    return [float.fromhex(x) for x in json.loads(path.read_text())["losses"]]
