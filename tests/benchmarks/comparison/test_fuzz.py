"""The fuzz on a small budget: it finds a liar, and nothing else."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from benchmarks.__main__ import main
from benchmarks.comparison import fuzz
from benchmarks.harness import checkpoints, results


@pytest.mark.full
def test_no_verdict_of_the_fuzz_is_wrong():
    """300 problems: nothing silently wrong, no false alarm, no misreported residual."""
    assert main(["fuzz", "--problems", "300", "--group", "50", "--seed", "1"]) == 0
    result = json.loads((results.RESULTS / "fuzz.json").read_text())
    assert result["problems"] == 300
    rules = result["rules"].values()
    assert sum(rule["problems"] for rule in rules) == 300
    assert sum(rule["converged"] for rule in rules) > 150
    for fault in ("silently_wrong", "false_alarms", "misreported"):
        assert sum(rule[fault] for rule in rules) == 0


def test_the_fuzz_finds_a_liar(monkeypatch):
    """A rule that returns g and always says converged is caught."""

    def liar(vjp, g):
        return rbpjax.Solution(
            value=g,
            num_steps=jnp.int32(1),
            residual=jnp.float32(0),
            converged=jnp.bool_(True),
        )

    monkeypatch.setattr(fuzz, "RULES", {"liar": lambda random, tol: liar})
    with jax.enable_x64(True):
        found = fuzz.run_group(np.random.default_rng(0), 20)
    found = fuzz.summary(fuzz.Outcome(*(a[None] for a in found)))["rules"]["liar"]
    assert found["converged"] == 20
    assert found["silently_wrong"] + found["misreported"] > 20


@pytest.mark.filterwarnings("ignore")  # orbax's own
@pytest.mark.full
def test_an_interrupted_fuzz_resumes(monkeypatch):
    """Stopped after the first save and started again, the counts are the same."""
    command = ["fuzz", "--problems", "4", "--group", "2", "--seed", "1"]
    path = results.RESULTS / "fuzz.json"
    assert main(command) == 0
    whole = json.loads(path.read_text())["rules"]
    save = checkpoints.Checkpoints.save

    def save_and_stop(self, name, step, state):
        save(self, name, step, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "save", save_and_stop)
        assert main(command) == 130
    assert main(command) == 0
    assert json.loads(path.read_text())["rules"] == whole


@pytest.mark.parametrize("name", ["fuzz --problems 0", "fuzz --seed -1"])
def test_bad_arguments_end_in_one_line(name, capsys):
    """Exit code 2 and one line that says what was wrong."""
    assert main(name.split()) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
