"""Two checkouts against each other: here this one against itself."""

import json
import math

import pytest

from benchmarks.__main__ import main
from benchmarks.comparison import before_after
from benchmarks.harness import results


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_against_itself(monkeypatch, capsys):
    """The same steps and errors on both sides, and a ratio near 1."""
    monkeypatch.setattr(before_after, "METHODS", before_after.METHODS[:2])
    here = str(before_after.PROJECT)
    arguments = ["--checkout", here, "--problems", "bilevel-10"]
    assert main(["before-after", *arguments]) == 0
    result = json.loads((results.RESULTS / "before-after-custom.json").read_text())
    assert len(result["entries"]) == 2
    for entry in result["entries"]:
        assert entry["steps"]["before"] == entry["steps"]["after"]
        assert entry["error"]["before"] == entry["error"]["after"] < 1e-2
        assert abs(math.log(entry["ratio"]["median"])) < math.log(3)
    assert result["code"]["before"] == result["code"]["after"]
    assert here not in json.dumps(result)
    assert "| bilevel, κ = 10 | Neumann" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--checkout nowhere", "--checkout: no rbpjax/ in"),
        ("--checkout . --turns 3", "--turns: at least 15; got 3"),
        ("--checkout . --problems x", "--problems: no 'x'"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, says, capsys):
    """Exit code 2 and one line that says what was wrong."""
    assert main(["before-after", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
