"""The verdicts on the papers' claims follow from the committed numbers."""

import copy

import pytest

from benchmarks import claims
from benchmarks.harness.results import read_json


@pytest.fixture(autouse=True)
def committed(monkeypatch):
    """The files of the repository, where other tests have folders of their own."""
    monkeypatch.undo()


ROWS = [claim for paper in claims.PAPERS.values() for claim in paper]


def of(answer):
    """The row of a claim by its answer, and copies of its results."""
    (row,) = [row for row in ROWS if row.answer is answer]
    return [copy.deepcopy(read_json(name)) for name in row.results]


def test_the_committed_claims_are_those_of_the_committed_results():
    """No page is older than the experiments that it quotes."""
    committed = read_json("claims")["papers"]
    now = {
        p: [claims.answered(row) for row in rows] for p, rows in claims.PAPERS.items()
    }
    assert committed == now


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.claim[:30])
def test_no_claim_without_a_result(row):
    """Each names its files, and its sentence is one."""
    assert row.results
    found = row.answer(*map(read_json, row.results))
    assert found.verdict in claims.VERDICTS
    assert found.why.endswith(".") and found.ours


def test_paired_differences_count_beyond_two_standard_errors():
    """By hand: differences 1, 2, 3 have mean 2 and standard error 1/√3."""
    difference = claims.paired([2, 4, 6], [1, 2, 3])
    assert difference == pytest.approx((2, 3**-0.5))
    assert not claims.level(difference)
    assert claims.level((1.0, 0.6)) and not claims.level((-1.0, 0.4))


def test_verdicts_turn_with_the_numbers():
    """A result that says the opposite has the opposite verdict."""
    (rules,) = of(claims._time)
    assert claims._time(rules).verdict == claims.HOLDS
    for cost in rules["costs"]["truncation"].values():
        cost["ratio"]["median"] = 3.0
    assert claims._time(rules).verdict == claims.FAILS

    results = of(claims._like_bptt)
    for result in results:
        result["methods"]["anp"]["final"] = [
            x - 0.01 * i for i, x in enumerate(result["methods"]["bptt"]["final"], 1)
        ]
    assert claims._like_bptt(*results).verdict == claims.HOLDS
    results = of(claims._beats_others)
    for result in results:
        result["methods"]["anp"]["final"] = [10 + i * i for i in range(5)]
    assert claims._beats_others(*results).verdict == claims.FAILS

    (norms,) = of(claims._norms)
    norms["networks"]["unitary, linear"]["gradient_deviation"] = [0.5, 0.5]
    assert claims._norms(norms).verdict == claims.FAILS

    hopfield, paper = of(claims._instability)
    arms = paper["splits"]["random"]["methods"]
    arms["rbp"] = arms["neumann"]
    history = hopfield["methods"]["rbp"]["history"]["retrieval_error"]
    history[-1] = [10 * error for error in history[-1]]
    assert claims._instability(hopfield, paper).verdict == claims.IN_PART

    (families,) = of(claims._same_gradient)
    rule = families["entries"][0]["rules"]["Neumann"]
    rule["error"], rule["converged"] = [1.0] * 3, [1.0] * 3
    assert claims._same_gradient(families).verdict == claims.IN_PART
    assert "3 called converged and wrong" in claims._same_gradient(families).ours
