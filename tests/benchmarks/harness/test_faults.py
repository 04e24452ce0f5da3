"""Checkpoints under stress: each fault is named, in one line, before it does harm."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness import checkpoints, guard, manifest
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.options import UsageError

pytestmark = pytest.mark.filterwarnings("ignore")  # orbax's own
STATE = jnp.arange(64, dtype=jnp.float32)


def saved(step=3):
    run = Checkpoints("test", {"a": 1}, fresh=True)
    run.save("run", step, STATE)
    return run


def refused(run, match, like=STATE):
    with pytest.raises(UsageError, match=match) as error:
        run.restore("run", like)
    assert "\n" not in str(error.value) and "--fresh" in str(error.value)


def files(run):
    found = (run.folder / "run" / "3").rglob("*")
    return sorted(path for path in found if path.is_file())


def test_every_flipped_bit_is_named():
    """In each file of a checkpoint, its manifest too; flipped back, it is whole."""
    run = saved()
    assert len(files(run)) > 3
    for path in files(run):
        whole = path.read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1} if whole else ():
            broken = bytearray(whole)
            broken[at] ^= 4
            path.write_bytes(broken)
            refused(run, "damaged")
        path.write_bytes(whole)
    step, state = run.restore("run", STATE)
    assert step == 3
    np.testing.assert_array_equal(state, STATE)


def test_a_missing_and_a_new_file_are_named():
    run = saved()
    path = next(p for p in files(run) if p.name != manifest.NAME)
    content = path.read_bytes()
    path.unlink()
    refused(run, f"{path.name} is missing")
    path.write_bytes(content)
    (path.parent / "other").write_text("")
    refused(run, "other is new")


def test_a_renamed_folder_is_named():
    run = saved()
    (run.folder / "run" / "3").rename(run.folder / "run" / "7")
    refused(run, "its folder was renamed: 3, not 7")


def test_the_folder_of_a_run_with_other_options_is_named():
    run = saved()
    other = Checkpoints("test", {"a": 2}, fresh=True)
    shutil.copytree(run.folder, other.folder, dirs_exist_ok=True)
    refused(other, "with other options: a 1, not 2")


def test_another_dtype_or_shape_is_named():
    run = saved()
    refused(run, r"float32\[64\], not .*float16\[64\]", STATE.astype(jnp.float16))
    refused(run, r"float32\[64\], not .*float32\[63\]", STATE[1:])


def test_another_version_of_the_code_is_named(monkeypatch):
    run = saved()
    monkeypatch.setattr(manifest, "sources", lambda *_: "another")
    refused(run, "another version of the code")


def test_a_checkpoint_that_was_not_sealed_is_none(monkeypatch):
    """Killed between orbax's last word and ours: the one before is still there."""
    run = saved()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(manifest, "write", killed)
        run.save("run", 4, STATE + 1)
    assert run.restore("run", STATE)[0] == 3
    run.save("run", 4, STATE + 2)
    step, state = run.restore("run", STATE)
    assert step == 4
    np.testing.assert_array_equal(state, STATE + 2)
    assert [f.name for f in (run.folder / "run").glob("[0-9]*")] == ["4"]


HOLD = """
import sys, time
from pathlib import Path
from benchmarks.harness import checkpoints
checkpoints.CHECKPOINTS = Path(sys.argv[1])
try:
    checkpoints.Checkpoints("test", {"a": 1}, fresh=False)
except checkpoints.UsageError as error:
    sys.exit(f"error: {error}")
print("ready", flush=True)
time.sleep(60)
"""


def hold(folder):
    command = [sys.executable, "-c", HOLD, str(folder)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def test_a_second_run_of_an_experiment_ends_in_one_line():
    """And not one after it: the lock ends with its process, by kill -9 too."""
    first = hold(checkpoints.CHECKPOINTS)
    try:
        assert first.stdout.readline() == "ready\n"
        second = hold(checkpoints.CHECKPOINTS)
        _, said = second.communicate(timeout=60)
        assert second.returncode == 1
        assert said.count("\n") == 1
        assert f"is running already (process {first.pid})" in said
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    Checkpoints("test", {"a": 1}, fresh=False)


def test_a_folder_that_cannot_be_written_is_one_line(monkeypatch, tmp_path):
    """A file where the folder should be (root may write into any folder)."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path / "file" / "here")
    with pytest.raises(UsageError, match="cannot write into") as error:
        Checkpoints("test", {}, fresh=False)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_one_line_before_the_work(monkeypatch):
    """Two states must have room when a training begins."""
    run = Checkpoints("test", {"a": 1}, fresh=True)
    asked = []

    def allocate(file, start, size):
        asked.append(size)
        if size > 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    with pytest.raises(UsageError, match=r"cannot write 1.05 MB into .*: No space"):
        run.restore("run", STATE)
    assert asked[-1] == 2**20 + 2 * STATE.nbytes
    assert not list(run.folder.glob(".trial*"))


def test_a_limit_of_the_system_is_one_line(tmp_path):
    """Of the size of files, which is not mocked; in a process of its own."""
    script = (
        "from pathlib import Path; from benchmarks.harness import guard\n"
        f"guard.room(Path({str(tmp_path)!r}), 2**20)"
    )

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**10, 2**10))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    run = subprocess.run(
        [sys.executable, "-c", script],
        preexec_fn=limited,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "UsageError: cannot write 1.05 MB into" in run.stderr.splitlines()[-1]
    assert not list(Path(tmp_path).iterdir())


def test_a_manifest_is_json_that_a_person_reads():
    run = saved()
    content = json.loads((run.folder / "run" / "3" / manifest.NAME).read_text())
    assert content["step"] == 3 and content["config"] == {"a": 1}
    assert content["arrays"] == ["[0] float32[64]"]
    assert len(content["code"]) == 16 and len(content["files"]) > 2


def test_locks_of_one_process_are_its_own():
    """Opened twice in one process it is the same run; given back, it is free."""
    run = Checkpoints("test", {"a": 1}, fresh=False)
    assert Checkpoints("test", {"a": 1}, fresh=False).folder == run.folder
    run.clear()
    other = hold(checkpoints.CHECKPOINTS)
    try:
        assert other.stdout.readline() == "ready\n"
        started = time.monotonic()
        with pytest.raises(UsageError, match="running already"):
            guard.lock(run.folder, "this")
        assert time.monotonic() - started < 5
    finally:
        other.kill()
        other.communicate()
