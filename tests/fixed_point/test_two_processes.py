"""Two processes with ``jax.distributed`` on loopback: as on a cluster of hosts."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.problems import RULES
from tests.support.sharded import SOLVERS

# All rules but the callable one, which is refused; each solver but the rules' one.
PAIRS = len(RULES) - 1 + len(SOLVERS) - 1
PROGRAM = Path(__file__).parents[1] / "support" / "two_processes.py"


@pytest.mark.parametrize(
    ("what", "rows", "tolerance"), [("arrays", 4, 1e-6), ("parts", PAIRS, 1e-12)]
)
def test_gradients_over_two_processes_are_those_of_one_device(what, rows, tolerance):
    """In float32 and float64.

    Arrays: a sharded batch, and a sharded weight matrix, gradients for w and x. Parts:
    all rules, and all solvers, of a state in parts inside shard_map.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    runs = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(process), address, what],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(PROGRAM.parents[2])},
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [run.communicate(timeout=900)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert all(run.returncode == 0 for run in runs), outputs
    lines = re.findall(r"error (\S+) converged (\S+)", outputs[0])
    assert len(lines) == rows, outputs[0]
    assert all(float(error) <= tolerance for error, _ in lines), lines
    assert all(float(converged) == 1 for _, converged in lines), lines
