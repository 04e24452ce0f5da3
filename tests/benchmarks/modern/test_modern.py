"""The comparison at equal budget, small: what is counted, what is measured, a run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.harness import results
from benchmarks.modern import experiment


def batch():
    """Eight digits."""
    data = experiment.images("digits", 0, (8,))[0]
    return [jnp.asarray(part) for part in data]


@pytest.mark.parametrize("task", experiment.TASKS)
def test_the_dense_gradient_is_that_of_a_long_unroll(task):
    """And the error of a one-step gradient against it is what it must be."""
    net, (x, y) = experiment.network(task), batch()
    params = net.init(jax.random.key(0))
    found = {}
    for name, solve in {
        "long": experiment.bptt(net.f, 300),
        "one": experiment.bptt(net.f, 300, truncation=1),
    }.items():
        grads = experiment.gradient(net, solve)(params, x, y)[1]
        found[name] = experiment.error(task, grads, params, x, y)
    # ρ(J) is about 0.7 at most: 300 steps leave float32's rounding, some 1e-6.
    assert found["long"] < 1e-4 < 0.05 < found["one"]


@pytest.mark.parametrize("name", experiment.METHODS)
def test_evaluations_and_products_are_counted(name):
    """Of methods with a fixed number of them, by hand; of the others, at least one."""
    net, (x, y) = experiment.network("together"), batch()
    how, steps = experiment.METHODS[name], experiment.DAMPED
    take = experiment.gradient(net, how.make(net.f))
    (_, solution), _, report = take(net.init(jax.random.key(0)), x, y)
    backward = int(report.num_products) + how.price + 1
    want = {
        "bptt": experiment.UNROLLED,
        "reversible": 4 * steps,
        "unrolled": 5,
        "neumann": 5 + 1,
        "jfb": 1,
        "broyden": 1,
        "phantom": 4 + 1,
    }
    residuals = 2  # measured along, whether read or not
    assert solution.num_products >= 1
    if name in want:
        assert want[name] <= backward <= want[name] + residuals
    forward = {"bptt": experiment.UNROLLED, "reversible": 2 * steps}
    if name in forward:
        assert forward[name] <= solution.num_products <= forward[name] + residuals


@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_a_small_run_learns(monkeypatch, capsys):
    """Within the budget, more than chance; and the page can show it."""
    monkeypatch.setattr(experiment, "RATES", (3e-3, 1e-2))
    arguments = ["--tasks", "apart", "--methods", "neumann", "reversible"]
    assert main(["modern", *arguments, "--seeds", "0", "--budget", "1500"]) == 0
    assert "| Neumann(5)" in capsys.readouterr().out
    path = results.RESULTS / "modern-custom"
    assert path.with_suffix(".png").stat().st_size < 200_000
    found = json.loads(path.with_suffix(".json").read_text())["tasks"]["apart"]
    for m in found.values():
        assert np.array(m["own"]).shape == (1, experiment.POINTS + 1)
        assert m["own"][0][-1] > 0.3  # of ten classes
        assert 1500 <= m["spent"][0] < 1500 + 200 and m["temporary_bytes"] > 0
        assert m["gradient_error"]["start"] is not None


def test_the_validation_seed_is_not_reported(capsys):
    """Exit code 2 and the name of the option."""
    assert main(["modern", "--seeds", "1000"]) == 2
    assert "--seeds: not 1000" in capsys.readouterr().err
