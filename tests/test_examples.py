"""Every example of every docstring runs when it is pasted into a float32 session."""

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rbpjax

ROOT = Path(__file__).parents[1]
ROOMS = ("core", "online", "perturb", "unitary", "nn")


def modules() -> dict[str, list[str]]:
    """All modules of the library by room; what is in no room of its own is the core."""
    names = [m.name for m in pkgutil.walk_packages(rbpjax.__path__, "rbpjax.")]
    by_room: dict[str, list[str]] = {room: [] for room in ROOMS}
    for name in ["rbpjax", *names]:
        room = [*name.split("."), ""][1]
        by_room[room if room in ROOMS else "core"].append(name)
    return by_room


@pytest.mark.parametrize("room", ROOMS)
def test_examples_run_as_pasted(room):
    """One process a room, a namespace an example."""
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "examples.py", *modules()[room]],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_X64": "0"},
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-4000:]
    found = re.search(r"(\d+) examples, 0 fail", run.stdout)
    assert found and int(found[1]) > 0
