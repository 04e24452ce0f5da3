"""MNIST at equilibrium: its parts, and a small training on scikit-learn's digits."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.harness import results
from examples.mnist import images, report, train

FOLDER = Path(train.__file__).parent


def test_the_script_is_short():
    assert len((FOLDER / "train.py").read_text().splitlines()) <= 200


def test_both_networks_have_the_same_parameters(apart):
    """And the explicit one takes the very step whose fixed point is the other's."""
    pair = [train.Network(kind, 8, 16, 0.9, 0) for kind in train.KINDS]
    params = [nnx.to_pure_dict(nnx.state(model, nnx.Param)) for model in pair]
    jax.tree.map(np.testing.assert_array_equal, *params)
    batch = jax.random.uniform(jax.random.key(0), (4, 8, 8))
    x = pair[0].drive(batch)
    solution = pair[0](batch)[1]
    image = pair[0].state.cell(x, solution.value)
    assert solution.converged
    gap = jnp.linalg.norm(image - solution.value)
    assert gap <= 1.01e-2 * jnp.linalg.norm(image)
    np.testing.assert_allclose(
        pair[1](batch)[1].value, pair[0].state.cell(x, jax.nn.relu(x)), rtol=1e-6
    )
    assert set(report.TITLES) == {*train.KINDS, "loose"}


def test_deformations_are_small_and_differ(apart):
    """A blob in the middle stays near it; no two images are moved alike."""
    image = jnp.zeros((20, 28, 28)).at[:, 13:15, 13:15].set(1.0)
    moved = images.deformed(jax.random.key(0), image)
    at = jnp.arange(28) - 13.5
    mass = moved.sum((1, 2))
    center = jnp.stack(
        [(moved.sum(2) @ at) / mass, (moved.sum(1) @ at) / mass], axis=-1
    )
    # Shifts of at most 2 pixels; scale moves them by a tenth of that.
    assert jnp.abs(center).max() < 2.4 and jnp.abs(center).max() > 1
    assert len(np.unique(np.asarray(center[:, 0]))) == 20
    assert 2 < mass.min() and mass.max() < 6  # of 4, by scales of 0.9 to 1.1 squared


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_it_learns_at_equilibrium(apart):
    """The loss falls, every solve converges, and ρ(J) stays below 1."""
    train.Mnist(tiny=True).run()
    found = json.loads((results.RESULTS / "example-mnist-custom.json").read_text())
    for kind in train.KINDS:
        (run,) = found["networks"][kind]
        loss = run["history"]["mean"]["loss"]
        assert loss[-1] < 0.6 < 1.8 < loss[0]
        assert run["test_error"] < 30  # nine in ten of guesses are wrong
    (run,) = found["networks"]["equilibrium"]
    assert max(run["history"]["max"]["solve/forward_residual"]) <= 1e-2
    assert max(run["history"]["watched"]["radius"]) < 1
    assert all(solve["converged"] == 1 for solve in run["test_solves"])
    memory = found["memory"]
    assert memory["unrolled 32"] > 1.5 * memory["unrolled 8"]
    assert memory["equilibrium"] < memory["unrolled 16"]
    assert (results.RESULTS / "example-mnist-custom.png").exists()
