"""Warm starts in training, on the smallest problem."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.comparison import warm
from benchmarks.harness import results


@pytest.mark.full
def test_a_small_run(capsys):
    """Fewer steps warm than cold, no less exact; the truncated rule gains accuracy."""
    arguments = ["--problems", "bilevel-10", "--steps", "4", "--rates", "1e-4"]
    assert main(["warm", *arguments]) == 0
    (entry,) = json.loads((results.RESULTS / "warm-custom.json").read_text())["entries"]
    adaptive, truncated = (entry[rule] for rule in warm.RULES)
    assert adaptive["steps"]["warm"] < adaptive["steps"]["cold"]
    assert adaptive["converged"] == {"cold": 1.0, "warm": 1.0}
    # The adjoint's 1e-4 times κ(I - J) = 10.
    assert max(adaptive["error"].values()) < 2e-3
    assert truncated["steps"] == {"cold": 5.0, "warm": 5.0}
    assert truncated["error"]["warm"] < 0.5 * truncated["error"]["cold"]
    assert "bilevel" in capsys.readouterr().out


@pytest.mark.full
def test_without_a_step_of_the_parameters_the_adjoint_stays():
    """At a learning rate of zero every solve but the first has nothing left to do."""
    found = warm.Warm(steps=3).train("bilevel-10", 0.0)["Adaptive"]
    assert found["steps"]["cold"] > 5 and found["steps"]["warm"] <= 1


@pytest.mark.parametrize(
    "arguments",
    [["--problems", "nothing"], ["--steps", "0"], ["--rates", "-1.0"]],
)
def test_bad_arguments_end_in_one_line(arguments, capsys):
    """Exit code 2 and one line that says what was wrong."""
    assert main(["warm", *arguments]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
