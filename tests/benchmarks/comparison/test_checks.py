"""The checking benchmarks on a small budget: the fuzz finds a liar, tables come out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from benchmarks import harness
from benchmarks.__main__ import main
from benchmarks.comparison import fuzz


def test_no_verdict_of_the_fuzz_is_wrong():
    """300 problems: nothing silently wrong, no false alarm, no misreported residual."""
    assert main(["fuzz", "--problems", "300", "--group", "50", "--seed", "1"]) == 0
    result = json.loads((harness.RESULTS / "fuzz.json").read_text())
    assert result["problems"] == 300
    rules = result["rules"].values()
    assert sum(rule["problems"] for rule in rules) == 300
    assert sum(rule["converged"] for rule in rules) > 150
    for fault in ("silently_wrong", "false_alarms", "misreported"):
        assert sum(rule[fault] for rule in rules) == 0


def test_the_fuzz_finds_a_liar(monkeypatch):
    """A rule that returns g and always says converged is caught."""

    def liar(vjp, g):
        return rbpjax.Solution(g, jnp.int32(1), jnp.float32(0), jnp.bool_(True))

    monkeypatch.setattr(fuzz, "RULES", {"liar": lambda random, tol: liar})
    with jax.enable_x64(True):
        found = fuzz.run_group(np.random.default_rng(0), 20)
    found = fuzz.summary(fuzz.Outcome(*(a[None] for a in found)))["rules"]["liar"]
    assert found["converged"] == 20
    assert found["silently_wrong"] + found["misreported"] > 20


def test_both_paths_of_differentiation_agree():
    """rbp_solve and the custom_jvp give the same four derivatives."""
    assert main(["modes", "--size", "3", "--repetitions", "2"]) == 0
    result = json.loads((harness.RESULTS / "modes.json").read_text())
    differences = [d["difference"] for d in result["derivatives"].values()]
    assert len(differences) == 4 and max(differences) < 1e-9


@pytest.mark.parametrize("name", ["fuzz --problems 0", "modes --size 1", "fuzz --x"])
def test_bad_arguments_end_in_one_line(name, capsys):
    """Exit code 2 and one line that says what was wrong."""
    assert main(name.split()) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
