"""The other regimes of two checkouts: here this one against itself."""

import json
import math

import pytest

from benchmarks.__main__ import main
from benchmarks.comparison.before_after import PROJECT
from benchmarks.harness import results


@pytest.mark.full
def test_against_itself(capsys):
    """The same memory on both sides, and a ratio near 1."""
    arguments = ["--checkout", str(PROJECT), "--jobs", "uoro", "activity"]
    assert main(["rooms-before-after", *arguments]) == 0
    found = results.RESULTS / "rooms-before-after-custom.json"
    result = json.loads(found.read_text())
    assert [entry["job"] for entry in result["entries"]] == ["uoro", "activity"]
    for entry in result["entries"]:
        memory = entry["temporary_bytes"]
        assert memory["before"] == memory["after"] > 0
        assert abs(math.log(entry["ratio"]["median"])) < math.log(3)
    assert result["code"]["before"] == result["code"]["after"]
    assert "| uoro " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--checkout nowhere", "--checkout: no rbpjax/ in"),
        ("--checkout . --turns 3", "--turns: at least 15; got 3"),
        ("--checkout . --jobs x", "--jobs"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, says, capsys):
    """Exit code 2 and one line that says what was wrong."""
    assert main(["rooms-before-after", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
