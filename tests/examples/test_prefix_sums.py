"""Prefix sums: the data, one network trained small, and what the script is made of."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from benchmarks.harness import results
from examples.prefix_sums import report, testing, train

FOLDER = Path(train.__file__).parent


def test_the_script_is_short():
    assert len((FOLDER / "train.py").read_text().splitlines()) <= 200


def test_parities_are_those_of_all_prefixes():
    """By counting; strings depend on the seed alone."""
    bits, parities = testing.batch(3, 20, (1, 2))
    for row, parity in zip(bits, parities, strict=True):
        for n in range(20):
            assert parity[n] == sum(b > 0 for b in row[: n + 1]) % 2
    assert set(np.unique(bits)) == {-1, 1} and bits.dtype == np.float32
    np.testing.assert_array_equal(bits, testing.batch(3, 20, (1, 2))[0])
    assert not np.array_equal(bits, testing.batch(3, 20, (1, 3))[0])


def test_iterations_go_up_to_twice_the_length():
    for length in (32, 512, 4096):
        found = testing.moments(length)
        assert found[-1] == max(2 * length, 256) and found[0] >= 8
        assert len(set(found)) == len(found) == len(sorted(found))


def test_every_network_is_made(apart):
    """All kinds give scores of two classes at each position; BPTT's is unrolled."""
    bits, _ = testing.batch(2, 8, (0,))
    for kind in train.KINDS:
        scores = nnx.eval_shape(lambda bits, kind=kind: train.make(kind, 0)(bits), bits)
        assert scores.shape == (2, 8, 2)
    assert set(report.TITLES) == set(train.KINDS)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_it_learns_and_thinks_longer(apart):
    """Trained on 8 bits: nearly all of 16 and most of 32 by more iterations."""
    train.PrefixSums(tiny=True).run()
    found = json.loads(
        (results.RESULTS / "example-prefix_sums-custom.json").read_text()
    )
    (run,) = found["networks"]["bounded"]
    mean, tests = run["history"]["mean"], run["tests"]
    assert mean["loss"][-1] < 0.05 < 0.5 < mean["loss"][0]
    assert mean["accuracy"][-1] > 0.99
    # Chance is 50 %, and what 8 positions can know of 16 is 75 %.
    assert tests["16"]["bits"][-1] > 90 > tests["16"]["bits"][0]
    assert tests["32"]["bits"][-1] > 70 > tests["32"]["bits"][0]
    assert tests["16"]["residual"][-1] < tests["16"]["residual"][0]
    assert (results.RESULTS / "example-prefix_sums-custom.png").exists()
