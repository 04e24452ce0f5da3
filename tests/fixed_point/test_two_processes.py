"""Two processes with ``jax.distributed`` on loopback: as on a cluster of hosts."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "support" / "two_processes.py"


def test_gradients_over_two_processes_are_those_of_one_device():
    """A sharded batch, and a sharded weight matrix, to 1e-6 in float32."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    runs = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(process), address],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(PROGRAM.parents[2])},
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [run.communicate(timeout=240)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert all(run.returncode == 0 for run in runs), outputs
    lines = re.findall(r"error (\S+) converged (\S+)", outputs[0])
    assert len(lines) == 4, outputs[0]  # two shardings, gradients for w and x
    assert all(float(error) <= 1e-6 for error, _ in lines), lines
    assert all(float(converged) == 1 for _, converged in lines), lines
