"""Models at rest: gradients against differences, rest against closed forms, one fit."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rbpjax
from benchmarks.harness import results
from examples.steady_states import decisions, kinetics, reactions, train

FOLDER = Path(train.__file__).parent


@pytest.fixture(autouse=True)
def double(apart):
    """JAX's default numerics, but in float64."""
    with jax.enable_x64(True):
        yield


def test_the_script_is_short():
    assert len((FOLDER / "train.py").read_text().splitlines()) <= 200


@pytest.mark.full
@pytest.mark.parametrize("name", train.MODELS)
def test_the_gradient_is_that_of_differences(name):
    """In float64, away from the truth; and converged is what the report says."""
    model = train.MODELS[name]
    truth, data = train.problem(name, 3)
    solve = train.solver(model, "fixed point")
    at = jnp.asarray(truth) + 0.1

    @jax.jit
    def gradient(logs):
        loss = lambda logs, probe: model.loss(partial(solve, probe=probe), logs, data)
        return rbpjax.value_and_grad_with_report(loss)(logs)

    _, found, _ = gradient(at)
    # Central differences: an error of step² times third derivatives, and of rounding
    # and tolerance, 1e-9 or less, over the step; both are below 1e-5 of the gradient.
    shifts = 1e-4 * np.eye(len(truth))
    known = [(gradient(at + s)[0] - gradient(at - s)[0]) / 2e-4 for s in shifts]
    np.testing.assert_allclose(found, known, rtol=1e-4, atol=1e-5 * np.abs(known).max())


def test_receptors_are_in_balance():
    """All three flows are equal at rest, and the total is what it was."""
    logs = jnp.log(jnp.array([1.3, 0.4, 0.8, 0.6]))
    inputs = jnp.array([0.5, 2.0]), jnp.array([1.0, 1.7])
    solve = train.solver(reactions, "fixed point")
    h = reactions.amounts(solve, logs, inputs)
    taken = 1.3 * inputs[0] * h[:, 0] / (0.4 + h[:, 0])
    inside, back = 0.8 * h[:, 1], h[:, 2] / (0.6 + h[:, 2])
    # To the tolerance of the solve, √ε of float64.
    np.testing.assert_allclose(inside, taken, rtol=1e-7)
    np.testing.assert_allclose(back, taken, rtol=1e-7)
    np.testing.assert_allclose(h.sum(1), inputs[1], rtol=1e-12)


def test_robertson_keeps_the_total_and_ends_where_it_is_known_to():
    """A at t = 40 is 0.7158 in the literature; implicit Euler is off by its order."""
    logs = jnp.asarray(kinetics.NOMINAL)
    found = kinetics.course(train.solver(kinetics, "fixed point"), logs)
    np.testing.assert_allclose(found.sum(1), 1.0, rtol=1e-8)
    a = np.interp(np.log(40.0), np.log(kinetics.TIMES[1:]), found[:, 0])
    assert abs(a - 0.7158) < 0.02


@pytest.mark.full
def test_values_of_mileages_are_those_of_bellman():
    """By plain value iteration in NumPy, without the shift, at a discount of 0.99."""
    logs, upkeep = jnp.log(jnp.array([5.0, 3.0])), 0.003 * np.arange(decisions.STATES)
    value, chances = np.zeros(decisions.STATES), decisions.chances()
    np.testing.assert_allclose(chances.sum(1), 1.0, rtol=1e-12)
    for _ in range(3000):  # 0.99 to this power is 8e-14
        keep = 0.99 * chances @ value - upkeep
        value = np.logaddexp(keep, keep[0] - 5.0)
    known = 1 / (1 + np.exp(keep - keep[0] + 5.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decisions, "DISCOUNT", 0.99)
        found = decisions.log_shares(train.solver(decisions, "fixed point"), logs)
    np.testing.assert_allclose(np.exp(found[:, 1]), known, rtol=1e-6)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_parameters_are_found():
    """All within four standard errors of the truth; the figure is drawn."""
    train.SteadyStates(tiny=True).run()
    path = results.RESULTS / "example-steady_states-custom.json"
    fits = json.loads(path.read_text())["fits"]
    for model in train.MODELS:
        (fit,) = fits[model]["fixed point"]
        off = np.log(np.array(fit["found"]) / np.array(fit["truth"]))
        assert np.all(np.abs(off) < 4 * np.array(fit["standard_errors"]))
        start = np.exp(train.MODELS[model].NOMINAL) / np.array(fit["truth"])
        assert np.linalg.norm(off) < np.linalg.norm(np.log(start)) / 3
    assert path.with_suffix(".png").exists()
