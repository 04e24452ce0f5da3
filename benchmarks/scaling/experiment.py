"""Weak and strong scaling: measured on virtual devices, predicted for accelerators.

Two different things stand side by side. *Measured* are wall times on virtual devices,
which share the cores of one machine: N of them cannot be faster than its cores, and
what they show is the price of dividing the work. *Predicted* is the efficiency on 8, 64
and 512 accelerators: by the model in ``model.py``, from counts of the compiled program
and four numbers of the machine that are given on the command line.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.harness.options import Count, Positive, require
from benchmarks.harness.progress import progress, say
from benchmarks.harness.results import record, write_json
from benchmarks.harness.tables import table
from benchmarks.scaling.model import Machine, computing, efficiency, talking

PROJECT = Path(__file__).parents[2]
SETTINGS = [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (8, 2)]
"""Devices and processes of the measurements."""
ACCELERATORS = (8, 64, 512)


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Weak and strong scaling, measured on virtual devices and predicted for others."""

    name: ClassVar[str] = "scaling"

    units: Count = 512
    """Units of the network, in the measurements and in the counts."""
    rows: Count = 64
    """Examples a device (weak), and 8 times as many in all (strong)."""
    solver_steps: Count = 12
    """Steps of both solves."""
    repetitions: Count = 15
    """Timed training steps of each setting."""
    flops: Positive = 4e14
    """Of matrix products, a second, that an accelerator reaches."""
    memory: Positive = 2.5e12
    """Bytes a second between its memory and itself."""
    link: Positive = 4e10
    """Bytes a second from an accelerator to the next."""
    latency: Positive = 1e-5
    """Seconds that a message takes to begin."""
    accelerator_units: Count = 4096
    """Units of the network that is predicted."""
    accelerator_rows: Count = 2048
    """Its examples a device (weak), and 8 times as many in all (strong)."""

    def run(self) -> dict[str, Any]:
        """Measures, counts and predicts: JSON and two tables."""
        measured = [
            measure(self, weak, devices, processes)
            for weak in (True, False)
            for devices, processes in progress(SETTINGS, len(SETTINGS), "settings")
        ]
        for row in measured:
            same = [r for r in measured if r["weak"] == row["weak"]]
            alone = same[0]["seconds"]["least"]
            work = row["devices"] if row["weak"] else 1  # in all, on the same cores
            row["efficiency_on_shared_cores"] = work * alone / row["seconds"]["least"]
        large = dataclasses.replace(
            self, units=self.accelerator_units, rows=self.accelerator_rows
        )
        counts = measure(large, True, 8, 1, timed=False)
        machine = Machine(self.flops, self.memory, self.link, self.latency)
        options = dataclasses.asdict(self)
        whole = self == Scaling()
        result = record(
            "scaling",
            "scaling",
            options,
            note="virtual devices share the cores: see environment",
            measured=measured,
            counted=counts,
            predicted=predict(machine, counts),
        )
        path = write_json("scaling" if whole else "scaling-custom", result)
        say("Measured, virtual devices on shared cores:")
        say(table(list(map(measured_row, measured))))
        say("Predicted, from counts and the machine of the command line:")
        say(table([predicted_row(row) for row in result["predicted"]]))
        say(f"Written: {path.name}")
        return result


def predict(machine: Machine, counts: dict[str, Any]) -> list[dict[str, Any]]:
    """Efficiencies on accelerators, with the seconds that they are made of."""
    return [
        {
            "weak": weak,
            "devices": n,
            "efficiency": efficiency(machine, counts, 8, n, weak),
            "computing": computing(machine, counts, 1 if weak else 8 / n),
            "talking": talking(machine, counts, n),
        }
        for weak in (True, False)
        for n in ACCELERATORS
    ]


def measure(
    options: Scaling, weak: bool, devices: int, processes: int, timed: bool = True
) -> dict[str, Any]:
    """What the worker finds, in processes of its own."""
    asked = {
        "units": options.units,
        "batch": options.rows * (devices if weak else 8),
        "solver_steps": options.solver_steps,
        "repetitions": options.repetitions if timed else 0,
        "devices": devices,
        "processes": processes,
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        asked["address"] = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "benchmarks.scaling.worker"]
    runs = [
        subprocess.Popen(
            [*command, json.dumps(asked | {"process": process})],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=PROJECT,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        outputs = [run.communicate(timeout=900) for run in runs]
    finally:
        for run in runs:
            run.kill()
    lines = [line for line in outputs[0][0].splitlines() if line.startswith("{")]
    require(bool(lines), f"a worker failed: {outputs[0][1][-300:]!r}")
    found = json.loads(lines[-1])
    require(not found.pop("unknown_loops"), "a loop of unknown length was not counted")
    where = {"weak": weak, "devices": devices, "processes": processes}
    return where | {"batch": asked["batch"], "units": asked["units"]} | found


def measured_row(row: dict[str, Any]) -> dict[str, str]:
    """Of the table."""
    kinds = row["collectives"].items()
    return {
        "scaling": "weak" if row["weak"] else "strong",
        "devices": str(row["devices"]),
        "processes": str(row["processes"]),
        "batch": str(row["batch"]),
        "ms a step, at least": f"{1e3 * row['seconds']['least']:.1f}",
        "efficiency": f"{row['efficiency_on_shared_cores']:.2f}",
        "Gflop a device": f"{row['flops'] / 1e9:.2f}",
        "collectives": ", ".join(f"{v['count']:.0f} {k}" for k, v in kinds) or "none",
    }


def predicted_row(row: dict[str, Any]) -> dict[str, str]:
    """Of the table."""
    return {
        "scaling": "weak" if row["weak"] else "strong",
        "accelerators": str(row["devices"]),
        "efficiency": f"{row['efficiency']:.2f}",
        "ms computing": f"{1e3 * row['computing']:.3g}",
        "ms in collectives": f"{1e3 * row['talking']:.3g}",
    }
