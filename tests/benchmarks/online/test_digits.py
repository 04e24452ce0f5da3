"""The digits benchmark on a small budget: exact methods agree, feedback is an error."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.harness import results
from benchmarks.online import digits

QUICK = ("--seeds", "0", "--updates", "50", "--units", "4")


def run(*arguments):
    assert main(["online-digits", *QUICK, *arguments]) == 0
    name = "online-digits-custom"
    assert (results.RESULTS / f"{name}.png").stat().st_size < 200_000
    return json.loads((results.RESULTS / f"{name}.json").read_text())["kinds"]


@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_exact_methods_have_one_curve(capsys):
    """Diagonal RTRL and BPTT: all pilots and runs, but for rounding."""
    found = run("--kinds", "lru", "--methods", "diagonal", "bptt")["lru"]
    assert "| Diagonal RTRL" in capsys.readouterr().out
    pilots = [list(m["pilot_accuracy"].values()) for m in found.values()]
    # A rounding error may turn an answer: five of the 360 test images.
    np.testing.assert_allclose(*pilots, atol=5 / 360)
    # One keeps its history, and the other does not.
    streamed, stored = (list(m["bytes"].values()) for m in found.values())
    assert streamed[0] == streamed[-1] and stored[-1] > 5 * stored[0]


@pytest.mark.filterwarnings("ignore")
def test_all_methods_run():
    """Each has a finite curve, of the kinds of units that it is for."""
    found = run()
    assert {kind: list(methods) for kind, methods in found.items()} == {
        kind: [name for name, m in digits.METHODS.items() if kind in m.kinds]
        for kind in digits.KINDS
    }
    for methods in found.values():
        assert all(np.isfinite(m["accuracy"]).all() for m in methods.values())


@pytest.mark.parametrize("kind", ["leaky", "lif"])
def test_random_feedback_sends_back_the_error(kind, monkeypatch):
    """With the readout's own weights in place of random ones it is symmetric."""
    net = digits.KINDS[kind].network(16, 64)
    params = net.init(jax.random.key(0))
    weights = params["readout"].T * 16**0.5
    normal = lambda key, shape: weights
    x, y = jnp.ones((5, 1)), jnp.array([-1, -1, -1, -1, 3])

    def grads(make):
        est = make(net.cell, net.loss)
        carry, total = est.init(params, net.h0), []
        step = jax.jit(est.step)
        for t in range(5):
            carry, out = step(params, carry, x[t], y[t], ())
            total.append(out.grads)
        return total

    want = grads(digits.METHODS["rflo"].how.make)
    monkeypatch.setattr(jax.random, "normal", normal)
    got = grads(digits.random_feedback)
    # Float32: sums of about ten products, relative to the largest number.
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(want[-1]["cell"]["U"]).max()) > 1e-3
    # Nothing is asked for before the last step.
    assert float(jnp.abs(got[0]["cell"]["U"]).max()) == 0
