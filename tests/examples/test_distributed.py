"""The distributed example: its files, and its runs on one process and on two."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from benchmarks.harness import manifest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "distributed"
STEPS = 12


def test_the_script_is_short_and_uses_public_names():
    text = (FOLDER / "train.py").read_text()
    assert len(text.splitlines()) <= 200
    assert "rbpjax._core" not in text and "._" not in text


def test_the_manifests_agree():
    """The address that pods are given is that of pod 0 of the job's own service."""
    parts = list(yaml.safe_load_all((FOLDER / "job.yaml").read_text()))
    service, claim, job = parts
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {e["name"]: e["value"] for e in container["env"]}
    name = job["metadata"]["name"]
    assert env["COORDINATOR_ADDRESS"].startswith(f"{name}-0.{pod['subdomain']}:")
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["spec"]["clusterIP"] == "None"
    assert int(env["NUM_PROCESSES"]) == job["spec"]["completions"]
    assert job["spec"]["parallelism"] == job["spec"]["completions"]
    (volume,) = pod["volumes"]
    claimed = volume["persistentVolumeClaim"]["claimName"]
    assert claimed == claim["metadata"]["name"]


def start(folder, count, *more, devices=2):
    """The example on ``count`` processes, ``devices`` in all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    options = f"--tiny --steps {STEPS} --every 3 --patience 100 --folder".split()
    env = {"JAX_NUM_CPU_DEVICES": str(devices // count), "JAX_PLATFORMS": "cpu"}
    joined = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "examples.distributed.train"),
                *(*options, str(folder), *more),
            ],
            env=os.environ | env | joined | {"PROCESS_ID": str(process)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]


def finish(runs):
    """``(codes, outputs, errors)``; no process outlives the test."""
    try:
        said = [run.communicate(timeout=300) for run in runs]
    finally:
        for run in runs:
            run.kill()
    return [run.returncode for run in runs], *zip(*said, strict=True)


def losses(folder):
    found = json.loads((folder / "result.json").read_text())["losses"]
    return [float.fromhex(x) for x in found]


ABORTED = """
import os, sys
from examples.distributed import peers
if peers.CHILD not in os.environ:
    sys.exit(peers.watched())
print("E1127 01:19 6254 coordination_service_agent.cc:289] Polled", file=sys.stderr)
print("F1127 01:19 6254 client.h:80] Terminating process", file=sys.stderr)
print("    @  0x7fe7bd6f0321  a stack trace", file=sys.stderr, flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["os.abort()", "peers._end('a reason', 75)"])
def test_an_abort_of_jax_becomes_one_line(tmp_path, end):
    """Whichever of JAX's threads is first."""
    script = tmp_path / "aborted.py"
    script.write_text(ABORTED.replace("{end}", end))
    run = subprocess.run(
        [sys.executable, str(script), "--process", "3"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    line = "process 3: a peer is gone (Terminating process); start all again\n"
    assert (run.returncode, run.stderr) == (75, line)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on one process with two devices that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    codes, outputs, _ = finish(start(folder, 1))
    assert codes == [0] and "2 devices, 1 processes: from step 0" in outputs[0]
    return folder


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_and_a_restart_on_another_number_of_processes(whole, tmp_path, victim):
    """Two processes, one killed; the other ends in one line; one process finishes.

    Process 0 coordinates: without it JAX itself ends the other one.
    """
    runs = start(tmp_path / "run", 2)
    steps, until = tmp_path / "run" / "steps", time.monotonic() + 200
    while not list(steps.glob(f"*/{manifest.NAME}")) and time.monotonic() < until:
        time.sleep(0.01)
    runs[victim].send_signal(signal.SIGKILL)
    codes, _, errors = finish(runs)
    killed, code = codes[victim], codes[1 - victim]
    assert killed == -signal.SIGKILL
    if code == 0:  # it was done already
        assert losses(tmp_path / "run") == losses(whole)
        return
    assert code == 75, errors
    said = [line for line in errors[1 - victim].splitlines() if "[Gloo]" not in line]
    assert len(said) == 1, said
    assert said[0].startswith(f"process {1 - victim}: a peer is gone ("), said
    codes, outputs, _ = finish(start(tmp_path / "run", 1))
    assert codes == [0] and "from step 0" not in outputs[0], outputs
    assert losses(tmp_path / "run") == losses(whole)  # bit for bit


@pytest.mark.full
def test_other_numbers_of_devices_have_the_same_curve(whole, tmp_path):
    """To the rounding of float32: one device, and eight."""
    for devices in (1, 8):
        folder = tmp_path / str(devices)
        assert finish(start(folder, 1, devices=devices))[0] == [0]
        assert losses(folder) == pytest.approx(losses(whole), rel=0, abs=1e-6)


@pytest.mark.full
def test_what_is_not_as_it_was_written_is_one_line(whole):
    """A flipped bit, a renamed folder, other options: exit code 2, nothing trained."""

    def refused(says, *more):
        codes, _, errors = finish(start(whole, 1, *more))
        lines = [line for line in errors[0].splitlines() if line.startswith("error: ")]
        assert codes == [2] and len(lines) == 1 and says in lines[0], errors
        assert "Traceback" not in errors[0]

    last = whole / "steps" / str(STEPS)
    path = max(
        (p for p in last.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused("is damaged")
    path.write_bytes(content)
    refused("with other options: learning_rate 0.001, not 0.01", "--learning-rate=0.01")
    last.rename(last.with_name("15"))
    refused("its folder was renamed: 12, not 15")
    last.with_name("15").rename(last)
    runs = start(whole, 1)
    assert finish(runs)[0] == [0]
