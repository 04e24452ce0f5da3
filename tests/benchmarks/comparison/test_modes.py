"""Both paths of differentiation on a small network."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.harness import results


@pytest.mark.full
def test_both_paths_of_differentiation_agree():
    """rbp_solve and the custom_jvp give the same four derivatives."""
    assert main(["modes", "--size", "3", "--repetitions", "2"]) == 0
    result = json.loads((results.RESULTS / "modes.json").read_text())
    differences = [d["difference"] for d in result["derivatives"].values()]
    assert len(differences) == 4 and max(differences) < 1e-9


def test_bad_arguments_end_in_one_line(capsys):
    """Exit code 2 and one line that says what was wrong."""
    assert main(["modes", "--size", "1"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
