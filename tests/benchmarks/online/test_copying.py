"""The copying benchmark on a small budget: what it learns, resumes and measures."""

import json

import jax
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.harness import checkpoints, results, training
from benchmarks.online import copying

QUICK = ("--delays", "20", "--seeds", "0", "--updates", "30", "--units", "4")


def run(*arguments):
    assert main(["online-copying", *QUICK, *arguments]) == 0
    name = "online-copying-custom"
    assert (results.RESULTS / f"{name}.png").stat().st_size < 200_000
    return json.loads((results.RESULTS / f"{name}.json").read_text())


@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_an_interrupted_run_resumes_bit_for_bit(monkeypatch, capsys):
    """Stopped in its first run and started again, the curves are the same."""
    options = ("--methods", "diagonal", "bptt")
    whole = run(*options)["methods"]
    assert "| Diagonal RTRL" in capsys.readouterr().out

    def stop_after_two(steps, total, label, done=0):
        for count, step in enumerate(steps):
            if count == 2 and not done:
                raise KeyboardInterrupt
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(training, "progress", stop_after_two)
        assert main(["online-copying", *QUICK, *options]) == 130
    again = run(*options)["methods"]
    assert [m["delays"] for m in again.values()] == [
        m["delays"] for m in whole.values()
    ]
    assert not list(checkpoints.CHECKPOINTS.glob("*/"))
    # Exact, both of them: the same curves, but for rounding.
    curves = [m["delays"]["20"]["bits"] for m in whole.values()]
    np.testing.assert_allclose(*curves, rtol=1e-3)
    # One keeps its history, and the other does not.
    streamed, stored = (list(m["bytes"].values()) for m in whole.values())
    assert streamed[0] == streamed[-1] and stored[-1] > 50 * stored[0]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_all_methods_run():
    """Each has a finite curve."""
    found = run()["methods"]
    assert list(found) == list(copying.METHODS)
    assert all(np.isfinite(m["delays"]["20"]["bits"]).all() for m in found.values())


def test_an_episode_asks_for_what_it_showed():
    """Three symbols, a question after the delay, three targets."""
    x, y = copying.episode(jax.random.key(0), delay=40)
    shown = np.argmax(x[:3], 1)
    assert np.flatnonzero(y >= 0).tolist() == [40, 41, 42]
    np.testing.assert_array_equal(y[40:43], shown)
    assert np.flatnonzero(x[:, -1]).tolist() == [40] and x.sum() == 4
