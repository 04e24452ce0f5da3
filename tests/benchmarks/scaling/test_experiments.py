"""Both experiments, small; and what kills are judged by."""

import subprocess
import sys

import pytest

from benchmarks.harness import manifest
from benchmarks.harness.results import read_json
from benchmarks.scaling import experiment, kills

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.full
def test_a_process_that_hangs_is_counted_and_ended():
    sleep = [
        sys.executable,
        "-c",
        "import time; print('on', flush=True); time.sleep(60)",
    ]
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for command in ([sys.executable, "-c", "print('done')"], sleep)
    ]
    hung, said = kills.ended(runs, 5)
    assert (hung, said) == (1, ["done\n", "on\n"])
    assert all(run.poll() is not None for run in runs)


def test_the_last_checkpoint_is_the_last_sealed_one(tmp_path):
    assert kills.sealed(tmp_path) == 0
    for step in (5, 10):
        (tmp_path / "steps" / str(step)).mkdir(parents=True)
        (tmp_path / "steps" / str(step) / "array").write_text("")
    manifest.write(tmp_path / "steps" / "5", {"step": 5})
    assert kills.sealed(tmp_path) == 5


@pytest.mark.full
def test_three_kills():
    kills.Kills(kills=3, steps=20).run()
    found = read_json("kills-custom")
    assert (found["kills"], found["lost"], found["hangs"]) == (3, 0, 0)
    assert found["finished"] == found["bit_for_bit"] >= 1
    assert set(found["ends_of_the_others"]) <= {"75", "-6"}


@pytest.mark.full
def test_a_small_study(monkeypatch):
    monkeypatch.setattr(experiment, "SETTINGS", [(1, 1), (2, 1), (2, 2)])
    small = {"units": 32, "rows": 8, "solver_steps": 3, "repetitions": 2}
    small |= {"accelerator_units": 64, "accelerator_rows": 8}
    experiment.Scaling(**small).run()
    found = read_json("scaling-custom")
    one, two, apart = found["measured"][:3]
    assert one["collectives"] == {} and two["collectives"] == apart["collectives"]
    assert one["flops"] == two["flops"] == apart["flops"]  # weak: of each device
    assert len(found["predicted"]) == 6
    assert all(0 < row["efficiency"] <= 1.001 for row in found["predicted"])
