"""The model says what its formula says in the limits that one can solve."""

import pytest

from benchmarks.scaling.model import Machine, computing, efficiency, talking

FAST = 1e30
COUNTS = {
    "flops": 1e12,
    "memory": 1e9,
    "collectives": {"all-reduce": {"count": 2, "bytes": 1e6}},
}


def test_an_infinitely_fast_link_loses_nothing():
    machine = Machine(1e14, 1e12, FAST, 0.0)
    for weak in (True, False):
        for n in (1, 8, 512):
            assert efficiency(machine, COUNTS, 8, n, weak) == pytest.approx(1)


def test_the_slower_of_products_and_memory_counts():
    assert computing(Machine(1e12, FAST, 1, 0), COUNTS) == pytest.approx(1)
    assert computing(Machine(FAST, 1e9, 1, 0), COUNTS, 3) == pytest.approx(3)


def test_a_ring_moves_twice_the_bytes_for_an_all_reduce():
    machine = Machine(1, 1, 1e6, 0.0)
    assert talking(machine, COUNTS, 1) == 0
    assert talking(machine, COUNTS, 2) == pytest.approx(2 * 1 / 2)
    assert talking(machine, COUNTS, 512) == pytest.approx(2 * 511 / 512)
    gather = {"collectives": {"all-gather": {"count": 1, "bytes": 1e6}}}
    assert talking(machine, gather, 4) == pytest.approx(3 / 4)
    scatter = {"collectives": {"reduce-scatter": {"count": 1, "bytes": 1e6}}}
    assert talking(machine, scatter, 4) == pytest.approx(3)


def test_latencies_are_those_of_a_tree():
    machine = Machine(1, 1, FAST, 1e-3)
    assert talking(machine, COUNTS, 8) == pytest.approx(2 * 2 * 3 * 1e-3)


def test_strong_scaling_is_amdahls_where_talking_is_constant():
    """t(N) = c / N + s, with s of latency alone: efficiency 1 / (1 + N s / c)."""
    machine = Machine(1e12, FAST, FAST, 1e-3)
    for n in (8, 64, 512):
        silent = talking(machine, COUNTS, n)
        want = 1 / (1 + n * silent / 8)  # eight devices with a second each
        assert efficiency(machine, COUNTS, 8, n, False) == pytest.approx(want)
    weak = efficiency(machine, COUNTS, 8, 64, True)
    assert weak == pytest.approx(1 / (1 + talking(machine, COUNTS, 64)))
